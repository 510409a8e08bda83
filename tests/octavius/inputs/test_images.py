"""Images of every depth and orientation, and those that are too large to decode."""

import numpy as np
import pytest
from PIL import Image

from octavius.inputs import images
from octavius.inputs.images import check_readable, open_image, upright
from octavius.vision.features import FeatureStore
from octavius.vision.towers import load_tower

RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)
DEPTHS = {
    "16 bits": (np.round(RAMP * 65535).astype(np.uint16), ".png"),
    "16 bits, big endian": (np.round(RAMP * 65535).astype(">u2"), ".tif"),
    "32 bits": (np.round((RAMP - 0.5) * 2e9).astype(np.int32), ".tif"),
    "32 bits within 16": (np.round(RAMP * 65535).astype(np.int32), ".tif"),
    "floats in 0..1": (RAMP.astype(np.float32), ".tif"),
    "floats": ((RAMP * 700 - 300).astype(np.float32), ".tif"),
    "8 bits": (np.round(RAMP * 255).astype(np.uint8), ".png"),
}


@pytest.mark.parametrize(("array", "suffix"), DEPTHS.values(), ids=DEPTHS)
def test_range_of_every_depth_is_black_to_white(tmp_path, array, suffix):
    Image.fromarray(array).save(tmp_path / f"ramp{suffix}")
    image = open_image(tmp_path / f"ramp{suffix}")
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image)[..., 1] / 255 - RAMP).max() < 0.005


def test_flat_image_of_floats_and_one_with_nan(tmp_path):
    Image.fromarray(np.full((3, 4), 7.5, np.float32)).save(tmp_path / "flat.tif")
    assert not np.asarray(open_image(tmp_path / "flat.tif")).any()
    Image.fromarray(np.full((3, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match=r"nan\.tif: cannot be read as an image: .* must have finite values"):
        open_image(tmp_path / "nan.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    marked = np.zeros((20, 30, 3), np.uint8)
    marked[:8, :8] = 255  # the corner at the top left, as it should be seen
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how it is stored
    stored = Image.fromarray(marked)
    stored = stored if undo is None else stored.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png")), marked)


def test_tower_sees_the_image_upright(parts, tmp_path):
    tower = load_tower(str(parts.tower))
    shown = Image.open(parts.data.parent / "1.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    shown.save(tmp_path / "upright.png")
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    features = FeatureStore(tower)([tmp_path / "upright.png", tmp_path / "turned.png"])
    assert (features[0] == features[1]).all()


def test_large_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")  # 169 megapixels in a few kB
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    for read in (open_image, check_readable):
        with pytest.raises(ValueError, match=r"at most 64 megapixels, got 13000 . 13000 \(169\); make it smaller"):
            read(tmp_path / "large.png")


def test_limit_is_inclusive(tmp_path, monkeypatch):
    Image.new("L", (10, 7)).save(tmp_path / "small.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 70)
    open_image(tmp_path / "small.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 69)
    with pytest.raises(ValueError, match="make it smaller"):
        open_image(tmp_path / "small.png")


def test_broken_file_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image"):
        open_image(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"none\.png"):
        open_image(tmp_path / "none.png")


def test_transparent_parts_are_white():
    image = upright(Image.new("RGBA", (3, 2), (9, 9, 9, 0)))
    assert image.mode == "RGB" and np.asarray(image).min() == 255
