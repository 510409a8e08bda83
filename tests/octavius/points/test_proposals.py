"""Boxes given, cropped, proposed."""

import json

import numpy as np
import pytest

from octavius.points.cloud import PointCloud
from octavius.points.proposals import Boxes, boxes_within, crop, objects_of, propose, read_boxes

BOX = np.array([0, 1, 2, 3, 5, 7], np.float32)
CORNERS = np.array([[x, y, z] for x in (0, 3) for y in (1, 5) for z in (2, 7)], np.float64)


def room(rng, boxes):
    """Floor, two walls, and solid blocks."""
    parts = [rng.uniform([-3, -2, 0], [3, 2, 0.01], (4000, 3)), rng.uniform([-3, 2, 0], [3, 2.01, 2.5], (3000, 3))]
    parts += [rng.uniform([-3, -2, 0], [-2.99, 2, 2.5], (2000, 3))]
    parts += [rng.uniform(box[:3], box[3:], (800, 3)) for box in boxes]
    return PointCloud(np.concatenate(parts).astype(np.float32))


BLOCKS = np.array(
    [[-2, -1.2, 0.1, -1.2, -0.4, 1], [0, 0, 0.1, 1.5, 0.8, 0.7], [2, -1.5, 0.1, 2.5, -1, 1.8]], np.float32
)


def test_layouts_give_the_same_box(tmp_path):
    (tmp_path / "scene").mkdir()
    np.save(tmp_path / "scene/10-tv-stand.npy", CORNERS)
    np.save(tmp_path / "scene/9-chair.npy", BOX)
    np.save(tmp_path / "corners.npy", CORNERS[None])
    np.save(tmp_path / "six.npy", BOX[None])
    (tmp_path / "x.json").write_text(json.dumps([{"bbox": BOX.tolist(), "name": "chair"}]))
    found = read_boxes(tmp_path / "scene")
    assert found.names == ["chair", "tv-stand"] and np.array_equal(found.boxes, [BOX, BOX])  # by number, hyphens kept
    for name in ("corners.npy", "six.npy", "x.json"):
        assert np.array_equal(read_boxes(tmp_path / name).boxes, [BOX])


BAD = {
    "shape": (np.zeros((2, 5)), "8 corners or"),
    "upside down": (-BOX[None], "8 corners or"),
    "NaN": (np.full((1, 6), np.nan), "8 corners or"),
    "no extent": (np.ones((1, 6)), "8 corners or"),
    "none": (np.zeros((0, 6)), "at least one box"),
}


@pytest.mark.parametrize(("array", "message"), BAD.values(), ids=BAD)
def test_bad_boxes_are_named(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=rf"x\.npy: .*{message}"):
        read_boxes(tmp_path / "x.npy")


def test_empty_file_of_boxes_is_named(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.npy: cannot be read as boxes"):
        read_boxes(tmp_path / "x.npy")


def test_boxes_within_a_cloud(tmp_path):
    file = tmp_path / "x.npz"
    for boxes in (BOX[None], CORNERS[None]):
        np.savez(file, boxes=boxes, ids=[7])
        found = boxes_within(file)
        assert found and np.array_equal(found.boxes, [BOX]) and found.names == ["7"]
    np.savez(file, xyz=CORNERS)
    assert boxes_within(file) is None
    for arrays, message in (
        ({"boxes": np.zeros((2, 5))}, "boxes cannot be read: a box must be 8 corners"),
        ({"boxes": np.zeros((0, 6))}, "boxes cannot be read"),
        ({"boxes": BOX[None], "ids": [1, 2]}, "ids must be 1 different whole numbers"),
        ({"boxes": [BOX, BOX], "ids": [3, 3]}, "ids must be 2 different whole numbers"),
        ({"boxes": BOX[None], "ids": [0.5]}, "ids must be 1 different whole numbers"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=rf"x\.npz: .*{message}"):
            boxes_within(file)


def test_crop_takes_what_is_inside():
    xyz = np.random.default_rng(0).uniform(-1, 1, (999, 3)).astype(np.float32)
    boxes = np.array([[-0.5, -1, 0, 0.2, 0.3, 1], [5, 5, 5, 6, 6, 6], [-1, -1, -1, 1, 1, 1]], np.float32)
    for box, found in zip(boxes, crop(PointCloud(xyz), boxes, margin=0.0), strict=True):
        inside = ((xyz >= box[:3]) & (xyz <= box[3:])).all(1)
        assert {tuple(p) for p in found.xyz} == {tuple(p) for p in xyz[inside]}


def test_boxes_outside_the_scene():
    cloud = PointCloud(np.random.default_rng(0).uniform(0, 1, (99, 3)).astype(np.float32))
    near, far = np.array([0, 0, 0, 1, 1, 1], np.float32), np.array([5, 5, 5, 6, 6, 6], np.float32)
    kept, clouds = objects_of(cloud, Boxes(np.stack((far, near)), ["far", "near"]))
    assert kept.names == ["near"] and len(clouds[0]) == 99
    with pytest.raises(ValueError, match=r"none of the 1 boxes holds 8 points .* in metres\?"):
        objects_of(cloud, Boxes(far[None], ["far"]))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_a_room_are_found(seed):
    found = propose(room(np.random.default_rng(seed), BLOCKS), seed=seed).boxes
    for block in BLOCKS:
        shared = np.clip(np.minimum(found[:, 3:], block[3:]) - np.maximum(found[:, :3], block[:3]), 0, None).prod(1)
        union = (found[:, 3:] - found[:, :3]).prod(1) + (block[3:] - block[:3]).prod() - shared
        assert (shared / union).max() > 0.6
    assert len(found) <= 5


def test_single_object_is_one_box():
    cloud = PointCloud(np.random.default_rng(0).normal(0, 0.1, (500, 3)).astype(np.float32))
    kept, clouds = objects_of(cloud)
    assert len(kept) == 1 and np.array_equal(kept.boxes[0], cloud.box) and len(clouds[0]) == 500


def test_proposals_are_repeatable():
    cloud = room(np.random.default_rng(1), BLOCKS)
    assert np.array_equal(propose(cloud).boxes, propose(cloud).boxes)
