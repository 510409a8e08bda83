"""Recall and precision of boxes against hand-computed cases."""

import pytest

from octavius.evaluation import boxes

A, B = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 0.9)


def test_overlap_hand_computed():
    assert boxes.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.overlap((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert boxes.overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert boxes.overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_detection_hand_computed():
    predictions = [[("cat", A), ("bird", B), ("cat", (0.0, 0.0, 0.05, 0.05))], [], [(None, A)]]
    references = [[("Cat", A), ("bed", B)], [("cat", A)], [("cat", A)]]
    expected = {"recall": 1 / 4, "precision": 1 / 4, "recall_any_class": 3 / 4, "precision_any_class": 3 / 4}
    assert boxes.detection(predictions, references) == pytest.approx(expected)


def test_detection_matching_is_optimal():
    # the first prediction overlaps both references and prefers the left one, the second overlaps only the left
    references = [[("cat", (0.0, 0.0, 1.0, 1.0)), ("cat", (0.6, 0.0, 1.6, 1.0))]]
    predictions = [[("cat", (0.25, 0.0, 1.25, 1.0)), ("cat", (-0.2, 0.0, 0.8, 1.0))]]
    first = [boxes.overlap(predictions[0][0][1], box) for _, box in references[0]]
    assert first[0] > first[1] > 0.45 and boxes.overlap(predictions[0][1][1], references[0][1][1]) < 0.45
    assert boxes.detection(predictions, references, iou=0.45)["recall"] == 1


def test_detection_counts_one_box_once():
    result = boxes.detection([[("cat", A)] * 3], [[("cat", A)]])
    assert result["recall"] == 1 and result["precision"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("images", [0, 2])
def test_detection_without_predictions(images):
    result = boxes.detection([[]] * images, [[("cat", A)]] * images)
    assert set(result.values()) == {0.0}
