"""Boxes of objects in an image, (x1, y1, x2, y2) in fractions of its sides."""

import math
from collections.abc import Iterable

OVERHANG = 0.05  # how far a box may reach over the image's edge, as rounded corners do; it is cut there


def fraction_box(values: Iterable[object]) -> list[float]:
    """The box, cut at the image's edges.

    Raises:
        ValueError: it is not four finite numbers with x1 <= x2 and y1 <= y2, or reaches further than OVERHANG over an
            edge, as coordinates in pixels do.
    """
    try:
        box = [float(value) for value in values]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a box must be four numbers x1, y1, x2, y2: {error}") from error
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"a box must be four finite numbers x1, y1, x2, y2, got {box}")
    if box[0] > box[2] or box[1] > box[3]:
        raise ValueError(f"a box must have x1 <= x2 and y1 <= y2, got {box}")
    if min(box) < -OVERHANG or max(box) > 1 + OVERHANG:
        raise ValueError(f"a box must be in fractions of the image, 0 to 1, got {box}; are these pixels?")
    return [min(1.0, max(0.0, value)) for value in box]
