"""Images and point clouds that were sent: bounded, decoded, encoded for the model, kept in memory, never executed."""

import hashlib
import io
import struct
import threading
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from octavius.inputs.images import UNREADABLE, upright
from octavius.model.octavius import Octavius
from octavius.model.prompt import Seen, SeenCloud, SeenImage, see_cloud, see_image
from octavius.points.cloud import PointCloud, cloud_from_bytes
from octavius.points.proposals import Boxes, boxes_within
from octavius.serve.limits import Limits, Refused

CLOUDS = (".ply", ".pcd", ".npy", ".npz", ".obj", ".stl", ".off", ".glb", ".xyz")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's decoders that an upload may reach
SHOWN_POINTS = 60_000  # of a cloud, that the page draws
SHOWN_SIDE = 1024  # pixels of an image that the page draws


@dataclass(frozen=True)
class Upload:
    """What was sent, decoded and encoded.

    info: what the page is told; view: bytes that it draws, a JPEG or float32 xyz and uint8 rgb of points.
    """

    id: str
    name: str
    size: int
    seen: Seen
    info: dict[str, Any]
    view: bytes

    @property
    def bytes(self) -> int:
        tensors = (self.seen.features,) if isinstance(self.seen, SeenImage) else (self.seen.objects, self.seen.boxes)
        return len(self.view) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Uploads:
    """Uploads by the hash of their bytes, the oldest forgotten first.

    Args:
        model: encodes.
        limits: of size and number.
    """

    def __init__(self, model: Octavius, limits: Limits):
        self.model, self.limits = model, limits
        self._kept: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()
        self._encoding = threading.Lock()  # one at a time: encoders take all processors

    def get(self, key: str) -> Upload:
        """The upload of this id.

        Raises:
            Refused: it is not kept, or no longer.
        """
        with self._lock:
            if key not in self._kept:
                raise Refused(f"there is no file {key!r:.80} here, or no longer; send it again", 404, "not_found")
            self._kept.move_to_end(key)
            return self._kept[key]

    def drop(self, key: str) -> None:
        """Forget an upload."""
        self.get(key)
        with self._lock:
            self._kept.pop(key, None)

    def add(self, data: bytes, name: str, unit: str = "m", number: int | None = None) -> Upload:
        """Read what was sent; runs in a worker thread.

        Args:
            data: the file.
            name: of the file; a cloud's suffix says its format.
            unit: of a cloud's coordinates.
            number: show this object of the cloud alone.
        Raises:
            Refused: too large, not readable, or nothing that the model reads.
        """
        if len(data) > self.limits.upload_bytes:
            raise Refused(f"a file may have {self.limits.upload_bytes >> 20} MB, this one is larger", 413)
        key = "file-" + hashlib.sha256(repr((name, unit, number)).encode() + data).hexdigest()[:32]
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._encoding:
            upload = self._read(key, data, Path(name).name[:120], unit, number)
        with self._lock:
            self._kept[key] = upload
            while len(self._kept) > self.limits.kept_files or (
                len(self._kept) > 1 and sum(kept.bytes for kept in self._kept.values()) > self.limits.kept_bytes
            ):
                self._kept.popitem(last=False)
        return upload

    def _read(self, key: str, data: bytes, name: str, unit: str, number: int | None) -> Upload:
        try:
            if Path(name).suffix.lower() in CLOUDS:
                seen, info, view = self._cloud(data, name, unit, number)
            else:
                seen, info, view = self._image(data, name)
        except Refused:
            raise
        except (ValueError, MemoryError, RecursionError) as error:
            raise Refused(" ".join(str(error).split()) or "it cannot be read") from error
        return Upload(key, name, len(data), seen, {"id": key, "name": name, **info}, view)

    def _image(self, data: bytes, name: str) -> tuple[SeenImage, dict[str, Any], bytes]:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > self.limits.pixels:
                    raise self._too_large(name, f"{width * height / 1e6:.0f} ({width} by {height})")
                image.draft("RGB", (SHOWN_SIDE, SHOWN_SIDE))  # a JPEG is decoded at a fraction of its size
                turned = upright(image)
                seen = see_image(self.model, turned)
                turned.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
                view = _jpeg(turned)
        except Image.DecompressionBombError as error:  # Pillow's own limit, which it applies on opening
            raise self._too_large(name, "more") from error
        except UNREADABLE as error:
            if isinstance(error, Refused):
                raise
            if self.model.tower[0] is None:
                raise
            kinds = ", ".join(CLOUDS)
            raise Refused(f"{name}: cannot be read as an image, and a point cloud ends in {kinds}") from error
        return seen, {"kind": "image", "width": width, "height": height}, view

    def _too_large(self, name: str, has: str) -> Refused:
        most = self.limits.pixels / 1e6
        return Refused(f"{name}: an image may have {most:.0f} megapixels, this one has {has}; make it smaller", 413)

    def _cloud(self, data: bytes, name: str, unit: str, number: int | None) -> tuple[SeenCloud, dict[str, Any], bytes]:
        if packed := Path(name).suffix.lower() == ".npz":
            _check_archive(data, name, 64 * self.limits.points)
        cloud = cloud_from_bytes(data, name, unit)
        if len(cloud) > self.limits.points:
            raise Refused(f"{name}: a cloud may have {self.limits.points:,} points, this one has {len(cloud):,}", 413)
        boxes = boxes_within(Path(name), data) if packed else None
        if boxes is not None and number is not None:
            row = boxes.names.index(str(number))
            boxes = Boxes(boxes.boxes[row : row + 1], [str(number)])
        seen = see_cloud(self.model, cloud, boxes)
        objects = [
            {"box": box, "attention": share}
            for box, share in zip(seen.boxes.tolist(), seen.attention.tolist(), strict=True)
        ]
        shown = _thin(cloud)
        view = struct.pack("<I", len(shown)) + shown.xyz.astype("<f4").tobytes() + _rgb(shown).tobytes()
        return seen, {"kind": "cloud", "points": len(cloud), "objects": objects}, view


def _check_archive(data: bytes, name: str, most: int) -> None:
    """Raise Refused unless all that a zip archive holds takes at most so many bytes when unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(item.file_size for item in archive.infolist())
    except zipfile.BadZipFile as error:
        raise Refused(f"{name}: cannot be read as a point cloud: {error}") from error
    if size > most:
        raise Refused(f"{name}: may unpack to {most >> 20} MB, this one to {size >> 20} MB", 413)


def _thin(cloud: PointCloud) -> PointCloud:
    if len(cloud) <= SHOWN_POINTS:
        return cloud
    return cloud[np.random.default_rng(0).choice(len(cloud), SHOWN_POINTS, replace=False)]


def _rgb(cloud: PointCloud) -> np.ndarray:
    """[n, 3] uint8; a cloud without colours is coloured by its height."""
    if cloud.rgb is not None:
        return (255 * cloud.rgb).round().astype(np.uint8)
    z = cloud.xyz[:, 2:]
    z = (z - z.min()) / max(float(np.ptp(z)), 1e-6)
    low, high = np.array([70, 110, 160]), np.array([235, 170, 90])
    return (low + (high - low) * z).round().astype(np.uint8)


def _jpeg(image: Image.Image) -> bytes:
    """Without what else the file held: no metadata, no profile, no trailing bytes."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, exif=b"", icc_profile=None)
    return out.getvalue()
