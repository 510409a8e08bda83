"""Scenes: boxes are exactly those of the pixels that changed; sizes and overlaps keep their bounds."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from octavius.data.mini_lamm import compose


def disc(diameter: int = 120, color: tuple[int, int, int] = (255, 0, 255)) -> np.ndarray:
    """A cut-out whose box is the same at every angle: RGBA [diameter, diameter, 4]."""
    big = Image.new("L", (diameter * 4, diameter * 4))
    ImageDraw.Draw(big).ellipse((0, 0, diameter * 4 - 1, diameter * 4 - 1), fill=255)
    image = Image.new("RGBA", (diameter, diameter), color)
    image.putalpha(big.resize((diameter, diameter), Image.Resampling.BOX))
    return np.asarray(image)


def test_compose_box_is_that_of_the_changed_pixels():
    for seed in range(20):
        ground = np.asarray(compose.background(np.random.default_rng(seed)), dtype=int)
        count = 1 + seed % 4
        scene = compose.compose(np.random.default_rng(seed), [disc()] * count)
        changed = np.abs(np.asarray(scene.image, dtype=int) - ground).max(axis=2) > 12
        covered = np.zeros_like(changed)
        for box in scene.boxes:
            x1, y1, x2, y2 = (round(v * compose.SIZE) for v in box)
            inside = np.argwhere(changed[y1:y2, x1:x2])
            assert inside.min(axis=0).tolist() == [0, 0]
            assert (inside.max(axis=0) + 1).tolist() == [y2 - y1, x2 - x1]
            assert abs((x2 - x1) - (y2 - y1)) <= 2, "a disc has a square box at any angle"
            covered[y1:y2, x1:x2] = True
        assert not (changed & ~covered).any()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_compose_sizes_and_overlap(count):
    low, high = compose.LONG_SIDE[count]
    for seed in range(25):
        boxes = compose.compose(np.random.default_rng(seed), [disc()] * count).boxes
        for i, box in enumerate(boxes):
            assert low * 0.85 <= box[2] - box[0] <= high + 0.02
            assert all(compose.overlap(box, other) <= compose.MAX_OVERLAP + 1e-3 for other in boxes[:i])


def test_transform_known_rectangle():
    class Level(np.random.Generator):
        """No mirroring, no turn, middle of every range."""

        def random(self, *args, **kwargs):
            return 0.9

        def uniform(self, low=0.0, high=1.0, size=None):
            return (low + high) / 2

    rgba = np.zeros((50, 100, 4), dtype=np.uint8)
    rgba[10:40, 20:80] = (0, 200, 0, 255)
    image = compose.transform(Level(np.random.PCG64(0)), rgba, (0.5, 0.5))
    assert image.width == pytest.approx(0.5 * compose.SIZE * 60 / 100, abs=1)
    assert image.height == pytest.approx(0.5 * compose.SIZE * 30 / 100, abs=1)
