"""What the released evaluation would print, faults included: to compare with published numbers, and for nothing else.

Repeated faults: the right word counts even beside wrong ones; a smile answer without "no" is a yes; a label is not
lower-cased but the answer is; only the last sample of a scene is captioned; of a sentence only the first box counts,
and the last phrase that names a class names it. Not repeated: WordNet's synonyms, which the release adds to a label's
own words; here a label's singular and plural count.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavius.evaluation.boxes import THRESHOLDS, detection
from octavius.evaluation.captions import caption
from octavius.evaluation.metrics import METRICS, Metric, letter
from octavius.evaluation.parsing import Box, mentions, parse_label

Row = Mapping[str, Any]
BOX = re.compile(r"\[ ?([\d.]+), ?([\d.]+), ?([\d.]+), ?([\d.]+) ?\]")
NAMED = tuple(  # phrases of the training data around a class, in the release's order
    re.compile(text)
    for text in (
        r"classified as (.+)",
        r"categori[sz]ed as (.+)",
        r"belong(?:s|ing)? to the category of (.+)",
        r"to the (.+?) category",
        r"falls under the category of (.+)",
        r"falls under the (.+?) category",
        r"its category is (.+)",
        r"[Tt]he (.+?) object",
    )
)


def upstream_scores(metric: Metric, rows: Sequence[Row]) -> dict[str, float]:
    """The released code's figures by name, in fractions; {} for a metric that it has not.

    Args:
        metric: one of METRICS.
        rows: answered records with its ground truth.
    """
    name = next((name for name, known in METRICS.items() if known is metric), None)
    if name == "detection":
        return _detection(rows)
    if name == "caption":
        last = {row.get("scene_id", index): row for index, row in enumerate(rows)}.values()
        scores = caption([row["prediction"] for row in last], [row["sentences"] for row in last])
        return {f"upstream {key}": value for key, value in scores.items()}
    hit = {"classification": _label_hit, "attribute": _attribute_hit, "choice": _choice_hit}.get(name or "")
    return {"upstream Acc@1": sum(map(hit, rows)) / max(len(rows), 1)} if hit else {}


def upstream_boxes(text: str, labels: Sequence[str]) -> list[tuple[str | None, Box]]:
    """The boxes that the release reads out of an answer."""
    boxes = []
    for sentence in text.split(". "):
        numbers = BOX.search(sentence)
        if numbers is None:
            continue
        try:
            x1, y1, x2, y2 = (float(value) for value in numbers.groups())
        except ValueError:
            continue
        if x1 <= x2 and y1 <= y2:
            said = [match[1] for pattern in NAMED if (match := pattern.search(sentence))]
            boxes.append((parse_label(said[-1], labels) if said else None, (x1, y1, x2, y2)))
    return boxes


def _detection(rows: Sequence[Row]) -> dict[str, float]:
    said = [upstream_boxes(row["prediction"], row["labels"]) for row in rows]
    truth = [[(item["label"], tuple(item["bbox"])) for item in row["object"]] for row in rows]
    scores = {}
    for iou in THRESHOLDS:
        for key, value in detection(said, truth, iou).items():
            scores[f"upstream {key}@{iou}"] = value
    return scores


def _label_hit(row: Row) -> bool:
    if row.get("scene_id") is not None:  # of point clouds: a part of the text, of the label as it is written
        return row["label"] in row["prediction"].lower()
    return bool(mentions(row["prediction"], [row["label"]]))


def _attribute_hit(row: Row) -> bool:
    if str(row["attr"]) in ("1", "-1") or set(row["labels"]) == {"yes", "no"}:
        said = "no" if {"no", "not"} & set(re.findall(r"\w+", row["prediction"].lower())) else "yes"
        return said == {"1": "yes", "-1": "no"}.get(str(row["attr"]), row["attr"])
    return bool(mentions(row["prediction"], [row["attr"]]))


def _choice_hit(row: Row) -> bool:
    text, choices = row["prediction"], row["gt_choices"]
    right = letter(row["gt_choice"], choices)
    for pattern in (r"the answer is \(([A-Z])\)", r"ANSWER: ([A-Z])", r"\(([A-Z])\)"):
        if match := re.search(pattern, text):
            return match[1] == right
    present = [choice for choice in choices if choice in text]
    return present == [choices[ord(right) - ord("A")]]
