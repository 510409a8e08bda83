"""The released code's figures: its faults, each shown where it differs from ours."""

import pytest

from octavius.evaluation.scoring import score
from octavius.evaluation.upstream import upstream_boxes

LABELS = ["cat", "dog"]


def scored(rows, metric, **truth):
    return score([{"benchmark": "set", "metric": metric, **truth, **row} for row in rows], upstream=True)["set"]


def test_right_word_counts_beside_wrong_ones():
    rows = [{"prediction": "a cat or a dog", "label": "cat"}, {"prediction": "a dog", "label": "cat"}]
    entry = scored(rows, "classification", labels=LABELS)
    assert entry["upstream Acc@1"] == 0.5 and entry["Acc@1"] == 0


def test_smile_without_no_is_yes():
    rows = [{"prediction": "Colourless green ideas", "attr": "1"}, {"prediction": "No smile", "attr": "-1"}]
    entry = scored(rows, "attribute", labels=["yes", "no"])
    assert entry["upstream Acc@1"] == 1 and entry["Acc@1"] == 0.5 and entry["unparsable"] == 1


def test_only_the_last_sample_of_a_scene_is_captioned():
    rows = [{"prediction": "a red cat", "sentences": ["a dog"]}, {"prediction": "a dog", "sentences": ["a dog"]}]
    entry = scored(rows, "caption", scene_id="scene0000_00")
    assert entry["upstream BLEU-1"] == pytest.approx(1) and entry["BLEU-1"] == pytest.approx(3 / 5)


def test_label_is_not_lower_cased():
    rows = [{"prediction": "A Cat.", "label": "Cat"}]
    entry = scored(rows, "classification", labels=["Cat", "Dog"], scene_id="s")
    assert entry["upstream Acc@1"] == 0 and entry["Acc@1"] == 1


def test_choice_of_one_present_text_must_be_the_right_one():
    rows = [{"prediction": "(A) no, (B)", "gt_choice": 1}, {"prediction": "surely two", "gt_choice": 1}]
    assert scored(rows, "choice", gt_choices=["one", "two"])["upstream Acc@1"] == 0.5


BOXES = {
    "first box of a sentence": ("The cat object at [0, 0, 1, 1] and [0, 0, .5, .5]", [("cat", (0, 0, 1, 1))]),
    "last phrase": ("[0, 0, 1, 1] belongs to the category of cat, its category is dog", [("dog", (0, 0, 1, 1))]),
    "no class": ("[0, 0, 1, 1]. [0.5, 0, 0.2, 1]", [(None, (0, 0, 1, 1))]),
    "our own form has no phrase": ("A cat at [0, 0, 1, 1].", [(None, (0, 0, 1, 1))]),
    "no number": ("[1.2.3, 0, 1, 1]", []),
}


@pytest.mark.parametrize(("text", "boxes"), BOXES.values(), ids=BOXES)
def test_boxes_are_read_as_the_release_does(text, boxes):
    assert upstream_boxes(text, LABELS) == boxes


def test_detection_has_both_figures():
    truth = {"object": [{"label": "cat", "bbox": [0, 0, 1, 1]}], "labels": LABELS}
    entry = scored([{"prediction": "A cat at [0, 0, 1, 1]."}], "detection", **truth)
    assert (
        entry["recall@0.5"] == 1 and entry["upstream recall@0.5"] == 0 and entry["upstream recall_any_class@0.5"] == 1
    )
