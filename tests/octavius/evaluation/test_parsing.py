"""Parsers of free text against hand-made cases."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavius.evaluation import parsing

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
    assert parsing.parse_boxes(text, LABELS) == expected


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
    assert parsing.parse_label(text, LABELS) == expected


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
    assert parsing.parse_choice(text, choices) == expected


PIECES = st.one_of(
    st.text(), st.sampled_from(["[", "]", "0.5", ",", " ", "nan", "bird", "(A)", "answer is", ".", "\0"])
)


@given(st.lists(PIECES).map("".join), st.lists(st.text(), max_size=5))
def test_parsers_never_raise(text, names):
    for _, box in parsing.parse_boxes(text, [*LABELS, *names]):
        assert all(map(math.isfinite, box)) and box[0] <= box[2] and box[1] <= box[3]
    assert parsing.parse_label(text, names) in [*names, None]
    assert parsing.parse_choice(text, names) in [*"ABCDE"[: len(names)], None]


@given(st.lists(st.tuples(*[st.integers(0, 100)] * 4), max_size=5))
def test_parse_boxes_reads_what_was_written(corners):
    boxes = [(min(a, c) / 100, min(b, d) / 100, max(a, c) / 100, max(b, d) / 100) for a, b, c, d in corners]
    text = " ".join(f"A bird at [{', '.join(f'{v:.2f}' for v in box)}]." for box in boxes)
    assert parsing.parse_boxes(text, LABELS) == [("bird", box) for box in boxes]
