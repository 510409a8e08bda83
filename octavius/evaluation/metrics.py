"""Scores of the 2D tasks: answers are parsed out of free text, compared with the ground truth and averaged.

    recall = Σ_p hits_p / Σ_p references_p        precision = Σ_p hits_p / Σ_p predictions_p       p an image

where hits_p is the largest one-to-one matching of pairs with IoU >= 0.5. Metrics are fractions (CIDEr 0..10).
The tasks and metrics are those of the Octavius paper (arXiv 2311.02684, section 4); where its code differs, the
function says so. One label list per sample, no randomness but the seeded bootstrap, no state.
"""

import math
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from scipy.optimize import linear_sum_assignment

from octavius.evaluation.parsing import Box, mentions, parse_boxes, parse_choice, parse_label

MAIN = {
    "detection": "recall@0.5",
    "caption": "CIDEr",
    "classification": "Acc@1",
    "vqa": "Acc@1",
    "hair": "Acc@1",
    "smile": "Acc@1",
    "classification3d": "Acc@1",
    "caption3d": "CIDEr",
    "vqa3d": "Acc@1",
}
KEYS = {
    "detection": ("object", "labels"),
    "caption": ("sentences",),
    "classification": ("label", "labels"),
    "vqa": ("gt_choice", "gt_choices"),
    "hair": ("attr", "labels"),
    "smile": ("attr", "labels"),
    "classification3d": ("label", "labels"),
    "caption3d": ("sentences",),
    "vqa3d": ("label", "labels", "sentences"),
}


