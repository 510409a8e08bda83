"""Photographs: captions, families, near-duplicates, and the division into training and test."""

import numpy as np
import pytest
from PIL import Image

from octavius.assets import registry
from octavius.data.mini_lamm import cutouts


def blob(seed: int) -> np.ndarray:
    """A cut-out of random blocks, RGBA [70, 90, 4]."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((90, 70), Image.Resampling.NEAREST)
    return np.asarray(blocks.convert("RGBA"))


@pytest.mark.parametrize(
    "line, caption",
    [
        ("Jupiter—the largest planet in our solar system!", "Jupiter."),
        ("A “Fuji” apple.", "A Fuji apple."),
        ("An albino peahen (a female peafowl, or peacock).", "An albino peahen."),
        ("A dumper. It carries its load in the front.", "A dumper."),
        ("A Seville orange, also called a bitter orange.", "A Seville orange."),
    ],
)
def test_clean_caption(line, caption):
    assert cutouts.clean_caption(line) == caption


def test_family_joins_variants_and_keeps_kinds_apart():
    assert len({cutouts.family(s) for s in ("apple_red", "apple_green", "Apple2")}) == 1
    assert cutouts.family("hen") == cutouts.family("rooster") != cutouts.family("heron_greatblue")
    assert cutouts.family("flower1") != cutouts.family("flower2")


def test_groups_join_near_duplicates():
    first, second = blob(1), blob(2)
    brighter = np.clip(first.astype(int) + np.array([12, 12, 12, 0]), 0, 255).astype(np.uint8)
    cut = [
        cutouts.Cutout(f"n{i}", "bird", f"f{i}", "A bird.", rgba)
        for i, rgba in enumerate((first, second, first[:, ::-1], brighter))
    ]
    assert [[c.name for c in group] for group in cutouts.groups(cut)] == [["n0", "n2", "n3"], ["n1"]]


def test_crop_drops_thin_and_empty():
    image = Image.new("RGBA", (200, 60))
    assert cutouts.crop(image) is None
    image.paste((1, 2, 3, 255), (10, 20, 190, 50))
    assert cutouts.crop(image) is None
    image.paste((1, 2, 3, 255), (10, 0, 90, 60))
    kept = cutouts.crop(image.crop((0, 0, 90, 60)))
    assert kept is not None and kept.shape == (60, 80, 4)


@pytest.mark.assets
def test_real_photographs_are_split_by_kind():
    try:
        folder = registry.path("stamps")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    known = cutouts.load_cutouts(folder, cutouts.CATEGORIES)
    train, test = cutouts.split_cutouts(known, seed=0)
    assert len(train) + len(test) == len(known) > 250
    assert not {c.family for c in train} & {c.family for c in test}
    for category in cutouts.CATEGORIES:
        assert sum(c.category == category for c in train) >= 5 and sum(c.category == category for c in test) >= 2
    for mine in test:
        hashes = (cutouts.difference_hash(mine.rgba), cutouts.difference_hash(mine.rgba[:, ::-1]))
        for other in train:
            if other.category == mine.category:
                assert all((h != cutouts.difference_hash(other.rgba)).sum() > cutouts.NEAR for h in hashes)
