"""The objects of point clouds as the model reads them: features and boxes, computed once per cloud and kept on disk.

A .npz cloud may carry its boxes (`boxes` [P, 6]) and their numbers (`ids` [P]); others get proposals.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from moe_lora import storage
from rich.progress import track

from octavius.assets.shards import READY, share_out
from octavius.points.cloud import UNITS, PointCloud, read_cloud
from octavius.points.pointbert import PointBert, encode
from octavius.points.proposals import MIN_POINTS, Boxes, boxes_within, objects_of

OBJECTS = "objects.pt"
SHARD = 128  # clouds of a shard


class Region(NamedTuple):
    """A cloud, or one object of it by its number."""

    cloud: Path
    object: int | None = None


@dataclass(frozen=True)
class Objects:
    """Objects of one scene. features: [P, C] float16; boxes: [P, 6] metres; ids: P numbers."""

    features: torch.Tensor
    boxes: torch.Tensor
    ids: list[int]

    def __post_init__(self) -> None:
        if not len(self.features) == len(self.boxes) == len(self.ids):
            lengths = len(self.features), len(self.boxes), len(self.ids)
            raise ValueError(f"a scene must have a feature, a box and a number for each object, got {lengths}")

    def only(self, number: int) -> "Objects":
        """The object of this number alone, as upstream shows classification and captioning."""
        if number not in self.ids:
            raise ValueError(f"object must be one of {self.ids}, got {number}")
        row = self.ids.index(number)
        return Objects(self.features[row : row + 1], self.boxes[row : row + 1], [number])


def encode_objects(
    encoder: PointBert, cloud: PointCloud, boxes: Boxes | None = None, numbered: bool = False
) -> Objects:
    """Encode the objects of a cloud in the given boxes, in metres, or in proposals.

    Args:
        encoder: of the objects.
        cloud: the scene.
        boxes: None for proposals.
        numbered: the boxes' names are the objects' numbers; else they are counted.

    Raises:
        ValueError: none of the boxes holds points.
    """
    kept, clouds = objects_of(cloud, boxes)
    own = next(encoder.parameters()).dtype  # half precision on a GPU
    dtype = torch.bfloat16 if own == torch.float32 and torch.backends.mkldnn.is_available() else own
    features = encode(encoder, clouds, dtype=dtype).half()
    ids = [int(name) for name in kept.names] if numbered else list(range(len(kept)))
    return Objects(features, torch.from_numpy(kept.boxes), ids)


class ObjectStore:
    """Objects of clouds by file.

    Args:
        encoder: of the objects; None where all scenes are given.
        folder: where features are kept; None keeps them in memory only.
        scenes: objects that are known already, such as upstream's precomputed ones.
    """

    def __init__(
        self, encoder: PointBert | None = None, folder: Path | None = None, scenes: dict[Path, Objects] | None = None
    ):
        self.encoder, self.folder, self.scenes = encoder, folder, dict(scenes or {})

    def prepare(self, clouds: Iterable[Path]) -> dict[Path, str]:
        """Encode every cloud once.

        Returns:
            the unreadable ones, each with the reason.
        """
        paths = sorted({path for path in clouds if path not in self.scenes})
        if not paths:
            return {}
        bad: dict[Path, str] = {}
        if self.folder is None:
            self.scenes |= self._read(paths, bad)
            return bad
        parts = [paths[start : start + SHARD] for start in range(0, len(paths), SHARD)]
        state = self._state()
        keys = [_key(state, part) for part in parts]
        share_out(self.folder, keys, _is_whole, lambda number, target: self._write(parts[number], target))
        for key in keys:
            loaded = torch.load(storage.check(self.folder / key / READY) / OBJECTS, weights_only=True)
            self.scenes |= {Path(path): Objects(*rows) for path, rows in loaded["scenes"].items()}
            bad |= {Path(path): why for path, why in loaded["bad"].items()}
        return bad

    def _read(self, paths: list[Path], bad: dict[Path, str]) -> dict[Path, Objects]:
        """Encode clouds; the unreadable ones are noted in `bad`."""
        scenes = {}
        for path in track(paths, "objects", disable=len(paths) < 10):
            try:
                scenes[path] = self._encode(path)
            except ValueError as error:
                bad[path] = str(error)
        return scenes

    def _write(self, paths: list[Path], target: Path) -> None:
        """Encode the clouds of a shard and write it."""
        bad: dict[Path, str] = {}
        scenes = self._read(paths, bad)
        rows = {str(path): (scene.features, scene.boxes, scene.ids) for path, scene in scenes.items()}
        with storage.staged(target) as draft:
            torch.save({"scenes": rows, "bad": {str(path): why for path, why in bad.items()}}, draft / OBJECTS)

    def lacking(self, regions: Iterable[Region]) -> dict[Region, str]:
        """The regions about an object that its prepared cloud has not, each with the reason."""
        return {
            region: f"no object {region.object} among {scene.ids}; with fewer than {MIN_POINTS} points it is none"
            for region in regions
            if (scene := self.scenes.get(region.cloud)) and region.object is not None and region.object not in scene.ids
        }

    def add(self, cloud: Path, boxes: Boxes | None = None, unit: str = "m") -> Objects:
        """Encode one cloud with given boxes, or with proposals, and remember it; `unit` is of the points and boxes."""
        self.scenes[cloud] = self._encode(cloud, boxes, unit)
        return self.scenes[cloud]

    def __call__(self, regions: list[Region]) -> dict[str, torch.Tensor]:
        """{"objects": [N, P, C], "boxes": [N, P, 6], "object_mask": [N, P] bool}, P the most objects of one of them."""
        scenes = []
        for region in regions:
            if region.cloud not in self.scenes:
                self.scenes[region.cloud] = self._encode(region.cloud)
            scene = self.scenes[region.cloud]
            scenes.append(scene if region.object is None else scene.only(region.object))
        most = max(len(scene.ids) for scene in scenes)
        features = torch.zeros(len(scenes), most, scenes[0].features.shape[1], dtype=torch.float16)
        boxes, mask = torch.zeros(len(scenes), most, 6), torch.zeros(len(scenes), most, dtype=torch.bool)
        for row, scene in enumerate(scenes):
            count = len(scene.ids)
            features[row, :count], boxes[row, :count], mask[row, :count] = scene.features, scene.boxes, True
        return {"objects": features, "boxes": boxes, "object_mask": mask}

    def _encode(self, path: Path, boxes: Boxes | None = None, unit: str = "m") -> Objects:
        if self.encoder is None:
            raise ValueError(f"{path}: a model without a point encoder reads precomputed objects only")
        cloud = read_cloud(path, unit)
        numbered = False
        if boxes is None and path.suffix == ".npz":
            boxes = boxes_within(path)
            numbered = boxes is not None
        if boxes is not None:
            boxes = Boxes(boxes.boxes * np.float32(UNITS[unit]), boxes.names)
        return encode_objects(self.encoder, cloud, boxes, numbered)

    def _state(self) -> str:
        """Names the function that the encoder computes."""
        digest = hashlib.sha256()
        if self.encoder is not None:
            for name, value in sorted(self.encoder.state_dict().items()):
                digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item():.9e}".encode())
        return digest.hexdigest()


def _key(state: str, paths: list[Path]) -> str:
    """Name a shard by what it holds: the encoder's weights and the files."""
    digest = hashlib.sha256(state.encode())
    for path in paths:
        known = path.stat() if path.exists() else None
        digest.update(f"{path.resolve()} {known and (known.st_size, known.st_mtime_ns)}".encode())
    return f"objects-{digest.hexdigest()[:24]}"


def _is_whole(place: Path) -> bool:
    try:
        storage.check(place)
    except storage.DamagedError:
        return False
    return True
