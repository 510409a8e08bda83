"""Scans in the published layouts, written here, become scenes and clouds that the rest reads."""

import json

import numpy as np
import pytest
import torch
import trimesh

from octavius.data.scan2inst.questions import Builder
from octavius.data.scan2inst.scannet import read_captions, read_questions, read_scans
from octavius.points.object_store import ObjectStore, Region
from octavius.points.pointbert import PointBert
from tests.octavius.points.test_pointbert import TINY

NAME = "scene0000_00"
NAMED = ("_2.0.010000.segs", ".aggregation")  # files of segments and of objects


def scan(root, turn=0.0, shift=(1.0, 2.0, 0.5)):
    """A brown table, a red chair and a floor, in axes that the text file turns back."""
    folder = root / NAME
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = [
        (rng.uniform([0, 0, 0], [1, 1, 0.7], (60, 3)), (110, 70, 40)),
        (rng.uniform([2, 0, 0], [2.5, 0.5, 1], (50, 3)), (200, 20, 20)),
        (rng.uniform([-1, -1, 0], [4, 3, 0.02], (90, 3)), (90, 90, 90)),
    ]
    aligned = np.concatenate([points for points, _ in parts])
    colours = np.concatenate([np.tile(rgb, (len(points), 1)) for points, rgb in parts]).astype(np.uint8)
    axes = np.eye(4)
    axes[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    axes[:3, 3] = shift
    raw = (aligned - axes[:3, 3]) @ axes[:3, :3]
    faces = np.arange(len(raw) - len(raw) % 3).reshape(-1, 3)
    trimesh.Trimesh(raw, faces, vertex_colors=colours, process=False).export(folder / f"{NAME}_vh_clean_2.ply")
    segments = np.concatenate((np.repeat([7, 8], 30), np.full(50, 9), np.full(90, 3)))
    (folder / f"{NAME}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments.tolist()}))
    groups = [
        {"objectId": 0, "label": "table", "segments": [7, 8]},
        {"objectId": 5, "label": "chair", "segments": [9]},
        {"objectId": 6, "label": "floor", "segments": [3]},
    ]
    (folder / f"{NAME}_vh_clean.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    numbers = " ".join(f"{value:.6f}" for value in axes.flatten())
    (folder / f"{NAME}.txt").write_text(f"colorHeight = 968\naxisAlignment = {numbers} \n")
    return aligned


@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_scan_is_aligned_and_annotated(tmp_path, turn):
    aligned = scan(tmp_path / "scans", turn)
    (scene,) = read_scans(tmp_path / "scans", [NAME], tmp_path / "clouds")
    assert [(o.id, o.name, o.colour) for o in scene.objects] == [(0, "table", "brown"), (5, "chair", "red")]
    want = np.concatenate((aligned[:60].min(0), aligned[:60].max(0)))
    np.testing.assert_allclose(scene.objects[0].box, want, atol=2e-4)
    store = ObjectStore(PointBert(TINY))
    batch = store([Region(tmp_path / scene.cloud), Region(tmp_path / scene.cloud, 5)])
    assert batch["object_mask"].tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(batch["boxes"][0, 0], torch.tensor(want).float(), atol=2e-4, rtol=0)


def test_scan_without_colours_says_none(tmp_path):
    scan(tmp_path / "scans")
    file = tmp_path / "scans" / NAME / f"{NAME}_vh_clean_2.ply"
    mesh = trimesh.load(file, process=False)
    trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(file)
    (scene,) = read_scans(tmp_path / "scans", [NAME], tmp_path / "clouds")
    assert [item.colour for item in scene.objects] == ["", ""]
    records = Builder(["chair", "table"], per_scene=(2, 2, 6)).write(scene)
    assert not any(record.get("kind") == "colour" or "gray" in str(record) for record in records)


def test_object_of_few_points_is_left_out(tmp_path):
    scan(tmp_path / "scans")
    segments, groups = (tmp_path / "scans" / NAME / f"{NAME}_vh_clean{end}.json" for end in NAMED)
    found, listed = json.loads(segments.read_text()), json.loads(groups.read_text())
    found["segIndices"][-5:] = [11] * 5
    listed["segGroups"].append({"objectId": 9, "label": "cup", "segments": [11]})
    segments.write_text(json.dumps(found))
    groups.write_text(json.dumps(listed))
    (scene,) = read_scans(tmp_path / "scans", [NAME], tmp_path / "clouds")
    assert [item.id for item in scene.objects] == [0, 5]
    assert np.load(tmp_path / scene.cloud)["ids"].tolist() == [0, 5]


def test_what_people_wrote_is_used(tmp_path):
    scan(tmp_path / "scans")
    told = [{"scene_id": NAME, "object_id": "5", "object_name": "chair", "description": "a red  chair. it is small."}]
    (tmp_path / "ScanRefer.json").write_text(json.dumps(told))
    (tmp_path / "nr3d.csv").write_text(
        f'scan_id,target_id,instance_type,utterance\n{NAME},0,table,"the table, brown"\n'
    )
    asked = [
        {"scene_id": NAME, "question": "What is red?", "answers": ["chair", "red chair"], "object_ids": [5]},
        {"scene_id": NAME, "question": "Test?"},
    ]
    (tmp_path / "ScanQA.json").write_text(json.dumps(asked))
    captions = read_captions(tmp_path / "ScanRefer.json") | read_captions(tmp_path / "nr3d.csv")
    assert captions == {(NAME, 5): ["a red chair. it is small."], (NAME, 0): ["the table, brown"]}
    questions = read_questions(tmp_path / "ScanQA.json")
    (scene,) = read_scans(tmp_path / "scans", [NAME], tmp_path / "clouds", captions, questions)
    records = Builder(["chair", "table"], per_scene=(2, 2, 3)).write(scene)
    said = {r["object_id"]: r["sentences"] for r in records if r["benchmark"] == "mini-caption3d"}
    assert said == {5: ["a red chair. it is small."], 0: ["the table, brown"]}
    assert [r["sentences"] for r in records if r["id"].endswith("_q0")] == [["chair", "red chair"]]


BREAK = {
    "no mesh": (lambda f: (f / f"{NAME}_vh_clean_2.ply").unlink(), "ScanNet scan"),
    "segments of another mesh": (
        lambda f: (f / f"{NAME}_vh_clean_2.0.010000.segs.json").write_text('{"segIndices": [1]}'),
        "1 segment indices for 200 vertices",
    ),
    "no groups": (lambda f: (f / f"{NAME}_vh_clean.aggregation.json").write_text("{}"), "segGroups"),
    "axes": (lambda f: (f / f"{NAME}.txt").write_text("axisAlignment = 1 2 3"), "16 numbers"),
    "walls alone": (
        lambda f: (f / f"{NAME}_vh_clean.aggregation.json").write_text('{"segGroups": []}'),
        "at least one object",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BREAK.values(), ids=BREAK)
def test_damaged_scan_is_named(tmp_path, spoil, message):
    scan(tmp_path / "scans")
    spoil(tmp_path / "scans" / NAME)
    with pytest.raises(ValueError, match=rf"{NAME}.*{message}"):
        read_scans(tmp_path / "scans", [NAME], tmp_path / "clouds")


def test_damaged_annotations_are_named(tmp_path):
    (tmp_path / "x.json").write_text('[{"scene_id": "a"}]')
    with pytest.raises(ValueError, match=r"x\.json: cannot be read as ScanRefer"):
        read_captions(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: cannot be read as ScanQA"):
        read_questions(tmp_path / "x.json")
