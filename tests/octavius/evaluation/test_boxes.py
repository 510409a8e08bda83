"""Recall and precision of boxes against hand-computed cases."""

import contextlib
import io
import time

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from octavius.evaluation import boxes
from octavius.evaluation.scoring import score

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


def row(prediction, *objects, **more):
    truth = [{"label": label, "bbox": list(box)} for label, box in objects]
    return {"benchmark": "mini-detection", "prediction": prediction, "object": truth, "labels": ["cat", "bed"]} | more


def test_both_thresholds_with_and_without_class():
    entry = score(
        [row("A bed at [0, 0, 1, 0.4]. A cat at [0, 0, 1, 1].", ("cat", (0, 0, 1, 1)), ("cat", (0, 0, 1, 0.4)))]
    )
    entry = entry["mini-detection"]
    assert entry["recall@0.5"] == 0.5 and entry["recall_any_class@0.5"] == 1
    near = score([row("A cat at [0, 0, 1, 0.3].", ("cat", (0, 0, 1, 1)))])["mini-detection"]
    assert near["recall@0.25"] == near["precision@0.25"] == 1 and near["recall@0.5"] == 0
    assert set(near["intervals"]) == {name for name in near if "@" in name}


def test_stated_rules_for_odd_answers():
    reference = ("cat", (0.0, 0.0, 1.0, 1.0))
    entry = score([row("", reference), row("There is no object.", reference), row("gibberish", reference)])
    assert entry["mini-detection"]["unparsable"] == 2 and entry["mini-detection"]["recall@0.5"] == 0
    over = score([row("A cat at [-1, -1, 1, 1].", reference)])["mini-detection"]  # counts as it was said
    assert over["recall@0.25"] == 1 and over["recall@0.5"] == 0
    nothing = score([row("A cat at [0, 0, 1, 1].")])["mini-detection"]  # no reference box
    assert nothing["recall@0.5"] == 0 and nothing["precision@0.5"] == 0
    with pytest.raises(ValueError, match=r"record 'p7': 'object' is unusable: .*are these pixels"):
        score([row("", ("cat", (10, 20, 300, 400)), id="p7")])


def test_ten_thousand_boxes_in_one_answer_and_ten_thousand_answers():
    many = " ".join(f"A cat at [0.{i:04d}, 0.1, 0.9999, 0.9]." for i in range(10_000))
    start = time.process_time()
    entry = score([row(many, ("cat", (0.5, 0.1, 1, 0.9)))])["mini-detection"]
    assert entry["recall@0.5"] == 1 and entry["precision@0.5"] == pytest.approx(1e-4)
    rows = [row("A cat at [0.1, 0.1, 0.5, 0.5]. A bed at [0.2, 0.2, 0.9, 0.9].", ("cat", (0.1, 0.1, 0.5, 0.5)))]
    assert score(rows * 10_000)["mini-detection"]["n"] == 10_000
    print(f"{time.process_time() - start:.1f} s of CPU")


def test_average_precision_is_pycocotools_own():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.6, (40, 2))
    references = [[(("cat", "bed")[i % 2], (*corner, *(corner + 0.3)))] for i, corner in enumerate(corners)]
    predictions = [
        [(label, tuple(np.array(box) + rng.normal(0, 0.03, 4)), float(rng.uniform())), ("cat", (0, 0, 0.2, 0.2), 0.5)]
        for ((label, box),) in references
    ]
    values, intervals = boxes.average_precision(predictions, references)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        corner = [(1000 * np.array(box)).tolist() for ((_, box),) in references]
        coco.dataset = {"images": [{"id": i} for i in range(40)], "categories": [{"id": 1}, {"id": 2}]}
        coco.dataset["annotations"] = [
            {"id": i + 1, "image_id": i, "category_id": 2 - i % 2, "iscrowd": 0, "area": 9e4}
            | {"bbox": [x, y, u - x, v - y]}
            for i, (x, y, u, v) in enumerate(corner)
        ]
        coco.createIndex()
        said = [
            {"image_id": i, "category_id": {"bed": 1, "cat": 2}[label], "score": sure}
            | {"bbox": [1000 * b[0], 1000 * b[1], 1000 * (b[2] - b[0]), 1000 * (b[3] - b[1])]}
            for i, rows in enumerate(predictions)
            for label, b, sure in rows
        ]
        judge = COCOeval(coco, coco.loadRes(said), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert values["mAP"] == pytest.approx(judge.stats[0]) and values["mAP@0.5"] == pytest.approx(judge.stats[1])
    assert 0.1 < values["mAP"] < values["mAP@0.5"] < 1
    for name, (low, high) in intervals.items():
        assert low < values[name] < high


def test_confidences_in_the_answer_give_map():
    entry = score([row("A cat at [0, 0, 1, 1, 0.9].", ("cat", (0, 0, 1, 1)))] * 3)["mini-detection"]
    assert entry["mAP"] == pytest.approx(1) and entry["recall@0.5"] == 1
    mixed = score([row("A cat at [0, 0, 1, 1, 0.9]. A bed at [0, 0, 1, 1].", ("cat", (0, 0, 1, 1)))])
    assert "mAP" not in mixed["mini-detection"]
