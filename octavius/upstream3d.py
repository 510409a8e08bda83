"""Upstream's Scan2Inst files as they are: `scan2inst_train.json` with features per object, or `.pickle`.

    {root}/lamm_scannet_tr3d/{ins_pc_feat,bbox}/{scene}/{id}-{name}.npy      detected objects: features, 8×3 corners
    {root}/lamm_scannet_gt/{ins_pc_feat,bbox}/{scene}/{id}-{name}.npy        annotated objects

A pickle is a program: this one is read by an unpickler that builds lists, dictionaries, numbers, texts, numpy arrays
and torch tensors, and refuses every other type.
"""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavius.candidates import read_boxes
from octavius.objects import Objects

LISTS = (
    "caption_list",
    "task_type_list",
    "vision_embeds_3d_ref_list",
    "vision_embeds_3d_scene_prop_list",
    "vision_pos_3d_ref_list",
    "vision_pos_3d_scene_prop_list",
)
ABOUT_ONE = ("classification3d", "description3d")  # tasks that see their object alone
REFERENCE = -1  # number of the object that a record of these tasks is about


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """What torch pickles a tensor as, rebuilt within its storage's bounds."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else offset - 1
    if not isinstance(storage, torch.Tensor) or min((offset, *size, *stride)) < 0 or last >= storage.numel():
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset).clone()


def _storage(data: bytes) -> torch.Tensor:
    """A storage that was pickled by value, in the format of `torch.save`."""
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        return loaded.flatten()
    return torch.tensor([], dtype=loaded.dtype).set_(loaded._untyped_storage)


def _array_types() -> dict[tuple[str, str], Any]:
    """numpy's own pickling functions, under the names that its versions 1 and 2 write."""
    found: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    functions: dict[str, Callable] = {
        "_reconstruct": np.ndarray(0).__reduce__()[0],  # type: ignore[dict-item]
        "scalar": np.float32(0).__reduce__()[0],  # type: ignore[dict-item]
    }
    for name, function in functions.items():
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            found[module, name] = function
    return found


def _latin(text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text may be encoded as latin1 only, got {encoding!r}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _latin,
    **_array_types(),
}


class Unpickler(pickle.Unpickler):
    """Builds what ALLOWED lists and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the type {module}.{name} is not allowed")
        return ALLOWED[module, name]


def read_pickle(file: Path) -> tuple[list[dict[str, Any]], dict[Path, Objects]]:
    """Upstream's `scan2inst_train.pickle`, or one of its 3D benchmark.

    Returns:
        records as `read_records` takes them, and the objects of every one.
    Raises:
        ValueError: another content, or a type that the file must not hold.
    """
    try:
        with file.open("rb") as stream:
            data = Unpickler(stream).load()
        columns = [data[name] for name in LISTS]
        count = len(columns[0])
        if any(len(column) != count for column in columns):
            raise ValueError(f"its lists must be equally long, got {[len(column) for column in columns]}")
    except (
        OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, IndexError,
        ImportError, RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        raise ValueError(f"{file}: cannot be read as a Scan2Inst pickle: {error}") from error
    names = data.get("scene_id_list") or [str(row) for row in range(count)]
    records, scenes = [], {}
    for row, (turns, task, ref, props, ref_box, boxes) in enumerate(zip(*columns, strict=True)):
        key = Path(f"{names[row]}#{row}")
        one = task in ABOUT_ONE
        try:
            scenes[key] = _objects(ref[None], ref_box[None], [REFERENCE]) if one else _objects(props, boxes)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{file}: record {row}: {error}") from error
        records.append(
            {"id": str(key), "scene_id": str(names[row]), "pcl": str(key), "task_type": task, "conversations": turns}
            | ({"object_id": REFERENCE} if one else {})
        )
    return records, scenes


def read_layout(file: Path, root: Path) -> tuple[list[dict[str, Any]], dict[Path, Objects]]:
    """Upstream's JSON with one feature file and one box file per object under `root`.

    Records about one object take it from `lamm_scannet_gt`, records about a scene the detected ones of
    `lamm_scannet_tr3d`.
    """
    records, scenes = [], {}
    for index, item in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        one = item.get("task_type") in ABOUT_ONE
        source = root / ("lamm_scannet_gt" if one else "lamm_scannet_tr3d")
        try:
            key = source / "ins_pc_feat" / item["scene_id"]
            if key not in scenes:
                scenes[key] = _folder(source, item["scene_id"])
            if one and int(item["object_id"]) not in scenes[key].ids:
                raise ValueError(f"no object {item['object_id']} in {key}")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: record {index}: {error}") from error
        records.append(item | {"pcl": str(key)} | ({"object_id": int(item["object_id"])} if one else {}))
    return records, scenes


def _folder(source: Path, scene: str) -> Objects:
    """The objects of one scene, in the order of their numbers."""
    boxes = read_boxes(source / "bbox" / scene)
    files = sorted((source / "bbox" / scene).glob("*.npy"), key=lambda f: (len(f.stem.partition("-")[0]), f.stem))
    features = [np.load(source / "ins_pc_feat" / scene / file.name, allow_pickle=False) for file in files]
    ids = [int(file.stem.partition("-")[0]) for file in files]  # a name may hold further hyphens
    return _objects(np.stack([row.reshape(-1) for row in features]), boxes.boxes, ids)


def _objects(features: Any, boxes: Any, ids: list[int] | None = None) -> Objects:
    features, boxes = torch.as_tensor(features), torch.as_tensor(boxes)
    if features.ndim != 2 or boxes.shape != (len(features), 6) or not len(features):
        shapes = tuple(features.shape), tuple(boxes.shape)
        raise ValueError(f"objects must have features [P, C] and boxes [P, 6], got {shapes}")
    if not (features.isfinite().all() and boxes.isfinite().all()):
        raise ValueError("features and boxes must be finite")
    return Objects(features.half(), boxes.float(), ids or list(range(len(features))))
