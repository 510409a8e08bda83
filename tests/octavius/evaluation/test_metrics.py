"""Parsers and metrics against hand-computed cases and against pycocoevalcap called directly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from octavius.evaluation import metrics

LABELS = ["bird", "polar bear", "bear", "cherry", "knife", "mouse", "cat", "bed", "St. Bernard", "glass", "glasses"]
A, B = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 0.9)
AT, BT = "[0.1, 0.2, 0.3, 0.4]", "[0.5, 0.5, 1.0, 0.9]"

BOX_CASES = {
    "own form": (f"A bird at {AT}. A cat at {BT}.", [("bird", A), ("cat", B)]),
    "no space after the stop": (f"A bird at {AT}.A cat at {BT}.", [("bird", A), ("cat", B)]),
    "upstream, box first": (f"Positioned at {AT} is an object belonging to the cat category, on a bed.", [("cat", A)]),
    "upstream, two box-first": (
        f"At {AT} there is a bed. At the {BT} position lies a **Cat**.",
        [("bed", A), ("cat", B)],
    ),
    "box first in one sentence": (f"At {AT} a bed and at {BT} a cat", [("bed", A), ("cat", B)]),
    "one label, two boxes": (f"Two birds at {AT} and {BT}, a cat elsewhere.", [("bird", A), ("bird", B)]),
    "boxes before their label": (f"{AT} and {BT} are cherries.", [("cherry", A), ("cherry", B)]),
    "longest name": (f"A polar bear at {AT} and a bear at {BT}.", [("polar bear", A), ("bear", B)]),
    "underscore": (f"a polar_bear: {AT}", [("polar bear", A)]),
    "stop within a label": (f"A St. Bernard at {AT}.", [("St. Bernard", A)]),
    "plurals": (f"Knives at {AT}. Mice at {BT}.", [("knife", A), ("mouse", B)]),
    "exact before plural": (f"Glasses at {AT}. A glass at {BT}.", [("glasses", A), ("glass", B)]),
    "whole words only": (f"A catalogue at {AT}.", [(None, A)]),
    "label of another sentence": (f"A cat. Something at {AT}.", [(None, A)]),
    "round brackets, semicolons, signs": ("cat (-.1; +0.2; 3e-1; 1)", [("cat", (-0.1, 0.2, 0.3, 1.0))]),
    "turned round": ("A cat at [0.5, 0.2, 0.3, 0.4].", []),
    "three numbers": ("A cat at [0.5, 0.2, 0.3].", []),
    "not finite": ("A cat at [0, 0, nan, 1] or [0, 0, 1e999, 1].", []),
    "cut off": (f"A cat at {AT}. A bird at [0.5, 0.5, 1.0, 0.", [("cat", A)]),
    "empty": ("", []),
}


@pytest.mark.parametrize(("text", "expected"), BOX_CASES.values(), ids=BOX_CASES)
def test_parse_boxes_case(text, expected):
    assert metrics.parse_boxes(text, LABELS) == expected


LABEL_CASES = {
    "named": ("This is a cat.", "cat"),
    "twice the same": ("Cat, yes: two cats", "cat"),
    "none": ("A category of its own", None),
    "several": ("a cat or a bed", None),
    "longest only": ("a Polar Bear", "polar bear"),
    "empty": ("", None),
}


@pytest.mark.parametrize(("text", "expected"), LABEL_CASES.values(), ids=LABEL_CASES)
def test_parse_label_case(text, expected):
    assert metrics.parse_label(text, LABELS) == expected


ANIMALS = ["copepod", "black crappie", "(C) bacteria"]
CHOICE_CASES = {
    "the answer is": ("(A) is wrong, so the answer is (B).", ANIMALS, "B"),
    "last conclusion": ("The answer is (A)? No, the correct answer is (c)", ANIMALS, "C"),
    "bare after is": ("The answer is B.", ANIMALS, "B"),
    "an article is no letter": ("the answer is a copepod or A bacteria", ["x", "y"], None),
    "ANSWER": ("Reasoning (C).\nANSWER: B", ANIMALS, "B"),
    "only a letter": (" B. ", ANIMALS, "B"),
    "only a bracketed letter": ("It must be (B) then", ANIMALS, "B"),
    "two letters, one text": ("Not (A), not (B): bacteria", ANIMALS, "C"),
    "text": ("It can be concluded that Black  crappie is it", ANIMALS, "B"),
    "two texts": ("copepod, bacteria", ANIMALS, None),
    "beyond the choices": ("the answer is (D)", ANIMALS, None),
    "signed numbers": ("It is -5 degrees", ["5", "-5"], "B"),
    "decimals": ("3.5", ["3", "3.5"], "B"),
    "same text twice": ("cat", ["cat", "cat"], None),
    "empty": ("", ANIMALS, None),
}


@pytest.mark.parametrize(("text", "choices", "expected"), CHOICE_CASES.values(), ids=CHOICE_CASES)
def test_parse_choice_case(text, choices, expected):
    assert metrics.parse_choice(text, choices) == expected


PIECES = st.one_of(
    st.text(), st.sampled_from(["[", "]", "0.5", ",", " ", "nan", "bird", "(A)", "answer is", ".", "\0"])
)


@given(st.lists(PIECES).map("".join), st.lists(st.text(), max_size=5))
def test_parsers_never_raise(text, names):
    for _, box in metrics.parse_boxes(text, [*LABELS, *names]):
        assert all(map(math.isfinite, box)) and box[0] <= box[2] and box[1] <= box[3]
    assert metrics.parse_label(text, names) in [*names, None]
    assert metrics.parse_choice(text, names) in [*"ABCDE"[: len(names)], None]


@given(st.lists(st.tuples(*[st.integers(0, 100)] * 4), max_size=5))
def test_parse_boxes_reads_what_was_written(corners):
    boxes = [(min(a, c) / 100, min(b, d) / 100, max(a, c) / 100, max(b, d) / 100) for a, b, c, d in corners]
    text = " ".join(f"A bird at [{', '.join(f'{v:.2f}' for v in box)}]." for box in boxes)
    assert metrics.parse_boxes(text, LABELS) == [("bird", box) for box in boxes]


def test_overlap_hand_computed():
    assert metrics.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert metrics.overlap((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert metrics.overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert metrics.overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_detection_hand_computed():
    predictions = [[("cat", A), ("bird", B), ("cat", (0.0, 0.0, 0.05, 0.05))], [], [(None, A)]]
    references = [[("Cat", A), ("bed", B)], [("cat", A)], [("cat", A)]]
    expected = {"recall": 1 / 4, "precision": 1 / 4, "recall_any_class": 3 / 4, "precision_any_class": 3 / 4}
    assert metrics.detection(predictions, references) == pytest.approx(expected)


def test_detection_matching_is_optimal():
    # the first prediction overlaps both references and prefers the left one, the second overlaps only the left
    references = [[("cat", (0.0, 0.0, 1.0, 1.0)), ("cat", (0.6, 0.0, 1.6, 1.0))]]
    predictions = [[("cat", (0.25, 0.0, 1.25, 1.0)), ("cat", (-0.2, 0.0, 0.8, 1.0))]]
    first = [metrics.overlap(predictions[0][0][1], box) for _, box in references[0]]
    assert first[0] > first[1] > 0.45 and metrics.overlap(predictions[0][1][1], references[0][1][1]) < 0.45
    assert metrics.detection(predictions, references, iou=0.45)["recall"] == 1


def test_detection_counts_one_box_once():
    result = metrics.detection([[("cat", A)] * 3], [[("cat", A)]])
    assert result["recall"] == 1 and result["precision"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("images", [0, 2])
def test_detection_without_predictions(images):
    result = metrics.detection([[]] * images, [[("cat", A)]] * images)
    assert set(result.values()) == {0.0}


def test_accuracy_hand_computed():
    answers = ["A cat.", "a cat and a bed", "nothing", "beds"]
    assert metrics.accuracy(answers, ["cat", "cat", "cat", "Bed"], [["cat", "bed"]] * 4) == {"Acc@1": 0.5}
    with pytest.raises(ValueError, match="one entry per sample"):
        metrics.accuracy(answers, ["cat"], [["cat"]])


CAPTIONS = ["a black cat sits on the bed", "two birds in a tree", "", "the red apple"]
REFERENCES = [["a black cat sits on a bed", "a cat"], ["two birds"], ["a green tree stands here"], ["an apple", "red"]]


def test_caption_equals_pycocoevalcap(capsys):
    truths, answers = dict(enumerate(REFERENCES)), {i: [text] for i, text in enumerate(CAPTIONS)}
    bleu = Bleu(4).compute_score(truths, answers, verbose=0)[0]
    result = metrics.caption([f"{c.upper()}!" for c in CAPTIONS], REFERENCES)
    assert result == {
        "CIDEr": Cider().compute_score(truths, answers)[0],
        **{f"BLEU-{i + 1}": bleu[i] for i in range(4)},
    }
    assert result["CIDEr"] > 0.5 and result["BLEU-1"] > result["BLEU-4"] > 0
    assert capsys.readouterr().out == ""


def test_caption_small_sets():
    assert metrics.caption([], [])["CIDEr"] == 0
    alone = metrics.caption(["a cat"], [["A cat!"]])
    assert alone["CIDEr"] == 0 and alone["BLEU-1"] == pytest.approx(1)
    with pytest.raises(ValueError, match="reference captions"):
        metrics.caption(["a cat"], [["..."]])


def test_caption_same_scene_is_scored_twice():
    both = metrics.caption(["a cat", "a cat"], [["a cat"], ["a dog"]])
    assert both["BLEU-1"] == pytest.approx(3 / 4)


def test_bootstrap_covers_the_mean_and_repeats():
    values = np.array([0.0, 1.0] * 50)
    low, high = metrics.bootstrap(values)
    assert metrics.bootstrap(values) == [low, high]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert metrics.bootstrap(np.zeros(0)) == [0, 0]
    assert metrics.bootstrap(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == [0, 1]


CAT = {"label": "cat", "bbox": list(A)}
RECORDS = [
    {"benchmark": "detection", "prediction": f"A cat at {AT}. A bed at {BT}.", "object": [CAT], "labels": LABELS},
    {"benchmark": "detection", "prediction": "There is no object.", "object": [CAT, CAT], "labels": LABELS},
    {"benchmark": "caption", "prediction": CAPTIONS[0], "sentences": REFERENCES[0]},
    {"benchmark": "caption", "prediction": CAPTIONS[1], "sentences": REFERENCES[1]},
    {"benchmark": "classification", "prediction": "It is a cat.", "label": "Cat", "labels": LABELS},
    {"benchmark": "vqa", "prediction": "the answer is (B)", "gt_choice": 1, "gt_choices": ANIMALS},
    {"benchmark": "vqa", "prediction": "copepod", "gt_choice": "(B)", "gt_choices": ANIMALS},
    {"benchmark": "hair", "prediction": "Black hair", "attr": "brown", "labels": ["brown", "black"]},
    {"benchmark": "smile", "prediction": "Yes, a smile.", "attr": "1", "labels": ["yes", "no"]},
    {"benchmark": "smile", "prediction": "", "attr": "no", "labels": ["yes", "no"]},
]
NAMES = ["chair", "table"]
SCENES: list[dict] = [
    {"benchmark": "classification3d", "prediction": "a chair", "label": "chair", "labels": NAMES},
    {"benchmark": "caption3d", "prediction": CAPTIONS[0], "sentences": REFERENCES[0]},
    {"benchmark": "caption3d", "prediction": CAPTIONS[1], "sentences": REFERENCES[1]},
    {
        "benchmark": "vqa3d",
        "prediction": "A red chair.",
        "label": "chair",
        "labels": NAMES,
        "sentences": ["A red chair."],
    },
    {
        "benchmark": "vqa3d",
        "prediction": "A chair.",
        "label": "table",
        "labels": NAMES,
        "sentences": ["A white table."],
    },
    {
        "benchmark": "vqa3d",
        "prediction": "A chair or table.",
        "label": "table",
        "labels": NAMES,
        "sentences": ["A table."],
    },
]


def test_score_form_and_values():
    result = metrics.score(RECORDS)
    assert {name: entry["n"] for name, entry in result.items()} == {
        **{"detection": 2, "caption": 2, "classification": 1},
        **{"vqa": 2, "hair": 1, "smile": 2},
    }
    for name, entry in result.items():
        assert entry["main"] == metrics.MAIN[name] and entry["main"] in entry
        low, high = entry["interval"]
        assert low <= entry[entry["main"]] <= high
    assert result["detection"]["recall@0.5"] == pytest.approx(1 / 3)
    assert result["detection"]["precision_any_class@0.5"] == 0.5
    assert [result[name]["Acc@1"] for name in ("classification", "vqa", "hair", "smile")] == [1, 0.5, 0, 0.5]
    assert result["caption"]["CIDEr"] == metrics.caption(CAPTIONS[:2], REFERENCES[:2])["CIDEr"]
    assert metrics.score([]) == {}


def test_score_of_scenes_is_accuracy_and_caption_metrics():
    result = metrics.score(SCENES)
    assert result["classification3d"]["Acc@1"] == 1
    assert result["caption3d"]["CIDEr"] == metrics.caption(CAPTIONS[:2], REFERENCES[:2])["CIDEr"]
    answers = [record for record in SCENES if record["benchmark"] == "vqa3d"]
    said = metrics.caption([r["prediction"] for r in answers], [r["sentences"] for r in answers])
    vqa = result["vqa3d"]
    assert vqa["main"] == "Acc@1" and vqa["Acc@1"] == pytest.approx(1 / 3)  # both names at once are no answer
    assert {name: vqa[name] for name in said} == said


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("A lamp.", 1), ("It is a red lamp.", 1), ("Two desk lights", 1), ("A lamp or light", 1), ("A bed.", 0), ("", 0)],
)
def test_any_accepted_answer_is_right(prediction, hit):
    answers = ["lamp", "red lamp", "desk light"]
    truth = {"label": "lamp", "labels": answers, "accepted": answers, "sentences": answers}
    result = metrics.score([{"benchmark": "vqa3d", "prediction": prediction, **truth}])
    assert result["vqa3d"]["Acc@1"] == hit
    with pytest.raises(ValueError, match="'bed' is not among"):
        metrics.score([{"benchmark": "vqa3d", "prediction": "", **truth, "accepted": ["bed"]}])


@pytest.mark.parametrize("benchmark", metrics.KEYS)
def test_score_missing_key_names_record_and_key(benchmark):
    record = next(r for r in RECORDS + SCENES if r["benchmark"] == benchmark)
    for key in ("prediction", *metrics.KEYS[benchmark]):
        with pytest.raises(ValueError, match=rf"'r17'.*'{key}' is missing"):
            metrics.score([{**{k: v for k, v in record.items() if k != key}, "id": "r17"}])


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
        metrics.score([record])
    unanswered = {key: value for key, value in record.items() if key != "prediction"}
    with pytest.raises(ValueError, match=message):
        metrics.check([RECORDS[2], unanswered | {"id": 0}])
