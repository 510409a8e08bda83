"""The image tower's output per image, computed once and kept on disk, or computed on demand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from octavius.inputs.images import check_readable, open_image
from octavius.vision.towers import ImageTower

CHUNK = 32  # images that go through a tower at once, at most


class FeatureStore:
    """The tower's output per image, computed once and kept in a memory-mapped float16 file, or computed on demand.

    Args:
        tower: the encoder.
        folder: where the files go; None computes on demand and keeps nothing.
    """

    def __init__(self, tower: ImageTower, folder: Path | None = None):
        self.tower, self.folder = tower, folder
        self.rows: dict[Path, tuple[np.ndarray, int]] = {}

    def prepare(self, paths: list[Path], batch_size: int = 4) -> dict[Path, str]:
        """Read every image once; with a folder, compute and keep its features.

        Small batches, since a tower's activations of four images still fit a processor's cache.

        Returns:
            the unreadable images, each with the reason.
        """
        paths = sorted(set(paths))
        if self.folder is None:
            return {path: why for path in paths if (why := _unreadable(path))}
        names = [
            f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" if path.exists() else str(path)
            for path in paths
        ]
        key = hashlib.sha256("\n".join([self.tower.fingerprint(), *names]).encode()).hexdigest()[:24]
        index, data = self.folder / f"{key}.json", self.folder / f"{key}.f16"
        shape = (len(paths), self.tower.tokens, self.tower.width)
        if not index.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = data.with_suffix(".partial")
            features = np.memmap(partial, np.float16, "w+", shape=shape)
            bad = {}
            for start in track(range(0, len(paths), batch_size), "tower features"):
                chunk = list(enumerate(paths[start : start + batch_size], start))
                pixels = []
                for row, path in chunk:
                    try:
                        pixels.append((row, self._open(path)))
                    except ValueError as error:
                        bad[str(path)] = str(error)
                if pixels:
                    features[[row for row, _ in pixels]] = self._encode([tensor for _, tensor in pixels]).numpy()
            features.flush()
            partial.rename(data)
            index.write_text(json.dumps({"paths": [str(path) for path in paths], "bad": bad}))
        bad = {Path(path): why for path, why in json.loads(index.read_text())["bad"].items()}
        features = np.memmap(data, np.float16, "r", shape=shape)
        self.rows |= {path: (features, row) for row, path in enumerate(paths) if path not in bad}
        return bad

    def __call__(self, paths: list[Path]) -> torch.Tensor:
        """Features of the images, [N, P, C] float16."""
        known = [self.rows.get(path) for path in paths]
        if all(entry is not None for entry in known):
            return torch.from_numpy(np.stack([entry[0][entry[1]] for entry in known if entry]))
        chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        return torch.cat([self._encode([self._open(path) for path in chunk]) for chunk in chunks])

    def _open(self, path: Path) -> torch.Tensor:
        return self.tower.pixels(open_image(path))

    @torch.inference_mode()
    def _encode(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        device = next(self.tower.parameters()).device
        return self.tower(torch.stack(pixels).to(device)).half().cpu()


def _unreadable(path: Path) -> str | None:
    try:
        check_readable(path)
    except ValueError as error:
        return str(error)
    return None
