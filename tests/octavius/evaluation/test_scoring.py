"""Scores of answered records: their form, their values, and what is refused."""

import pytest

from octavius.evaluation import captions, metrics, scoring
from octavius.evaluation.benchmarks import BENCHMARKS

LABELS = ["bird", "polar bear", "bear", "cherry", "knife", "mouse", "cat", "bed", "St. Bernard", "glass", "glasses"]
A, B = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 0.9)
AT, BT = "[0.1, 0.2, 0.3, 0.4]", "[0.5, 0.5, 1.0, 0.9]"

ANIMALS = ["copepod", "black crappie", "(C) bacteria"]
CAPTIONS = ["a black cat sits on the bed", "two birds in a tree", "", "the red apple"]
REFERENCES = [["a black cat sits on a bed", "a cat"], ["two birds"], ["a green tree stands here"], ["an apple", "red"]]


def test_accuracy_hand_computed():
    answers = ["A cat.", "a cat and a bed", "nothing", "beds"]
    assert metrics.accuracy(answers, ["cat", "cat", "cat", "Bed"], [["cat", "bed"]] * 4) == {"Acc@1": 0.5}
    with pytest.raises(ValueError, match="one entry per sample"):
        metrics.accuracy(answers, ["cat"], [["cat"]])


CAT = {"label": "cat", "bbox": list(A)}
RECORDS = [
    {"benchmark": "mini-detection", "prediction": f"A cat at {AT}. A bed at {BT}.", "object": [CAT], "labels": LABELS},
    {"benchmark": "mini-detection", "prediction": "There is no object.", "object": [CAT, CAT], "labels": LABELS},
    {"benchmark": "mini-caption", "prediction": CAPTIONS[0], "sentences": REFERENCES[0]},
    {"benchmark": "mini-caption", "prediction": CAPTIONS[1], "sentences": REFERENCES[1]},
    {"benchmark": "mini-classification", "prediction": "It is a cat.", "label": "Cat", "labels": LABELS},
    {"benchmark": "mini-vqa", "prediction": "the answer is (B)", "gt_choice": 1, "gt_choices": ANIMALS},
    {"benchmark": "mini-vqa", "prediction": "copepod", "gt_choice": "(B)", "gt_choices": ANIMALS},
    {"benchmark": "mini-hair", "prediction": "Black hair", "attr": "brown", "labels": ["brown", "black"]},
    {"benchmark": "mini-smile", "prediction": "Yes, a smile.", "attr": "1", "labels": ["yes", "no"]},
    {"benchmark": "mini-smile", "prediction": "", "attr": "no", "labels": ["yes", "no"]},
]
NAMES = ["chair", "table"]
SCENES: list[dict] = [
    {"benchmark": "mini-classification3d", "prediction": "a chair", "label": "chair", "labels": NAMES},
    {"benchmark": "mini-caption3d", "prediction": CAPTIONS[0], "sentences": REFERENCES[0]},
    {"benchmark": "mini-caption3d", "prediction": CAPTIONS[1], "sentences": REFERENCES[1]},
    {
        "benchmark": "mini-vqa3d",
        "prediction": "A red chair.",
        "label": "chair",
        "labels": NAMES,
        "sentences": ["A red chair."],
    },
    {
        "benchmark": "mini-vqa3d",
        "prediction": "A chair.",
        "label": "table",
        "labels": NAMES,
        "sentences": ["A white table."],
    },
    {
        "benchmark": "mini-vqa3d",
        "prediction": "A chair or table.",
        "label": "table",
        "labels": NAMES,
        "sentences": ["A table."],
    },
]


