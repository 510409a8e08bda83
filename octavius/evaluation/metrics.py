"""What a task's answers are compared with and how: one `Metric` a task, scored on answered records.

The tasks and metrics are those of the Octavius paper (arXiv 2311.02684, section 4); where its code differs, the
function says so. Scores are fractions (CIDEr 0..10). One label list per sample, no randomness but the seeded bootstrap,
no state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np

from octavius.evaluation.boxes import average_precision, detection_scores
from octavius.evaluation.captions import caption_scores, checked
from octavius.evaluation.intervals import bootstrap
from octavius.evaluation.parsing import (
    Box,
    mentions,
    parse_boxes,
    parse_choice,
    parse_confident_boxes,
    parse_label,
    says_none,
)
from octavius.inputs.boxes import fraction_box

Row = Mapping[str, Any]  # an answered record: `prediction`, the answer's text, and the ground truth
Scores = tuple[dict[str, float], dict[str, list[float]]]  # values by name, and their intervals


@dataclass(frozen=True)
class Metric:
    """How the answers to one kind of question are scored.

    Args:
        main: the value that tables show first.
        keys: the ground truth that a record must have.
        truth: record → its ground truth as it is compared; raises ValueError, TypeError or KeyError if it is unusable.
        score: answered records → values and 95 % intervals by name; the main value comes first.
        readable: whether something could be read out of an answered record's answer.
        choices: record → the texts among which an answer chooses; None where answers are free.
    """

    main: str
    keys: tuple[str, ...]
    truth: Callable[[Row], Any]
    score: Callable[[Sequence[Row]], Scores]
    readable: Callable[[Row], bool]
    choices: Callable[[Row], list[str]] | None = None


def accuracy(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Acc@1: share of answers that name exactly one label of their own label list, and the right one.

    Args:
        predictions: answer texts.
        references: the right labels.
        labels: the label list of each sample.
    """
    if len({len(predictions), len(references), len(labels)}) > 1:
        lengths = [len(predictions), len(references), len(labels)]
        raise ValueError(f"all lists must have one entry per sample, got lengths {lengths}")
    hits = [
        parse_label(text, names) == member(truth, names)
        for text, truth, names in zip(predictions, references, labels, strict=True)
    ]
    return {"Acc@1": sum(hits) / max(len(hits), 1)}


def member(label: str, labels: Sequence[str]) -> str:
    """The label as its list spells it.

    Raises:
        ValueError: it is not in the list.
    """
    same = [name for name in labels if name.casefold() == str(label).casefold()]
    if not same:
        raise ValueError(f"{label!r} is not among the labels {list(labels)}")
    return same[0]


def letter(choice: int | str, choices: Sequence[str]) -> str:
    """The letter of a choice that is given as an index or a letter.

    Raises:
        ValueError: there is no such choice.
    """
    letters = ascii_uppercase[: len(choices)]
    if isinstance(choice, int) and 0 <= choice < len(letters):
        return letters[choice]
    name = str(choice).strip("() .").upper()
    if len(name) != 1 or name not in letters:
        raise ValueError(f"must be an index or a letter of {len(choices)} choices, got {choice!r}")
    return name


def _boxes(row: Row) -> list[tuple[str, Box]]:
    return [(str(item["label"]), _box(item["bbox"])) for item in row["object"]]


def _box(values: Any) -> Box:
    x1, y1, x2, y2 = fraction_box(values)
    return x1, y1, x2, y2


def _sentences(row: Row) -> Sequence[str]:
    return checked(row["sentences"])


def _label(row: Row) -> str:
    return member(row["label"], row["labels"])


def _attribute(row: Row) -> str:
    value = str(row["attr"])
    return member({"1": "yes", "-1": "no"}.get(value, value), row["labels"])  # CelebA stores 1 and -1


def _choice(row: Row) -> str:
    return letter(row["gt_choice"], row["gt_choices"])


def _scene_answer(row: Row) -> str:
    _sentences(row)
    for answer in row.get("accepted", ()):
        member(answer, row["labels"])
    return _label(row)


def _score_detection(rows: Sequence[Row]) -> Scores:
    said = [parse_confident_boxes(row["prediction"], row["labels"]) for row in rows]
    references = [_boxes(row) for row in rows]
    values, intervals = detection_scores([[box[:2] for box in boxes] for boxes in said], references)
    scored = [[(label, box, score) for label, box, score in boxes if score is not None] for boxes in said]
    if any(scored) and sum(map(len, scored)) == sum(map(len, said)):  # every box has a confidence
        precision = average_precision(scored, references)
        values, intervals = values | precision[0], intervals | precision[1]
    return values, intervals


def _score_captions(rows: Sequence[Row]) -> Scores:
    return caption_scores([row["prediction"] for row in rows], [_sentences(row) for row in rows])


def _score_hits(rows: Sequence[Row], truth: Callable[[Row], str], said: Callable[[Row], str | None]) -> Scores:
    hits = np.array([said(row) == truth(row) for row in rows], dtype=float)
    return {"Acc@1": float(hits.mean())}, {"Acc@1": bootstrap(hits)}


def _score_scene(rows: Sequence[Row]) -> Scores:
    """Accuracy and the caption metrics; a question that people answered accepts any of their answers."""
    hits = np.array([_scene_hit(row) for row in rows], dtype=float)
    values, intervals = _score_captions(rows)
    return {"Acc@1": float(hits.mean())} | values, {"Acc@1": bootstrap(hits)} | intervals


def _scene_hit(row: Row) -> bool:
    if accepted := row.get("accepted"):
        return any(mentions(row["prediction"], [answer]) for answer in accepted)
    return _said_label(row) == _label(row)


def _said_label(row: Row) -> str | None:
    return parse_label(row["prediction"], row["labels"])


def _said_choice(row: Row) -> str | None:
    return parse_choice(row["prediction"], row["gt_choices"])


def _lettered(row: Row) -> list[str]:
    return [f"({ascii_uppercase[i]}) {text}" for i, text in enumerate(row["gt_choices"])]


METRICS = {
    "detection": Metric(
        "recall@0.5",
        ("object", "labels"),
        _boxes,
        _score_detection,
        lambda row: bool(parse_boxes(row["prediction"], ())) or says_none(row["prediction"]),
    ),
    "caption": Metric(
        "CIDEr", ("sentences",), _sentences, _score_captions, lambda row: bool(row["prediction"].strip())
    ),
    "classification": Metric(
        "Acc@1",
        ("label", "labels"),
        _label,
        lambda rows: _score_hits(rows, _label, _said_label),
        lambda row: _said_label(row) is not None,
        lambda row: list(row["labels"]),
    ),
    "attribute": Metric(
        "Acc@1",
        ("attr", "labels"),
        _attribute,
        lambda rows: _score_hits(rows, _attribute, _said_label),
        lambda row: _said_label(row) is not None,
        lambda row: list(row["labels"]),
    ),
    "choice": Metric(
        "Acc@1",
        ("gt_choice", "gt_choices"),
        _choice,
        lambda rows: _score_hits(rows, _choice, _said_choice),
        lambda row: _said_choice(row) is not None,
        _lettered,
    ),
    "scene-answer": Metric(
        "Acc@1",
        ("label", "labels", "sentences"),
        _scene_answer,
        _score_scene,
        lambda row: bool(mentions(row["prediction"], row["labels"])),
    ),
}
