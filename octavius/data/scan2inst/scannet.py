"""Annotated scans in their published layouts → scenes that Scan2Inst asks about.

scans/{scene}/{scene}_vh_clean_2.ply                        the mesh (ScanNet, Dai et al. 2017)
scans/{scene}/{scene}_vh_clean.aggregation.json             objects: {"segGroups": [{"objectId", "label", "segments"}]}
scans/{scene}/{scene}_vh_clean_2.0.010000.segs.json         the segment of every vertex: {"segIndices"}
scans/{scene}/{scene}.txt                                   `axisAlignment`, 16 numbers
ScanRefer: [{"scene_id", "object_id", "description"}]       captions (Chen et al. 2020)
ScanQA: [{"scene_id", "question", "answers"}]               questions (Azuma et al. 2022)
Nr3D, a CSV file: scan_id, target_id, utterance             captions (Achlioptas et al. 2020)
"""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from octavius.data.scan2inst.relations import Box3D, Scene, SceneObject, colour_name
from octavius.inputs.documents import read_json
from octavius.points.cloud import PointCloud, checked
from octavius.points.proposals import MIN_POINTS

IGNORED = ("wall", "floor", "ceiling", "object", "unknown", "remove")
Captions = dict[tuple[str, int], list[str]]
Questions = dict[str, list[tuple[str, list[str]]]]


def read_scans(
    root: Path,
    scenes: Iterable[str],
    clouds: Path,
    captions: Captions | None = None,
    questions: Questions | None = None,
) -> list[Scene]:
    """Read scans, aligned to their axes, and write each with its boxes as a cloud of mini-Scan2Inst's form.

    Args:
        root: the folder `scans`.
        scenes: names such as scene0000_00.
        clouds: receives the files; the scenes name them from its parent.
        captions: of objects, from `read_captions`.
        questions: of scenes, from `read_questions`.
    Raises:
        ValueError: a file is missing or of another layout; it is named.
    """
    clouds.mkdir(parents=True, exist_ok=True)
    found = []
    for name in scenes:
        cloud, objects = _scan(root / name, name)
        boxes, items = [], []
        for number, (label, rows) in sorted(objects.items()):
            points = cloud[rows]
            if len(points) < MIN_POINTS:  # the model would not see it
                continue
            box: Box3D = tuple(round(float(value), 4) for value in points.box)  # type: ignore[assignment]
            colour = "" if points.rgb is None else colour_name(points.rgb)
            said = tuple((captions or {}).get((name, number), ()))
            items.append(SceneObject(number, label, box, colour, said))
            boxes.append(points.box)
        if not items:
            raise ValueError(f"{root / name}: must hold at least one object besides walls and floor")
        ids = np.array([item.id for item in items], np.int32)
        grey = np.full_like(cloud.xyz, 0.5) if cloud.rgb is None else cloud.rgb
        rgb = np.round(grey * 255).astype(np.uint8)
        np.savez(clouds / f"{name}.npz", xyz=cloud.xyz, rgb=rgb, boxes=np.stack(boxes), ids=ids)
        room: Box3D = tuple(float(value) for value in cloud.box)  # type: ignore[assignment]
        asked = (questions or {}).get(name, [])
        found.append(Scene(name, f"{clouds.name}/{name}.npz", room, items, asked))
    return found


def read_captions(file: Path) -> Captions:
    """ScanRefer's JSON or Nr3D's CSV: what people wrote of an object, by scene and number."""
    found: Captions = defaultdict(list)
    try:
        if file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream):
                    found[row["scan_id"], int(row["target_id"])].append(_sentence(row["utterance"]))
        else:
            for item in read_json(file):
                found[item["scene_id"], int(item["object_id"])].append(_sentence(item["description"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read as ScanRefer or Nr3D: {type(error).__name__} {error}") from error
    return dict(found)


def read_questions(file: Path) -> Questions:
    """ScanQA's JSON: questions and their answers by scene; the test split has no answers and is left out."""
    found: Questions = defaultdict(list)
    try:
        for item in read_json(file):
            if answers := item.get("answers"):
                found[item["scene_id"]].append((item["question"], [str(answer) for answer in answers]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as ScanQA: {type(error).__name__} {error}") from error
    return dict(found)


def _sentence(text: str) -> str:
    return " ".join(text.split()).strip()


def _scan(folder: Path, name: str) -> tuple[PointCloud, dict[int, tuple[str, np.ndarray]]]:
    """The vertices in aligned axes, and the label and vertices of every object."""
    mesh = folder / f"{name}_vh_clean_2.ply"
    try:
        loaded: Any = trimesh.load(mesh, process=False)
        xyz = np.asarray(loaded.vertices, np.float64)
        visual = loaded.visual  # of no kind where the file has no colours; trimesh then answers with its own grey
        colours = np.asarray(getattr(visual, "vertex_colors", ()) if visual.kind else ())
        segments = np.array(_json(folder / f"{name}_vh_clean_2.0.010000.segs.json")["segIndices"])
        groups = _json(folder / f"{name}_vh_clean.aggregation.json")["segGroups"]
        if len(segments) != len(xyz):
            raise ValueError(f"{len(segments)} segment indices for {len(xyz)} vertices")
        objects = {}
        for group in groups:
            rows = np.flatnonzero(np.isin(segments, group["segments"]))
            if len(rows) and group["label"] not in IGNORED:
                objects[int(group["objectId"])] = (str(group["label"]), rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: cannot be read as a ScanNet scan: {error}") from error
    axes = _alignment(folder / f"{name}.txt")
    xyz = (xyz @ axes[:3, :3].T + axes[:3, 3]).astype(np.float32)
    rgb = colours[:, :3].astype(np.float32) / 255 if len(colours) == len(xyz) else None
    cloud = checked(PointCloud(xyz, rgb), str(mesh))
    if len(cloud) != len(xyz):
        raise ValueError(f"{mesh}: {len(xyz) - len(cloud)} vertices have no finite coordinates")
    return cloud, objects


def _alignment(file: Path) -> np.ndarray:
    """The 4×4 matrix of `axisAlignment`; the identity where a scan has none, as the test scans."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            try:
                return np.array([float(number) for number in value.split()]).reshape(4, 4)
            except ValueError as error:
                raise ValueError(f"{file}: axisAlignment must be 16 numbers, got {value.strip()!r}") from error
    return np.eye(4)


def _json(file: Path) -> Any:
    return read_json(file)
