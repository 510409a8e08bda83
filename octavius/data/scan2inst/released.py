"""Upstream's Scan2Inst files as they are: `scan2inst_train.json` with features per object, or `.pickle`.

    {root}/lamm_scannet_tr3d/{ins_pc_feat,bbox}/{scene}/{id}-{name}.npy      detected objects: features, 8×3 corners
    {root}/lamm_scannet_gt/{ins_pc_feat,bbox}/{scene}/{id}-{name}.npy        annotated objects

A pickle is a program: this one is read by an unpickler that builds lists, dictionaries, numbers, texts, numpy arrays
and torch tensors, and refuses every other type.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavius.inputs.arrays import read_array
from octavius.inputs.documents import read_json
from octavius.points.object_store import Objects
from octavius.points.proposals import read_boxes

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
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError(f"a tensor of {storage.numel()} stored numbers claims to have {math.prod(size)}")
    return storage.as_strided(size, stride, offset).clone()


def _storage(data: bytes) -> torch.Tensor:
    """A storage that was pickled by value, in the format of `torch.save`."""
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        return loaded.flatten()
    return torch.tensor([], dtype=loaded.dtype).set_(loaded._untyped_storage)


class _Dtype:
    """Stands for `numpy.dtype`: plain numbers and texts; of the pickled state only the order of the bytes is read."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufSU]\d{1,6}", code):
            raise pickle.UnpicklingError(f"the dtype {code!r} is not allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for `numpy.ndarray`: numpy's own would take pointers to objects from the file."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, columns_first, data = state
        self.array = _values(dtype, data).reshape(shape, order="F" if columns_first else "C")


def _values(dtype: _Dtype, data: bytes) -> np.ndarray:
    """Numbers or texts out of their bytes, in the machine's order."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("an array must be a dtype and bytes")
    return np.frombuffer(data, dtype.dtype).astype(dtype.dtype.newbyteorder("="))


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return _values(dtype, data).reshape(())[()]


def _plain(value: Any) -> Any:
    """What was unpickled, with real arrays for the stand-ins."""
    if not isinstance(value, _Array):
        return value
    if value.array is None:
        raise ValueError("an array has no content")
    return value.array


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
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and 2
    ALLOWED |= {(_module, "_reconstruct"): _reconstruct, (_module, "scalar"): _scalar}


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
        columns = [[_plain(value) for value in _plain(data[name])] for name in LISTS]
        names = [str(name) for name in _plain(data.get("scene_id_list", ()))]
        count = len(columns[0])
        if any(len(column) != count for column in columns):
            raise ValueError(f"its lists must be equally long, got {[len(column) for column in columns]}")
    except (
        OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, IndexError,
        ImportError, RuntimeError, MemoryError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"{file}: cannot be read as a Scan2Inst pickle: {error}") from error
    names = names or [str(row) for row in range(count)]
    records, scenes = [], {}
    for row, (turns, task, ref, props, ref_box, boxes) in enumerate(zip(*columns, strict=True)):
        key = Path(f"{names[row]}#{row}")
        one = task in ABOUT_ONE
        try:
            scenes[key] = _objects(ref[None], ref_box[None], [REFERENCE]) if one else _objects(props, boxes)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{file}: record {row}: {error}") from error
        records.append(
            {"id": str(key), "scene_id": names[row], "pcl": str(key), "task_type": task, "conversations": turns}
            | ({"object_id": REFERENCE} if one else {})
        )
    return records, scenes


def read_layout(file: Path, root: Path) -> tuple[list[dict[str, Any]], dict[Path, Objects]]:
    """Upstream's JSON with one feature file and one box file per object under `root`.

    Records about one object take it from `lamm_scannet_gt`, records about a scene the detected ones of
    `lamm_scannet_tr3d`.
    """
    records, scenes = [], {}
    items = read_json(file)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{file}: must be a list of records")
    for index, item in enumerate(items):
        one = item.get("task_type") in ABOUT_ONE
        source = root / ("lamm_scannet_gt" if one else "lamm_scannet_tr3d")
        try:
            key = source / "ins_pc_feat" / item["scene_id"]
            if key not in scenes:
                scenes[key] = _folder(source, item["scene_id"])
            if one and int(item["object_id"]) not in scenes[key].ids:
                raise ValueError(f"no object {item['object_id']} in {key}")
        except (OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{file}: record {index}: {error}") from error
        records.append(item | {"pcl": str(key)} | ({"object_id": int(item["object_id"])} if one else {}))
    return records, scenes


def _folder(source: Path, scene: str) -> Objects:
    """The objects of one scene, in the order of their numbers."""
    boxes = read_boxes(source / "bbox" / scene)
    files = sorted((source / "bbox" / scene).glob("*.npy"), key=lambda f: (len(f.stem.partition("-")[0]), f.stem))
    features = [read_array(source / "ins_pc_feat" / scene / file.name) for file in files]
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
