"""Images from cut-outs: a procedural background, objects pasted with exact boxes.

The box of an object is the bounding box of its scaled, rotated mask (alpha ≥ 128), so it is exact by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

SIZE = 224  # pixels, both sides
MIN_SHORT = 0.17  # of the image: a thinner box makes IoU 0.5 a matter of pixels
MAX_OVERLAP = 0.03  # of the smaller of two boxes
# (smallest, largest) long side of a box by number of objects, as a share of the image
LONG_SIDE = {1: (0.40, 0.62), 2: (0.34, 0.52), 3: (0.30, 0.44), 4: (0.27, 0.40)}


@dataclass(frozen=True)
class Composition:
    """A finished image and, in the order of the cut-outs given, its boxes (x1, y1, x2, y2) in 0..1."""

    image: Image.Image
    boxes: list[tuple[float, float, float, float]]


def compose(
    rng: np.random.Generator,
    objects: list[np.ndarray],
    flip: list[bool] | None = None,
    sides: tuple[float, float] | None = None,
) -> Composition:
    """Paste objects at random places, sizes and angles.

    Args:
        rng: the only source of chance.
        objects: RGBA arrays [H, W, 4], one to four.
        flip: per object, whether it may be mirrored (not signs: their text would be).
        sides: range of the long side as a share of the image; by number of objects when None.
    """
    flip = flip or [True] * len(objects)
    low, high = sides or LONG_SIDE[len(objects)]
    canvas = background(rng)
    for _ in range(100):
        placed = _place(rng, objects, flip, (low, high))
        if placed is not None:
            break
        low, high = low * 0.97, high * 0.97
    else:
        raise ValueError(f"no room for {len(objects)} objects; pass fewer or a smaller range of sides")
    boxes = []
    for image, x, y in placed:
        canvas.paste(image, (x, y), image)
        width, height = image.size
        box = (x / SIZE, y / SIZE, (x + width) / SIZE, (y + height) / SIZE)
        boxes.append(tuple(round(v, 4) for v in box))
    return Composition(canvas, boxes)


def _place(
    rng: np.random.Generator, objects: list[np.ndarray], flip: list[bool], sides: tuple[float, float]
) -> list[tuple[Image.Image, int, int]] | None:
    """One try: transformed objects with their corners, or None if one found no free place."""
    placed: list[tuple[Image.Image, int, int]] = []
    for rgba, may_flip in zip(objects, flip, strict=True):
        image = transform(rng, rgba, sides, may_flip)
        width, height = image.size
        for _ in range(30):
            x = int(rng.integers(0, SIZE - width + 1))
            y = int(rng.integers(0, SIZE - height + 1))
            if all(overlap((x, y, x + width, y + height), _corners(*other)) <= MAX_OVERLAP for other in placed):
                placed.append((image, x, y))
                break
        else:
            return None
    return placed


def transform(
    rng: np.random.Generator, rgba: np.ndarray, sides: tuple[float, float], may_flip: bool = True
) -> Image.Image:
    """Mirror, scale, turn and light one cut-out; the result is cropped to its mask."""
    image = Image.fromarray(rgba)
    if may_flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    aspect = max(image.size) / min(image.size)
    long = min(max(rng.uniform(*sides), MIN_SHORT * aspect), 0.85) * SIZE
    angle = float(rng.uniform(-12, 12))
    scale = long / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    alpha = image.getchannel("A")
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.8, 1.15)))
    image = ImageEnhance.Contrast(image).enhance(float(rng.uniform(0.9, 1.1)))
    image.putalpha(alpha)
    box = mask_box(image)
    assert box is not None, "a cut-out lost its mask; stamps.crop lets none through that can"
    return image.crop(box)


def mask_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Bounding box of the pixels with alpha ≥ 128, ends exclusive; None if there are none."""
    return image.getchannel("A").point([0] * 128 + [255] * 128).getbbox()


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _corners(image: Image.Image, x: int, y: int) -> tuple[int, int, int, int]:
    return x, y, x + image.width, y + image.height


def background(rng: np.random.Generator) -> Image.Image:
    """A square RGB image without objects: plain, gradient, noise at several scales, stripes or checkers."""
    first, second = _color(rng), _color(rng)
    ramp = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]  # [SIZE, SIZE]
    across = np.cos(angle) * ramp[:, None] - np.sin(angle) * ramp[None, :]
    period = rng.uniform(0.06, 0.3)
    kind = int(rng.integers(6))
    if kind == 0:
        mix = np.full((SIZE, SIZE), rng.random(), dtype=np.float32)
    elif kind == 1:
        mix = np.clip(along / 1.2 + 0.5, 0, 1)
    elif kind == 2:
        mix = _noise(rng, int(rng.integers(3, 9)))
    elif kind == 3:
        mix = 0.6 * _noise(rng, int(rng.integers(4, 8))) + 0.4 * _noise(rng, int(rng.integers(24, 72)))
    elif kind == 4:
        mix = (np.floor(along / period) % 2) * rng.uniform(0.4, 1.0)
    else:
        mix = ((np.floor(along / period) + np.floor(across / period)) % 2) * rng.uniform(0.4, 1.0)
    pixels = first + (second - first) * mix[:, :, None].astype(np.float32)
    pixels = pixels + 10 * (_noise(rng, 6)[:, :, None] - 0.5) + rng.normal(0, 3, (SIZE, SIZE, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _color(rng: np.random.Generator) -> np.ndarray:
    """A soft colour, float32 [3] in 0..255."""
    gray = rng.uniform(70, 235)
    return np.clip(gray + rng.uniform(-55, 55, 3), 20, 250).astype(np.float32)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise [SIZE, SIZE] in 0..1 with `cells` random values a side."""
    grid = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
