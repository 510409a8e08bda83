"""Recall and precision of boxes.

    recall = Σ_p hits_p / Σ_p references_p        precision = Σ_p hits_p / Σ_p predictions_p       p an image

where hits_p is the largest one-to-one matching of pairs whose IoU reaches the threshold (and, with classes, whose
labels agree). A box counts as it was said: coordinates outside 0..1 are neither cut nor dropped.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from octavius.evaluation.intervals import bootstrap, ratio
from octavius.evaluation.parsing import Box

Predicted = Sequence[tuple[str | None, Box]]  # of one image, as `parse_boxes` returns them
Reference = Sequence[tuple[str, Box]]
THRESHOLDS = (0.5, 0.25)
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
