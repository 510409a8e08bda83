"""Images of users as 8-bit RGB: turned as their EXIF data say, of any depth, none larger than is safe to decode."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # 192 MB as RGB; a larger one is refused before it is decoded
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)  # of bad files


def open_image(path: str | Path) -> Image.Image:
    """The image as RGB, transparent parts on white, upright.

    Raises:
        ValueError: it cannot be read, or has more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(path) as image:
            check_size(image)
            return upright(image)
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def check_readable(path: str | Path) -> None:
    """Raise ValueError unless an image can be decoded; cheaper than `open_image` for JPEG files.

    Raises:
        ValueError: it cannot be read, or has more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(path) as image:
            check_size(image)
            image.draft("RGB", (1, 1))  # of a JPEG an eighth of each side: cheaper, and still all of its bytes
            image.load()
    except UNREADABLE as error:
        raise ValueError(str(error)) from error


def check_size(image: Image.Image) -> None:
    """Raise ValueError if an image that is not decoded yet has more than MAX_PIXELS pixels.

    Raises:
        ValueError: it has.
    """
    if (pixels := image.width * image.height) > MAX_PIXELS:
        raise ValueError(
            f"an image must have at most {MAX_PIXELS // 10**6} megapixels, got {image.width} × {image.height} "  # noqa: RUF001
            f"({pixels / 1e6:.0f}); make it smaller"
        )


def upright(image: Image.Image) -> Image.Image:
    """An opened image as RGB, turned as its EXIF orientation says, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scaled(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits or of floats, its range mapped to black and white.

    The range is that of 16 bits where all values are whole and lie in it; 0 to 1 of floats that lie in it; else the
    image's own smallest to largest value.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("an image of floats must have finite values")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    grey = np.rint((values - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8)
    return Image.fromarray(grey, "L").convert("RGB")