def test_score_form_and_values():
    result = scoring.score(RECORDS)
    assert {name: entry["n"] for name, entry in result.items()} == {
        **{"mini-detection": 2, "mini-caption": 2, "mini-classification": 1},
        **{"mini-vqa": 2, "mini-hair": 1, "mini-smile": 2},
    }
    for name, entry in result.items():
        assert entry["title"] == BENCHMARKS[name].title and entry["main"] == BENCHMARKS[name].metric.main
        for value, (low, high) in entry["intervals"].items():
            assert low <= entry[value] <= high, value
    assert result["mini-detection"]["recall@0.5"] == pytest.approx(1 / 3)
    assert result["mini-detection"]["precision_any_class@0.5"] == 0.5
    assert [result[name]["Acc@1"] for name in ("mini-classification", "mini-vqa", "mini-hair", "mini-smile")] == [
        1,
        0.5,
        0,
        0.5,
    ]
    assert result["mini-caption"]["CIDEr"] == captions.caption(CAPTIONS[:2], REFERENCES[:2])["CIDEr"]
    assert scoring.score([]) == {}


def test_score_of_scenes_is_accuracy_and_caption_metrics():
    result = scoring.score(SCENES)
    assert result["mini-classification3d"]["Acc@1"] == 1
    assert result["mini-caption3d"]["CIDEr"] == captions.caption(CAPTIONS[:2], REFERENCES[:2])["CIDEr"]
    answers = [record for record in SCENES if record["benchmark"] == "mini-vqa3d"]
    said = captions.caption([r["prediction"] for r in answers], [r["sentences"] for r in answers])
    vqa = result["mini-vqa3d"]
    assert vqa["main"] == "Acc@1" and vqa["Acc@1"] == pytest.approx(1 / 3)  # both names at once are no answer
    assert {name: vqa[name] for name in said} == said


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("A lamp.", 1), ("It is a red lamp.", 1), ("Two desk lights", 1), ("A lamp or light", 1), ("A bed.", 0), ("", 0)],
)
def test_any_accepted_answer_is_right(prediction, hit):
    answers = ["lamp", "red lamp", "desk light"]
    truth = {"label": "lamp", "labels": answers, "accepted": answers, "sentences": answers}
    result = scoring.score([{"benchmark": "mini-vqa3d", "prediction": prediction, **truth}])
    assert result["mini-vqa3d"]["Acc@1"] == hit
    with pytest.raises(ValueError, match="'bed' is not among"):
        scoring.score([{"benchmark": "mini-vqa3d", "prediction": "", **truth, "accepted": ["bed"]}])


@pytest.mark.parametrize("benchmark", [name for name in BENCHMARKS if name.startswith("mini-")])
def test_score_missing_key_names_record_and_key(benchmark):
    record = next(r for r in RECORDS + SCENES if r["benchmark"] == benchmark)
    for key in ("prediction", *BENCHMARKS[benchmark].metric.keys):
        with pytest.raises(ValueError, match=rf"'r17'.*'{key}' is missing"):
            scoring.score([{**{k: v for k, v in record.items() if k != key}, "id": "r17"}])


UNUSABLE = {
    "benchmark": ({**RECORDS[4], "benchmark": "counting"}, "record 0: benchmark must be one of"),
    "label not listed": ({**RECORDS[4], "label": "cow"}, "record 0: 'label'.*'cow' is not among"),
    "bad box": ({**RECORDS[0], "object": [{"label": "cat", "bbox": [1, 0, 0, 1]}]}, "record 0: 'object'.*x1 <= x2"),
    "box without label": ({**RECORDS[0], "object": [{"bbox": [0, 0, 1, 1]}]}, "record 0: 'object'.*label"),
    "sentence, not sentences": ({**RECORDS[2], "sentences": "a cat"}, "record 0: 'sentences'"),
    "choice out of range": ({**RECORDS[5], "gt_choice": 3}, "record 0: 'gt_choice'.*3 choices"),
}


@pytest.mark.parametrize(("record", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_score_unusable_truth_is_an_error(record, message):
    with pytest.raises(ValueError, match=message):
        scoring.score([record])
    unanswered = {key: value for key, value in record.items() if key != "prediction"}
    with pytest.raises(ValueError, match=message):
        scoring.check([RECORDS[2], unanswered | {"id": 0}])
