"""What can be said of the objects of a scene from their boxes and colours alone: sides, heights, corners, sizes, names.

x runs to the right, y away from the viewer, z up; a viewer stands before the scene at low y. So "left" is smaller x.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Box3D = tuple[float, float, float, float, float, float]  # xmin, ymin, zmin, xmax, ymax, zmax

OPPOSITE = {"left": "right", "right": "left", "over": "beneath", "beneath": "over"}
NEAR = 0.4  # metres between two boxes that are next to each other
APART = 0.3  # metres that one box must lie beyond the other's middle to be on its left or right
CORNER = 0.35  # metres from both walls
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "gray", "black")


@dataclass(frozen=True)
class SceneObject:
    """An annotated object. captions: what people wrote of it, if anyone did."""

    id: int
    name: str
    box: Box3D
    colour: str = ""
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """An annotated scene.

    cloud: path of its points, from the data's folder; room: the box of the whole; questions: (question, answers)
    pairs that people wrote.
    """

    id: str
    cloud: str
    room: Box3D
    objects: list[SceneObject]
    questions: list[tuple[str, list[str]]] = field(default_factory=list)


def relation(a: Box3D, b: Box3D) -> str | None:
    """Where `a` is seen from `b`: left, right, over, beneath; None where none of them is plain."""
    shared = [min(a[3 + i], b[3 + i]) - max(a[i], b[i]) for i in range(3)]  # negative: the gap
    if shared[0] > 0 and shared[1] > 0 and shared[2] < 0.05:  # one stands on, hangs over or lies under the other
        return "over" if a[2] + a[5] > b[2] + b[5] else "beneath"
    dx = (a[0] + a[3] - b[0] - b[3]) / 2
    dy = (a[1] + a[4] - b[1] - b[4]) / 2
    half = (b[3] - b[0]) / 2
    if abs(dx) < half + APART or abs(dx) < 1.2 * abs(dy) or shared[2] < 0:
        return None
    return "left" if dx < 0 else "right"


def gap(a: Box3D, b: Box3D) -> float:
    """Metres between two boxes, 0 if they touch."""
    return math.sqrt(sum(max(0.0, a[i] - b[3 + i], b[i] - a[3 + i]) ** 2 for i in range(3)))


def related(objects: Sequence[SceneObject], kind: str, anchor: SceneObject) -> list[SceneObject]:
    """The objects that stand in a relation to the anchor; of those at its left or right only the nearest.

    Args:
        kind: left, right, over, beneath or "next to".
    """
    others = [item for item in objects if item.id != anchor.id]
    if kind == "next to":
        level = [o for o in others if relation(o.box, anchor.box) not in ("over", "beneath")]
        return [item for item in level if gap(item.box, anchor.box) < NEAR]
    found = [item for item in others if relation(item.box, anchor.box) == kind]
    if kind in ("left", "right") and found:
        found.sort(key=lambda item: gap(item.box, anchor.box))
        if len(found) > 1 and gap(found[1].box, anchor.box) - gap(found[0].box, anchor.box) < 0.3:
            return found  # two are about equally near: none is the one
        return found[:1]
    return found


def in_corner(box: Box3D, room: Box3D) -> bool:
    """Within CORNER of two walls that meet."""
    x = min(box[0] - room[0], room[3] - box[3])
    y = min(box[1] - room[1], room[4] - box[4])
    return x < CORNER and y < CORNER


def once(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The objects whose name no other has: those that a question can name."""
    names = [item.name for item in objects]
    return [item for item in objects if names.count(item.name) == 1]


def volume(box: Box3D) -> float:
    return float(np.prod([box[3 + i] - box[i] for i in range(3)]))


def colour_name(rgb: np.ndarray) -> str:
    """The name of the colour that most of the points [n, 3] in 0..1 have."""
    names, counts = np.unique([_name(*pixel) for pixel in rgb[:: max(1, len(rgb) // 256)]], return_counts=True)
    return str(names[counts.argmax()])


def _name(red: float, green: float, blue: float) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(float(red), float(green), float(blue))
    hue *= 360
    if value < 0.18:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.8 else "gray"
    if 10 <= hue < 50 and (value < 0.68 or saturation < 0.5):
        return "brown"
    for limit, name in ((15, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (290, "purple")):
        if hue < limit:
            return name
    return "pink" if hue < 340 else "red"