def score(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores of the answered records, one entry per benchmark that occurs.

    Args:
        records: each has `benchmark`, `prediction` (the answer text) and the ground truth of its data record:
            detection `object` ([{"label", "bbox"}]) and `labels`; caption `sentences`; classification `label` and
            `labels`; vqa `gt_choice` (index or letter) and `gt_choices`; hair and smile `attr` and `labels`;
            classification3d as classification, caption3d as caption, vqa3d as both; a vqa3d record that people
            answered has `accepted`, the texts of `labels` of which an answer must name at least one.
    Returns:
        {benchmark: {"n": samples, "main": name of the main metric, "interval": [low, high] of the main metric,
        metric: value, ...}} with the metrics
        detection: recall@0.5, precision@0.5, recall_any_class@0.5, precision_any_class@0.5;
        caption, caption3d: CIDEr, BLEU-1, BLEU-2, BLEU-3, BLEU-4; vqa3d: Acc@1 and these; the others: Acc@1.
        The main metric is the first named.
    Raises:
        ValueError: a key is missing or a ground truth is unusable; the message names the record's id and the key.
    """
    check(records)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for index, record in enumerate(records):
        if record.get("prediction") is None:
            raise ValueError(f"record {record.get('id', index)!r}: key 'prediction' is missing")
        groups.setdefault(record["benchmark"], []).append(record)
    scorers = {"detection": _score_detection, "caption": _score_caption, "caption3d": _score_caption}
    scorers |= {"vqa3d": _score_scene}
    return {
        name: {"n": len(group), "main": MAIN[name], **scorers.get(name, _score_accuracy)(group)}
        for name, group in groups.items()
    }


def check(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless every record, answered or not, has a benchmark and its ground truth.

    Raises:
        ValueError: a key is missing or a ground truth is unusable; the message names the record's id and the key.
    """
    for index, record in enumerate(records):
        _check(record, index)


def detection(
    predictions: Sequence[Sequence[tuple[str | None, Box]]],
    references: Sequence[Sequence[tuple[str, Box]]],
    iou: float = 0.5,
) -> dict[str, float]:
    """Recall and precision of boxes, by the largest one-to-one matching, micro-averaged over images.

    A pair may match if its IoU is at least `iou` and, for `recall` and `precision`, its labels agree (case aside; a
    box without label never agrees). The `_any_class` values leave labels out. An image for which no box was parsed
    counts with all its references, hence lowers recall; it holds no prediction, so micro-averaged precision does not
    see it (upstream skips such images, for precision, to the same effect). A rate whose denominator is 0 is 0.

    Args:
        predictions: per image (label or None, (x1, y1, x2, y2)) as `parse_boxes` returns them.
        references: per image (label, box), in the same units.
        iou: threshold.
    Returns:
        recall, precision, recall_any_class, precision_any_class.
    """
    counts = _detection_counts(predictions, references, iou).sum(axis=0)  # [4]
    hits, hits_any, predicted, wanted = (float(count) for count in counts)
    return {
        "recall": hits / max(wanted, 1.0),
        "precision": hits / max(predicted, 1.0),
        "recall_any_class": hits_any / max(wanted, 1.0),
        "precision_any_class": hits_any / max(predicted, 1.0),
    }


def accuracy(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Acc@1: share of answers that name exactly one label of their own label list, and the right one.

    Args:
        predictions: answer texts.
        references: the right labels.
        labels: the label list of each sample.
    """
    _same_length(predictions, references, labels)
    hits = [
        parse_label(text, names) == _member(truth, names)
        for text, truth, names in zip(predictions, references, labels, strict=True)
    ]
    return {"Acc@1": sum(hits) / max(len(hits), 1)}


def caption(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr and BLEU-1..4 of pycocoevalcap over lower-cased words without punctuation (no Java tokeniser).

    Samples are keyed by their index, so none overwrites another (upstream keys by scene). CIDEr weighs an n-gram by
    its rarity among the references of *this* test set: it is 0 for a single sample, unstable for a few dozen, and
    never comparable between test sets. Values are pycocoevalcap's: CIDEr 0..10, BLEU 0..1; papers print them × 100.

    Args:
        predictions: one caption per sample.
        references: one or more captions per sample.
    """
    return _caption_scores(predictions, references)[0]


def bootstrap(values: np.ndarray, weights: np.ndarray | None = None, rounds: int = 1000, seed: int = 0) -> list[float]:
    """95 % percentile interval of Σ values / Σ weights over samples drawn with replacement (Efron 1979).

    It says how the number would move with other test samples; it does not see other training seeds. If all samples
    agree (0 or all right) it has no width: then read n.

    Args:
        values: one number per sample, [n].
        weights: its denominator, [n]; ones by default.
        rounds: resamples.
        seed: of the draws.
    Returns:
        [low, high]; [0, 0] without samples.
    """
    n = len(values)
    if n == 0:
        return [0.0, 0.0]
    weights = np.ones(n) if weights is None else weights
    rng = np.random.default_rng(seed)
    means = np.empty(rounds)
    for i in range(rounds):
        drawn = np.bincount(rng.integers(0, n, n), minlength=n)
        total = drawn @ weights
        means[i] = drawn @ values / total if total > 0 else 0.0
    low, high = np.percentile(means, (2.5, 97.5))
    return [float(low), float(high)]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for two empty boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _check(record: Mapping[str, Any], index: int) -> None:
    name = f"record {record.get('id', index)!r}"
    benchmark = record.get("benchmark")
    if benchmark not in KEYS:
        raise ValueError(f"{name}: benchmark must be one of {', '.join(KEYS)}, got {benchmark!r}")
    for key in KEYS[benchmark]:
        if record.get(key) is None:
            raise ValueError(f"{name}: key {key!r} is missing; {benchmark} needs {', '.join(KEYS[benchmark])}")
    try:
        _truth(record)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: {KEYS[benchmark][0]!r} is unusable: {error}") from error


def _truth(record: Mapping[str, Any]) -> Any:
    """The ground truth of a record in the form in which it is compared."""
    match record["benchmark"]:
        case "detection":
            return [(str(item["label"]), _box(item["bbox"])) for item in record["object"]]
        case "caption" | "caption3d":
            return _captions(record["sentences"])
        case "vqa":
            return _letter(record["gt_choice"], record["gt_choices"])
        case "vqa3d":
            _captions(record["sentences"])
            for answer in record.get("accepted", ()):
                _member(answer, record["labels"])
            return _member(record["label"], record["labels"])
        case "classification" | "classification3d":
            return _member(record["label"], record["labels"])
        case "smile" if str(record["attr"]) in ("1", "-1"):  # as CelebA stores it
            return _member("yes" if str(record["attr"]) == "1" else "no", record["labels"])
        case _:
            return _member(record["attr"], record["labels"])


def _score_detection(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    predictions = [parse_boxes(record["prediction"], record["labels"]) for record in group]
    references = [_truth(record) for record in group]
    counts = _detection_counts(predictions, references, 0.5)  # [n, 4]
    values = {f"{name}@0.5": value for name, value in detection(predictions, references).items()}
    return {**values, "interval": bootstrap(counts[:, 0], counts[:, 3])}


def _score_caption(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values, each = _caption_scores([r["prediction"] for r in group], [_truth(r) for r in group])
    return {**values, "interval": bootstrap(each)}


def _score_accuracy(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    hits = np.array([_hit(record) for record in group], dtype=float)
    return {"Acc@1": float(hits.mean()), "interval": bootstrap(hits)}


def _score_scene(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values, _ = _caption_scores([r["prediction"] for r in group], [r["sentences"] for r in group])
    return _score_accuracy(group) | values


def _hit(record: Mapping[str, Any]) -> bool:
    if accepted := record.get("accepted"):
        return any(mentions(record["prediction"], [answer]) for answer in accepted)
    return _answer(record) == _truth(record)


def _answer(record: Mapping[str, Any]) -> str | None:
    if record["benchmark"] == "vqa":
        return parse_choice(record["prediction"], record["gt_choices"])
    return parse_label(record["prediction"], record["labels"])


def _detection_counts(predictions: Sequence[Any], references: Sequence[Any], iou: float) -> np.ndarray:
    """Per image: hits, hits of any class, predictions, references, [n, 4]."""
    _same_length(predictions, references)
    counts = np.zeros((len(references), 4))
    for row, predicted, wanted in zip(counts, predictions, references, strict=True):
        row[2:] = len(predicted), len(wanted)
        if not predicted or not wanted:
            continue
        near = np.array([[overlap(p, r) >= iou - 1e-9 for _, r in wanted] for _, p in predicted])
        same = np.array([[a is not None and a.casefold() == b.casefold() for b, _ in wanted] for a, _ in predicted])
        for column, allowed in enumerate((near & same, near)):
            row[column] = allowed[linear_sum_assignment(allowed, maximize=True)].sum()
    return counts


def _caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], np.ndarray]:
    _same_length(predictions, references)
    answers = {i: [_words(text)] for i, text in enumerate(predictions)}
    truths = {i: [_words(text) for text in _captions(texts)] for i, texts in enumerate(references)}
    if not answers:
        return dict.fromkeys(("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), 0.0), np.zeros(0)
    cider, each = Cider().compute_score(truths, answers)
    bleu, _ = Bleu(4).compute_score(truths, answers, verbose=0)
    return {"CIDEr": float(cider), **{f"BLEU-{n}": float(b) for n, b in enumerate(bleu, 1)}}, np.asarray(each)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower()))


def _captions(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not texts or not all(_words(text) for text in texts):
        raise ValueError(f"reference captions must be a list of one or more texts with words, got {texts!r}")
    return texts


def _box(values: Sequence[float]) -> Box:
    x1, y1, x2, y2 = (float(value) for value in values)
    if not (x1 <= x2 and y1 <= y2 and all(map(math.isfinite, (x1, y1, x2, y2)))):
        raise ValueError(f"a box must be x1 <= x2, y1 <= y2 and finite, got {list(values)}")
    return x1, y1, x2, y2


def _member(label: str, labels: Sequence[str]) -> str:
    same = [name for name in labels if name.casefold() == str(label).casefold()]
    if not same:
        raise ValueError(f"{label!r} is not among the labels {list(labels)}")
    return same[0]


def _letter(choice: int | str, choices: Sequence[str]) -> str:
    letters = ascii_uppercase[: len(choices)]
    if isinstance(choice, int) and 0 <= choice < len(letters):
        return letters[choice]
    letter = str(choice).strip("() .").upper()
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"must be an index or a letter of {len(choices)} choices, got {choice!r}")
    return letter


def _same_length(*lists: Sequence[Any]) -> None:
    if len({len(items) for items in lists}) > 1:
        raise ValueError(f"all lists must have one entry per sample, got lengths {[len(items) for items in lists]}")
