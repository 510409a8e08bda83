"""JSON and YAML of users, numbers out of range, arrays that lie, boxes: one line each."""

import dataclasses
import io
import re
import zipfile

import numpy as np
import pytest
import torch

from octavius import config
from octavius.config import Config, load_config
from octavius.data.scan2inst.released import read_pickle
from octavius.inputs.arrays import read_array, read_arrays
from octavius.inputs.boxes import fraction_box
from octavius.inputs.documents import parse_yaml, read_json, read_yaml
from octavius.points.cloud import read_cloud

DEEP = {"json": (read_json, "["), "yaml list": (read_yaml, "["), "yaml mapping": (read_yaml, "{a: ")}


@pytest.mark.parametrize(("read", "deep"), DEEP.values(), ids=DEEP)
def test_deep_nesting_and_byte_order_mark(tmp_path, read, deep):
    path = tmp_path / "file"
    path.write_text(deep * 50_000)
    with pytest.raises(ValueError, match=r"file: .*nested too deeply") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read(path) == [1]
    with pytest.raises(ValueError, match="none: cannot be read"):
        read(tmp_path / "none")


def test_impossible_values_of_yaml_are_named():
    with pytest.raises(ValueError, match="run: not valid YAML"):
        parse_yaml("a: 2026-99-99", "run")


WRONG = {
    "train.gradient_accumulation": (0, "at least 1"),
    "train.epochs": (-1, "above 0"),
    "train.steps": (0, "-1 or at least 1"),
    "train.batch_size": (0, "at least 1"),
    "train.learning_rate": (".inf", "above 0"),
    "train.warmup": (1.5, "at least 0 and at most 1"),
    "train.weight_decay": (".nan", "at least 0"),
    "train.seed": (-3, "at least 0"),
    "data.max_tokens": (0, "at least 1"),
    "data.loop": (-1, "at least 0"),
    "model.tower_merge": (0, "at least 1"),
    "model.tower_layer": (9999, "at least -200 and at most 200"),
    "model.clouds.queries": (-1, "at least 1"),
    "model.clouds.dropout": (1, "at least 0 and below 1"),
    "model.gate.load_balancing": (-0.1, "at least 0"),
}


@pytest.mark.parametrize("key", WRONG)
def test_number_out_of_range_is_an_error_when_it_is_read(key):
    value, message = WRONG[key]
    with pytest.raises(ValueError, match=rf"{key.split('.')[-1]}: must be {message}") as caught:
        load_config("mini-2d+3d", [f"{key}={value}"])
    assert "\n" not in str(caught.value)


def test_every_numeric_field_has_a_range():
    def numeric(cls):
        for field in dataclasses.fields(cls):
            if re.search(r"\b(int|float)\b", str(field.type)):
                yield field.name

    kinds = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]
    kinds = [kind for kind in kinds if kind.__module__ == config.__name__]
    assert Config in kinds and len(kinds) >= 6
    for kind in kinds:
        assert set(config.RANGES.get(kind, {})) == set(numeric(kind)), kind


def npy(shape, magic=b"\x93NUMPY\x01\x00", dtype="<f4"):
    """An .npy file of twelve numbers whose header claims another shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return magic + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + np.arange(12, dtype="<f4").tobytes()


LIES = {
    "rows": (npy("(1000000000000, 3)"), "its header claims .*12000000000000 bytes, and the file has"),
    "header": (npy("(4, 3"), "cannot be read as"),
    "magic": (npy("(4, 3)", b"\x93NUMPX\x01\x00"), "cannot be read as"),
    "version": (npy("(4, 3)", b"\x93NUMPY\x09\x00"), "cannot be read as"),
    "negative": (npy("(-4, 3)"), "cannot be read as"),
    "objects": (npy("(1,)", dtype="|O"), "cannot be read as"),
    "empty": (b"", "cannot be read as"),
}


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES)
def test_array_that_lies_is_refused(tmp_path, data, message):
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("xyz.npy", data)
    for read in (read_array, read_cloud):
        with pytest.raises(ValueError, match=f"a.npy: .*{message}") as caught:
            read(tmp_path / "a.npy")
        assert "\n" not in str(caught.value)
    for read in (read_cloud, lambda path: read_arrays(path, ("xyz",))):
        with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
            read(tmp_path / "a.npz")


def test_array_that_is_honest_is_read(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy("(4, 3)"))
    assert read_array(tmp_path / "a.npy").shape == (4, 3)
    np.savez(tmp_path / "a.npz", xyz=np.ones((2, 3)), ids=np.arange(2))
    assert set(read_arrays(tmp_path / "a.npz", ("xyz", "rgb"))) == {"xyz"}
    with pytest.raises(ValueError, match="cannot be read as arrays"):
        read_arrays(tmp_path / "a.npy", ("xyz",))


BOXES = {
    "pixels": ([12, 30, 200, 180], "are these pixels"),
    "nan": ([0, 0, float("nan"), 1], "finite"),
    "inverted": ([0.5, 0, 0.2, 1], "x1 <= x2"),
    "three": ([0, 0, 1], "four finite numbers"),
    "words": (["a", 0, 1, 1], "four numbers"),
    "huge": ([0, 0, 10**400, 1], "four numbers"),
}


@pytest.mark.parametrize(("values", "message"), BOXES.values(), ids=BOXES)
def test_box_that_is_none(values, message):
    with pytest.raises(ValueError, match=message):
        fraction_box(values)


def test_box_over_the_edge_is_cut():
    assert fraction_box([-0.01, 0.2, 1.02, "0.9"]) == [0.0, 0.2, 1.0, 0.9]


def test_pickle_whose_tensor_is_larger_than_its_storage(tmp_path):
    """Strides of 0 let a few bytes ask for 8 GB."""
    import pickle

    class Stretched:
        def __reduce__(self):
            storage = torch.ones(1).untyped_storage()
            shared = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (shared, 0, (2**31,), (0,), False, {})

    stream = io.BytesIO()
    pickle.dump({"caption_list": [Stretched()]}, stream)
    (tmp_path / "small.pickle").write_bytes(stream.getvalue())
    assert len(stream.getvalue()) < 2000
    with pytest.raises(ValueError, match=r"small\.pickle: .*1 stored numbers claims to have 2147483648"):
        read_pickle(tmp_path / "small.pickle")
