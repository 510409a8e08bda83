"""Questions: no constant answer pays, geometry words mean what they say."""

from collections import Counter

import numpy as np
import pytest

from octavius.data.mini_lamm import cutouts, questions


def test_choices_reward_no_constant_answer():
    writer = questions.ChoiceWriter(sorted(cutouts.CATEGORIES))
    rng = np.random.default_rng(0)
    asked = []
    for index in range(600):
        labels = [writer.names[int(i)] for i in rng.integers(0, len(writer.names), 1 + index % 4)]
        corners = rng.random((len(labels), 2)) * 0.7
        boxes = [(float(x), float(y), float(x) + 0.3, float(y) + 0.3) for x, y in corners]
        asked += writer.write(rng, labels, boxes, 2)
    letters = Counter(letter for _, letter, _ in asked)
    assert max(letters.values()) <= 0.27 * len(asked)
    kinds: dict[str, Counter[str]] = {}
    for _, letter, choices in asked:
        kind = min(choices) if choices == list(questions.NUMBERS) else "".join(sorted(choices))
        kind = kind if kind == "1" or "left" in kind else "which"
        kinds.setdefault(kind, Counter())[choices["ABCD".index(letter)]] += 1
    assert len(kinds) == 4
    for kind, answers in kinds.items():
        chance = 1 / (len(writer.names) if kind == "which" else 4)
        assert max(answers.values()) / sum(answers.values()) <= chance + 0.03, kind


@pytest.mark.parametrize(
    "box, other, expected",
    [
        ((0, 0.4, 0.2, 0.6), (0.7, 0.4, 0.9, 0.6), "left"),
        ((0.7, 0.4, 0.9, 0.6), (0, 0.4, 0.2, 0.6), "right"),
        ((0.4, 0, 0.6, 0.2), (0.4, 0.7, 0.6, 0.9), "above"),
        ((0.4, 0.7, 0.6, 0.9), (0.4, 0, 0.6, 0.2), "below"),
        ((0, 0, 0.2, 0.2), (0.7, 0.7, 0.9, 0.9), None),
    ],
    ids=["left", "right", "above", "below", "diagonal"],
)
def test_direction(box, other, expected):
    assert questions.direction(box, other) == expected


def test_corner():
    names = [questions.corner((x, y, x + 0.2, y + 0.2)) for y in (0.0, 0.8) for x in (0.0, 0.8)]
    assert names == list(questions.CORNERS)
    assert questions.corner((0.4, 0.0, 0.6, 0.2)) is None
