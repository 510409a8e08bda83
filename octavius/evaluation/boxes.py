"""Recall and precision of boxes, and COCO's mAP where boxes have confidences.

    recall = Σ_p hits_p / Σ_p references_p        precision = Σ_p hits_p / Σ_p predictions_p       p an image

where hits_p is the largest one-to-one matching of pairs whose IoU reaches the threshold (and, with classes, whose
labels agree). A box counts as it was said: coordinates outside 0..1 are neither cut nor dropped.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from octavius.evaluation.intervals import bootstrap, ratio
from octavius.evaluation.parsing import Box

Predicted = Sequence[tuple[str | None, Box]]  # of one image, as `parse_boxes` returns them
Reference = Sequence[tuple[str, Box]]
THRESHOLDS = (0.5, 0.25)
SCALE = 1000.0  # pycocotools thinks in pixels
AP_ROUNDS, AP_WORK = 200, 100_000  # resamples of mAP, and images in all of them
RATES = {"recall": (0, 3), "precision": (0, 2), "recall_any_class": (1, 3), "precision_any_class": (1, 2)}


def detection(predictions: Sequence[Predicted], references: Sequence[Reference], iou: float = 0.5) -> dict[str, float]:
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
    sums = detection_counts(predictions, references, iou).sum(axis=0)[None]  # [1, 4]
    return {name: float(ratio(sums[:, over], sums[:, under])[0]) for name, (over, under) in RATES.items()}


def detection_scores(
    predictions: Sequence[Predicted], references: Sequence[Reference]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The rates at every threshold, and their bootstrap intervals over images."""
    values, intervals = {}, {}
    for iou in THRESHOLDS:
        counts = detection_counts(predictions, references, iou)
        values |= {f"{name}@{iou}": value for name, value in detection(predictions, references, iou).items()}
        for name, (over, under) in RATES.items():
            intervals[f"{name}@{iou}"] = bootstrap(counts[:, over], counts[:, under])
    return values, intervals


def average_precision(
    predictions: Sequence[Sequence[tuple[str | None, Box, float]]], references: Sequence[Reference]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """COCO's mAP over IoU 0.5 to 0.95 and at 0.5, by pycocotools, with bootstrap intervals over images.

    A class counts if some reference has it. Boxes are in fractions of the image, so size ranges are not reported.

    Args:
        predictions: per image (label, box, confidence).
        references: per image (label, box).
    """
    names = {name: index for index, name in enumerate(sorted({_folded(r[0]) for rows in references for r in rows}), 1)}
    truth = [
        {"id": number, "image_id": image, "category_id": names[_folded(label)], "bbox": _corner_size(box), "iscrowd": 0}
        | {"area": 1.0}
        for number, (image, label, box) in enumerate(
            ((image, label, box) for image, rows in enumerate(references) for label, box in rows), 1
        )
    ]
    said = [
        {"image_id": image, "category_id": names[_folded(label)], "bbox": _corner_size(box), "score": score}
        for image, rows in enumerate(predictions)
        for label, box, score in rows
        if _folded(label) in names
    ]
    keys = ("mAP", "mAP@0.5")
    if not truth or not said:
        return dict.fromkeys(keys, 0.0), {key: [0.0, 0.0] for key in keys}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        coco: Any = COCO()
        coco.dataset = {"images": [{"id": image} for image in range(len(references))], "annotations": truth}
        coco.dataset["categories"] = [{"id": index, "name": name} for name, index in names.items()]
        coco.createIndex()
        scorer: Any = COCOeval(coco, coco.loadRes(said), "bbox")
        scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
        scorer.params.maxDets = [100]
        scorer.evaluate()
        values = _average(scorer)
        table = np.array(scorer.evalImgs, dtype=object).reshape(len(names), len(references))  # [classes, images]
        rng, draws = np.random.default_rng(0), []
        for _ in range(min(AP_ROUNDS, max(20, AP_WORK // len(references)))):
            scorer.evalImgs = table[:, rng.integers(0, len(references), len(references))].ravel().tolist()
            draws.append(_average(scorer))
    low, high = np.percentile(np.array(draws), (2.5, 97.5), axis=0)
    return dict(zip(keys, values, strict=True)), {
        key: [float(a), float(b)] for key, a, b in zip(keys, low, high, strict=True)
    }


def _average(scorer: Any) -> tuple[float, float]:
    scorer.accumulate()
    precision = scorer.eval["precision"]  # [thresholds, recalls, classes, 1, 1]; -1 for a class without reference
    whole, half = precision[precision > -1], precision[0][precision[0] > -1]
    return float(whole.mean()) if whole.size else 0.0, float(half.mean()) if half.size else 0.0


def _corner_size(box: Box) -> list[float]:
    x1, y1, x2, y2 = (SCALE * value for value in box)
    return [x1, y1, x2 - x1, y2 - y1]


def detection_counts(predictions: Sequence[Predicted], references: Sequence[Reference], iou: float) -> np.ndarray:
    """Per image: hits, hits of any class, predictions, references, [n, 4]."""
    if len(predictions) != len(references):
        raise ValueError(f"all lists must have one entry per sample, got {[len(predictions), len(references)]}")
    counts = np.zeros((len(references), 4))
    for row, predicted, expected in zip(counts, predictions, references, strict=True):
        row[2:] = len(predicted), len(expected)
        if not predicted or not expected:
            continue
        near = overlaps([box for _, box in predicted], [box for _, box in expected]) >= iou - 1e-9
        same = np.equal.outer(*(np.array([_folded(label) for label, _ in items]) for items in (predicted, expected)))
        same &= np.array([label is not None for label, _ in predicted])[:, None]
        for column, allowed in enumerate((near & same, near)):
            row[column] = allowed[linear_sum_assignment(allowed, maximize=True)].sum() if allowed.any() else 0
    return counts


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for two empty boxes."""
    return float(overlaps([a], [b])[0, 0])


def overlaps(first: Sequence[Box], second: Sequence[Box]) -> np.ndarray:
    """Intersection over union of every pair, [n, m]; 0 for two empty boxes."""
    a, b = np.asarray(first, float)[:, None], np.asarray(second, float)[None]  # [n, 1, 4], [1, m, 4]
    size = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(min=0)
    shared = size.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _folded(label: str | None) -> str:
    return "" if label is None else label.casefold()
