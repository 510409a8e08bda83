"""Upstream's Scan2Inst files load as they are; a hostile pickle builds nothing."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from octavius.data.loading import read_scenes
from octavius.data.scan2inst import released
from octavius.points.object_store import ObjectStore, Region

TURNS = [{"from": "human", "value": "<pcl>\nWhat is it?"}, {"from": "gpt", "value": "a chair"}]


def content():
    torch.manual_seed(0)
    return {
        "caption_list": [TURNS, TURNS],
        "task_type_list": ["classification3d", "VQA3D"],
        "vision_embeds_3d_ref_list": [torch.randn(8).half(), torch.zeros(8).half()],
        "vision_embeds_3d_scene_prop_list": [torch.randn(3, 8).half(), torch.randn(2, 8).half()],
        "vision_pos_3d_ref_list": [torch.rand(6).half(), torch.zeros(6).half()],
        "vision_pos_3d_scene_prop_list": [torch.rand(3, 6).half(), torch.rand(4, 6).half()[::2]],
        "max_proposal_num": 3,
        "scene_id_list": ["scene0000_00", "scene0000_00"],
    }


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_loads(tmp_path, protocol):
    data = content()
    (tmp_path / "scan2inst_train.pickle").write_bytes(pickle.dumps(data, protocol))
    records, scenes = read_scenes(tmp_path / "scan2inst_train.pickle")
    assert [record.turns for record in records] == [[("What is it?", "a chair")]] * 2
    batch = ObjectStore(scenes=scenes)([record.cloud for record in records])
    assert batch["object_mask"].tolist() == [[True, False], [True, True]]
    assert torch.equal(batch["objects"][0, 0], data["vision_embeds_3d_ref_list"][0])
    assert torch.equal(batch["objects"][1], data["vision_embeds_3d_scene_prop_list"][1])
    assert torch.equal(batch["boxes"][1], data["vision_pos_3d_scene_prop_list"][1].float())


def test_pickled_numpy_arrays_load(tmp_path):
    data = content()
    data["vision_embeds_3d_scene_prop_list"] = [t.numpy() for t in data["vision_embeds_3d_scene_prop_list"]]
    data["max_proposal_num"] = np.int64(3)
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(data))
    _, scenes = released.read_pickle(tmp_path / "x.pickle")
    want = torch.from_numpy(data["vision_embeds_3d_scene_prop_list"][1])
    assert torch.equal(list(scenes.values())[1].features, want)


def test_array_is_built_of_its_bytes_alone():
    numbers = np.arange(6, dtype=">i2").reshape(2, 3)
    for array in (numbers, np.asfortranarray(numbers), np.array(["chair", "tv"]), np.zeros((0, 3), np.float32)):
        found = released.Unpickler(io.BytesIO(pickle.dumps(array, 4))).load().array
        assert np.array_equal(found, array) and found.shape == array.shape and found.flags.writeable
    for shape, data in (((3,), b"A" * 16), ((2,), ["x", "y"]), ((2**70,), b"A" * 16)):
        state = (1, shape, released._Dtype("f8"), False, data)
        with pytest.raises((ValueError, OverflowError, pickle.UnpicklingError)):
            released._Array().__setstate__(state)


class Hostile:
    def __init__(self, function, *arguments, state=None):
        self.made = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self):
        return self.made


def boom(*arguments):
    raise AssertionError("the pickle ran a program")


RECONSTRUCT = np.ndarray(0).__reduce__()[0]


def pointers(code, flags):
    """An array of objects whose addresses are bytes of the file."""
    dtype = Hostile(np.dtype, code, False, True, state=(3, "|", None, None, None, -1, -1, flags))
    return Hostile(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), dtype, False, b"A" * 8))


HOSTILE = {
    "own function": Hostile(boom, 1),
    "eval": Hostile(eval, "boom()"),
    "getattr": Hostile(getattr, "x", "upper"),
    "numpy load": Hostile(np.load, "x.npy"),
    "torch load": Hostile(torch.load, "x.pt"),
    "nested pickle": Hostile(pickle.loads, b"N."),
    "pointers": pointers("O8", 0),
    "pointers marked as such": pointers("O8", 63),
    "structure": pointers("V8", 0),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickle_builds_nothing(tmp_path, value):
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(content() | {"more": value}))
    with pytest.raises(ValueError, match=r"x\.pickle: cannot be read .* is not allowed"):
        released.read_pickle(tmp_path / "x.pickle")


def test_tensor_beyond_its_storage_is_refused():
    storage = torch.zeros(4)
    assert released._tensor(storage, 1, (3,), (1,), False).shape == (3,)
    for arguments in ((1, (4,), (1,)), (0, (2, 3), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))):
        with pytest.raises(pickle.UnpicklingError, match="beyond its storage"):
            released._tensor(storage, *arguments)


@pytest.mark.parametrize("data", [b"", b"N.", b"}.", pickle.dumps(content())[:200], b"\xff" * 50])
def test_damaged_pickle_is_named(tmp_path, data):
    (tmp_path / "x.pickle").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.pickle: cannot be read as a Scan2Inst pickle"):
        released.read_pickle(tmp_path / "x.pickle")


def test_lists_and_shapes_are_checked(tmp_path):
    for key, value, message in (
        ("task_type_list", ["VQA3D"], "equally long"),
        ("vision_pos_3d_scene_prop_list", [torch.rand(3, 6), torch.rand(2, 5)], "record 1: objects must have"),
        ("vision_embeds_3d_scene_prop_list", [torch.rand(3, 8), torch.full((2, 8), torch.nan)], "record 1: .* finite"),
    ):
        (tmp_path / "x.pickle").write_bytes(pickle.dumps(content() | {key: value}))
        with pytest.raises(ValueError, match=message):
            released.read_pickle(tmp_path / "x.pickle")


def layout(root):
    """Two detected objects and two annotated ones of one scene; one name has hyphens."""
    rng = np.random.default_rng(0)
    corners = rng.random((8, 3))
    for source, names in (("lamm_scannet_tr3d", ("0-chair", "1-tv-stand")), ("lamm_scannet_gt", ("4-sofa", "12-bed"))):
        for part, value in (("ins_pc_feat", rng.random(8)), ("bbox", corners)):
            (root / source / part / "scene0000_00").mkdir(parents=True)
            for name in names:
                np.save(root / source / part / "scene0000_00" / f"{name}.npy", value)
    items = [
        {"task_type": "VQA3D", "conversations": TURNS, "scene_id": "scene0000_00"},
        {"task_type": "description3d", "conversations": TURNS, "scene_id": "scene0000_00", "object_id": "12"},
    ]
    (root / "meta_file").mkdir()
    (root / "meta_file/scan2inst_train.json").write_text(json.dumps(items))
    return corners


def test_folder_layout_loads(tmp_path):
    corners = layout(tmp_path)
    records, scenes = read_scenes(tmp_path / "meta_file/scan2inst_train.json")
    batch = ObjectStore(scenes=scenes)([record.cloud for record in records])
    assert batch["object_mask"].tolist() == [[True, True], [True, False]]
    want = torch.from_numpy(np.concatenate((corners.min(0), corners.max(0)))).float()
    torch.testing.assert_close(batch["boxes"][1, 0], want)
    assert records[1].cloud.object == 12 and records[0].cloud.object is None


def test_missing_object_is_named(tmp_path):
    layout(tmp_path)
    file = tmp_path / "meta_file/scan2inst_train.json"
    file.write_text(file.read_text().replace('"12"', '"13"'))
    with pytest.raises(ValueError, match=r"record 1: no object 13"):
        read_scenes(file)


def test_store_without_encoder_refuses_clouds(tmp_path):
    with pytest.raises(ValueError, match="precomputed objects only"):
        ObjectStore()([Region(tmp_path / "x.npy")])
