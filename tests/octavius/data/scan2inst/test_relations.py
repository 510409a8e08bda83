"""What is said of boxes and colours is true, and only said where it is plain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavius.data.scan2inst.relations import (
    OPPOSITE,
    SceneObject,
    colour_name,
    gap,
    in_corner,
    once,
    related,
    relation,
)

ROOM = (-3.0, -2.0, 0.0, 3.0, 2.0, 2.6)
PLACE = st.tuples(*[st.floats(-3, 2)] * 3, *[st.floats(0.1, 2)] * 3).map(
    lambda p: tuple(float(v) for v in (*p[:3], *np.add(p[:3], p[3:])))
)


def box(x, y, z=0.0, w=1.0, d=1.0, h=1.0):
    return (x - w / 2, y - d / 2, z, x + w / 2, y + d / 2, z + h)


CASES = {
    "left": (box(-2, 0), box(1, 0.5), "left"),
    "right": (box(2, 0), box(-1, 0.5), "right"),
    "on it": (box(0, 0, 1.0), box(0.2, 0.2), "over"),
    "beneath it": (box(0, 0), box(0.2, 0.2, 1.5), "beneath"),
    "behind": (box(0, 2), box(0.2, -1), None),
    "diagonal": (box(-2, 2), box(0, 0), None),
    "side by side": (box(0, 0), box(0.9, 0), "left"),
    "overlapping": (box(0, 0), box(0.7, 0), None),
}


@pytest.mark.parametrize(("a", "b", "want"), CASES.values(), ids=CASES)
def test_relation(a, b, want):
    assert relation(a, b) == want


@given(PLACE, PLACE)
def test_over_and_beneath_mirror_each_other(a, b):
    side, back = relation(a, b), relation(b, a)
    assert {side, back} != {"left"} and {side, back} != {"right"}
    if side in ("over", "beneath") and a[2] + a[5] != b[2] + b[5]:
        assert back == OPPOSITE[side]
    if side == "left":
        assert (a[0] + a[3]) < (b[0] + b[3])
    assert gap(a, b) == gap(b, a) >= 0


def test_nearest_at_one_side_or_none_if_two_are_as_near():
    anchor = SceneObject(0, "table", box(0, 0))
    near, far, rival = (
        SceneObject(1, "chair", box(-2, 0)),
        SceneObject(2, "sofa", box(-4, 0)),
        SceneObject(3, "lamp", box(-2, 0.6)),
    )
    assert related([anchor, near, far], "left", anchor) == [near]
    assert len(related([anchor, near, rival], "left", anchor)) == 2
    assert related([anchor, near, far], "right", anchor) == []
    beside = SceneObject(4, "stool", box(1.2, 0))
    assert related([anchor, near, beside], "next to", anchor) == [beside]


def test_corner_and_names():
    assert in_corner(box(-2.4, -1.4), ROOM) and not in_corner(box(0, -1.4), ROOM) and not in_corner(box(0, 0), ROOM)
    items = [SceneObject(i, name, box(i, 0)) for i, name in enumerate(("chair", "table", "chair"))]
    assert [item.name for item in once(items)] == ["table"]


COLOURS = {
    "red": (0.8, 0.1, 0.1),
    "brown": (0.45, 0.28, 0.15),
    "white": (0.95, 0.95, 0.93),
    "gray": (0.5, 0.5, 0.52),
    "black": (0.05, 0.05, 0.05),
    "green": (0.1, 0.6, 0.2),
    "blue": (0.2, 0.3, 0.8),
    "yellow": (0.9, 0.85, 0.1),
}


@pytest.mark.parametrize(("name", "rgb"), COLOURS.items(), ids=COLOURS)
def test_colour_is_that_of_most_points(name, rgb):
    points = np.concatenate((np.tile(rgb, (70, 1)), np.tile((0.9, 0.1, 0.9), (30, 1))))
    assert colour_name(points) == name
