"""The image tower's output per image: computed once and kept in shards on disk, or computed from the pixels on demand.

A shard is a folder of moe_lora.storage: `rows.f16`, the features of up to SHARD images one after the other, and
`index.json` with their paths and each row's CRC-32. A row is compared with its checksum whenever it is read.
"""

import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from moe_lora import storage
from rich.progress import Progress

from octavius.assets.shards import READY, share_out
from octavius.inputs.images import check_readable, open_image
from octavius.vision.towers import ImageTower

CHUNK = 32  # images that go through a tower at once, at most
SHARD = 512  # images of a shard: 270 MB of CLIP ViT-L/14's features
ROWS, INDEX = "rows.f16", "index.json"


class FeatureStore:
    """The tower's output per image, from shards on disk or on demand.

    Args:
        tower: the encoder.
        folder: where the shards go; None computes on demand and keeps nothing.
    """

    def __init__(self, tower: ImageTower, folder: Path | None = None):
        self.tower, self.folder = tower, folder
        self.rows: dict[Path, tuple[Path, int, int]] = {}  # path of an image → its shard's rows, number, CRC-32

    def prepare(self, paths: list[Path], batch_size: int = 4) -> dict[Path, str]:
        """Read every image once; with a folder, compute and keep its features, shared out among all processes.

        Small batches, since a tower's activations of four images still fit a processor's cache.

        Returns:
            the unreadable images, each with the reason.
        """
        paths = sorted(set(paths))
        if self.folder is None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
                return {path: why for path, why in zip(paths, pool.map(_unreadable, paths), strict=True) if why}
        parts = [paths[start : start + SHARD] for start in range(0, len(paths), SHARD)]
        fingerprint = self.tower.fingerprint()
        keys = [_key(fingerprint, part) for part in parts]
        with Progress(transient=True, disable=len(paths) < 10) as progress:
            task = progress.add_task("tower features", total=len(paths))

            def make(number: int, target: Path) -> None:
                self._write(parts[number], target, batch_size, lambda count: progress.advance(task, count))

            share_out(self.folder, keys, self._is_whole, make)
        bad: dict[Path, str] = {}
        for key, part in zip(keys, parts, strict=True):
            place = self.folder / key / READY
            index = json.loads((storage.whole(place) / INDEX).read_text(encoding="utf-8"))
            bad |= {Path(path): why for path, why in index["bad"].items()}
            for row, (path, crc) in enumerate(zip(part, index["crc"], strict=True)):
                if path not in bad:
                    self.rows[path] = (storage.whole(place) / ROWS, row, crc)
        return bad

    def batch(self, paths: list[Path]) -> dict[str, torch.Tensor]:
        """What the model reads of the images: {"features": [N, P, C]} where they are kept, else {"pixels"}.

        Pixels are [N, 3, S, S] and go through the tower on the model's device.
        """
        if all(path in self.rows for path in paths):
            return {"features": self._read(paths)}
        return {"pixels": torch.stack([self._open(path) for path in paths])}

    def __call__(self, paths: list[Path]) -> torch.Tensor:
        """Features of the images, [N, P, C] float16."""
        if all(path in self.rows for path in paths):
            return self._read(paths)
        chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        return torch.cat([self._encode([self._open(path) for path in chunk]) for chunk in chunks])

    def _read(self, paths: list[Path]) -> torch.Tensor:
        size = 2 * self.tower.tokens * self.tower.width
        out = torch.empty(len(paths), self.tower.tokens, self.tower.width, dtype=torch.float16)
        for number, path in enumerate(paths):
            file, row, crc = self.rows[path]
            with open(file, "rb") as stream:  # not mapped: a damaged disk raises here instead of killing the process
                stream.seek(row * size)
                data = stream.read(size)
            if len(data) != size or zlib.crc32(data) != crc:
                raise storage.DamagedError(
                    f"{file}: the features of {path} are damaged; remove {file.parents[1]}, they are computed again"
                )
            out[number] = torch.from_numpy(np.frombuffer(data, np.float16).reshape(out.shape[1:]).copy())
        return out

    def _is_whole(self, place: Path) -> bool:
        """Whether a shard is there: the index by its hash; the rows by their size, since each is checked when read."""
        try:
            place = storage.check(place, (INDEX,))
            size, _ = storage.read_manifest(place).files[ROWS]
            return (place / ROWS).stat().st_size == size
        except (storage.DamagedError, OSError, KeyError):
            return False

    def _write(self, paths: list[Path], target: Path, batch_size: int, advance) -> None:
        """Compute a shard, row after row into a file of its whole size, so that a full disk is seen at once."""
        size = 2 * self.tower.tokens * self.tower.width
        bad: dict[str, str] = {}
        crc: list[int] = []
        with storage.staged(target) as draft:
            with open(draft / ROWS, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size * len(paths))
                for start in range(0, len(paths), batch_size):
                    rows = self._rows(paths[start : start + batch_size], bad)
                    for row in rows:
                        crc.append(zlib.crc32(row))
                        file.write(row)
                    advance(len(rows))
            index = {"paths": [str(path) for path in paths], "bad": bad, "crc": crc}
            (draft / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def _rows(self, paths: list[Path], bad: dict[str, str]) -> list[bytes]:
        """The features of some images as bytes, zeros for the unreadable ones, which are noted in `bad`."""
        pixels = {}
        for path in paths:
            try:
                pixels[path] = self._open(path)
            except ValueError as error:
                bad[str(path)] = str(error)
        features = dict(zip(pixels, self._encode(list(pixels.values())), strict=True)) if pixels else {}
        for path, values in features.items():
            if not values.isfinite().all():
                raise ValueError(f"the image tower's features of {path} must be finite in float16, got NaN or Inf")
        empty = bytes(2 * self.tower.tokens * self.tower.width)
        return [features[path].numpy().tobytes() if path in features else empty for path in paths]

    def _open(self, path: Path) -> torch.Tensor:
        return self.tower.pixels(open_image(path))

    def _encode(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.tower.features(torch.stack(pixels)).cpu()


def _key(fingerprint: str, paths: list[Path]) -> str:
    """Name a shard by what it holds: the tower and the files."""
    names = [
        f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" if path.exists() else str(path)
        for path in paths
    ]
    return hashlib.sha256("\n".join([fingerprint, *names]).encode()).hexdigest()[:24]


def _unreadable(path: Path) -> str | None:
    try:
        check_readable(path)
    except ValueError as error:
        return str(error)
    return None
