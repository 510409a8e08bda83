"""mini-Scan2Inst: rooms of real furniture models at their real sizes, with exact boxes, captions and answers.

Rooms are composed without collisions: things stand on the floor, many of them along the walls, small ones on tables,
windows hang. Test rooms show models that training never shows, and `zeroshot.json` a catalogue of its own. Rooms hold
the classes of which FEWEST_MODELS are held out for the tests. Each room is a cloud of its surfaces with 5 mm of noise,
floor and two walls included. The same seed gives the same bytes.
"""

import json
import shutil
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from octavius.assets import registry
from octavius.data.scan2inst import furniture
from octavius.data.scan2inst.furniture import CLASSES, Furniture
from octavius.data.scan2inst.questions import Builder, describe
from octavius.data.scan2inst.relations import Box3D, Scene, SceneObject, colour_name
from octavius.points.cloud import PointCloud

KIND = "mini-scan2inst"  # what the manifest says that the folder holds
VERSION = 4  # of the builder: raise it whenever the same settings give other bytes
SPLITS = ("train", "test", "zeroshot")
DENSITY, FEWEST, MOST = 180.0, 160, 700  # points of an object: per square metre of its box's surface, and limits
NOISE = 0.005  # metres
HEIGHT = 2.6  # of a room
MARGIN = 0.04  # metres between two things, and to a wall
HOLDERS = ("table", "desk", "cabinet", "box", "stool")  # what small things are put on
SMALL = ("lamp", "plant", "television", "box")
LARGEST, THINNEST = 3.2, 0.01  # metres: models beyond these do not go into a room
FEWEST_MODELS = 3  # test models of a class: the score of a class with fewer would be that of one or two shapes


@dataclass(frozen=True)
class RoomCounts:
    """Numbers of rooms per file; each room carries about eight records."""

    train: int
    test: int
    zeroshot: int


PRESETS = {"smoke": RoomCounts(40, 12, 6), "demo": RoomCounts(300, 30, 12), "mini": RoomCounts(1200, 100, 40)}


@dataclass(frozen=True)
class Placed:
    """A model in a room: quarter turns about z, and where the centre of its base is."""

    model: Furniture
    cloud: PointCloud
    turns: int
    place: tuple[float, float, float]

    @property
    def box(self) -> Box3D:
        half = [length / 2 for length in turned(self.model.size, self.turns)[:2]]
        x, y, z = self.place
        return (x - half[0], y - half[1], z, x + half[0], y + half[1], z + self.model.size[2])


def build(folder: str | Path, size: str | RoomCounts = "demo", seed: int = 0) -> Path:
    """Write the data set, or return at once if the folder already holds it with the same settings.

    Args:
        folder: receives train.json, test.json, zeroshot.json, clouds/ and manifest.json, in one rename at the end.
        size: "smoke", "demo", "mini", or numbers of rooms.
    Raises:
        ValueError: unknown size, or the folder holds something that is not a mini-Scan2Inst.
    """
    folder = Path(folder)
    if isinstance(size, str):
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)} or a rooms.RoomCounts, got {size!r}")
        size = PRESETS[size]
    hashes = {"furniture": registry.ASSETS["furniture"].sha256}
    settings = {"kind": KIND, "version": VERSION, "seed": seed, "sizes": asdict(size), "assets": hashes}
    if folder.exists() and any(folder.iterdir()):
        manifest = _manifest(folder)
        if manifest.get("kind") != KIND:
            raise ValueError(f"{folder} is not empty and holds no mini-Scan2Inst; choose another folder or empty it")
        if all(manifest.get(key) == value for key, value in settings.items()) and whole(folder, size):
            return folder
    source = registry.need("furniture")
    models = furniture.catalogue(source)
    clouds = dict(zip(models, furniture.load_points(source, models, registry.default_cache() / "points"), strict=True))
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "clouds").mkdir(parents=True)
    counts, splits = {}, usable(models)
    names = [name for name in CLASSES if any(model.label == name for model in splits["test"])]
    for split, members in splits.items():
        records = write_split(draft, split, {m: clouds[m] for m in members}, names, getattr(size, split), seed)
        counts[split] = dict(sorted(Counter(record["benchmark"] for record in records).items()))
        (draft / f"{split}.json").write_text(json.dumps(records, indent=0) + "\n")
    (draft / "manifest.json").write_text(json.dumps(settings | {"records": counts}, indent=2) + "\n")
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    if folder.exists():
        folder.rename(aside / "old")
    draft.rename(folder)
    shutil.rmtree(aside)
    return folder


def _manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` says; empty if there is none, or it is another's."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def whole(folder: Path, size: RoomCounts) -> bool:
    """Every file that a data set of this size has is there."""
    clouds = (folder / "clouds" / f"{name}.npz" for split in SPLITS for name in room_names(split, getattr(size, split)))
    return all(path.is_file() for path in (*(folder / f"{split}.json" for split in SPLITS), *clouds))


def room_names(split: str, number: int) -> list[str]:
    """Names of the rooms of one split."""
    return [f"{split}_{index:05d}" for index in range(number)]


def usable(models: list[Furniture]) -> dict[str, list[Furniture]]:
    """The models of each file: they go into a room, and at least FEWEST_MODELS of their class are held out."""
    splits = {
        split: [m for m in members if m.label and max(m.size) < LARGEST and min(m.size) > THINNEST]
        for split, members in furniture.split(models).items()
    }
    held = Counter(model.label for model in splits["test"])
    return {split: [m for m in members if held[m.label] >= FEWEST_MODELS] for split, members in splits.items()}


def write_split(
    folder: Path, split: str, clouds: dict[Furniture, PointCloud], names: list[str], number: int, seed: int
) -> list[dict[str, Any]]:
    """Compose the rooms of one file and ask about them; `names` are the classes."""
    builder = Builder(names, seed=seed + SPLITS.index(split))
    records: list[dict[str, Any]] = []
    for index, name in enumerate(room_names(split, number)):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        room, placed = compose(rng, clouds)
        scene = annotate(name, room, placed)
        cloud = scan(rng, room, placed)
        assert cloud.rgb is not None
        np.savez(
            folder / scene.cloud,
            xyz=cloud.xyz.astype(np.float16),
            rgb=np.round(cloud.rgb * 255).astype(np.uint8),
            boxes=np.array([item.box for item in scene.objects], np.float32),
            ids=np.array([item.id for item in scene.objects], np.int32),
        )
        records += builder.write(scene)
    return records


def compose(rng: np.random.Generator, clouds: dict[Furniture, PointCloud]) -> tuple[Box3D, list[Placed]]:
    """A room and four to nine things in it; classes come up equally often, some twice or more."""
    width, depth = rng.uniform(3.4, 5.6), rng.uniform(3.2, 5.0)
    room: Box3D = (-width / 2, -depth / 2, 0.0, width / 2, depth / 2, HEIGHT)
    by_class: dict[str, list[Furniture]] = defaultdict(list)
    for model in clouds:
        by_class[model.label].append(model)
    names = sorted(by_class)
    wanted = [names[int(i)] for i in rng.permutation(len(names))[: int(rng.integers(4, 8))]]
    if rng.random() < 0.45:  # several of a kind, often of the same model, as chairs are
        wanted[-1:] = [wanted[0]] * int(rng.integers(1, 4))
    wanted.sort(key=lambda name: name in SMALL)  # holders first
    placed: list[Placed] = []
    for name in wanted:
        again = [item.model for item in placed if item.model.label == name]
        model = again[0] if again and rng.random() < 0.6 else by_class[name][int(rng.integers(len(by_class[name])))]
        for _ in range(40):
            item = _try(rng, room, placed, model, clouds[model])
            if item is not None and fits(item.box, room) and not any(collide(item.box, o.box) for o in placed):
                placed.append(item)
                break
    return room, placed


def _try(
    rng: np.random.Generator, room: Box3D, placed: list[Placed], model: Furniture, cloud: PointCloud
) -> Placed | None:
    """One random place for a model: on a table if it is small, at a wall, in a corner, or anywhere."""
    turns = int(rng.integers(4))
    width, depth, height = turned(model.size, turns)
    if model.label in SMALL and rng.random() < 0.75:
        holders = [o for o in placed if o.model.label in HOLDERS and o.box[5] + height < HEIGHT and o.box[5] < 1.3]
        holders = [o for o in holders if o.box[3] - o.box[0] > width and o.box[4] - o.box[1] > depth]
        if holders:
            below = holders[int(rng.integers(len(holders)))].box
            x = rng.uniform(below[0] + width / 2, below[3] - width / 2)
            y = rng.uniform(below[1] + depth / 2, below[4] - depth / 2)
            return Placed(model, cloud, turns, (x, y, below[5] + 0.005))
    low = (room[0] + width / 2 + MARGIN, room[1] + depth / 2 + MARGIN)
    high = (room[3] - width / 2 - MARGIN, room[4] - depth / 2 - MARGIN)
    if low[0] > high[0] or low[1] > high[1]:
        return None
    x, y = rng.uniform(low[0], high[0]), rng.uniform(low[1], high[1])
    z = 0.0
    if model.label == "window":
        z = min(0.9, HEIGHT - height)
    where = rng.random()
    if model.label in ("window", "door", "radiator") or where < 0.6:  # the back to a wall
        turns = int(rng.integers(4))
        width, depth, _ = turned(model.size, turns)
        x = rng.uniform(room[0] + width / 2 + MARGIN, max(room[3] - width / 2 - MARGIN, room[0] + width / 2 + MARGIN))
        y = rng.uniform(room[1] + depth / 2 + MARGIN, max(room[4] - depth / 2 - MARGIN, room[1] + depth / 2 + MARGIN))
        match turns:  # the front of a model looks to -y, turned once to +x, ...
            case 0:
                y = room[4] - depth / 2 - MARGIN
            case 1:
                x = room[0] + width / 2 + MARGIN
            case 2:
                y = room[1] + depth / 2 + MARGIN
            case _:
                x = room[3] - width / 2 - MARGIN
    elif where < 0.75:
        x, y = (low[0], high[0])[int(rng.integers(2))], (low[1], high[1])[int(rng.integers(2))]
    return Placed(model, cloud, turns, (float(x), float(y), z))


def turned(size: tuple[float, float, float], turns: int) -> tuple[float, float, float]:
    """Width, depth and height after quarter turns about z."""
    return (size[1], size[0], size[2]) if turns % 2 else size


def fits(box: Box3D, room: Box3D) -> bool:
    """The box is inside the room, but for a millimetre."""
    return all(box[i] >= room[i] - 1e-3 and box[3 + i] <= room[3 + i] + 1e-3 for i in range(3))


def collide(a: Box3D, b: Box3D) -> bool:
    """Two boxes share some space."""
    return all(min(a[3 + i], b[3 + i]) - max(a[i], b[i]) > 0 for i in range(3))


def annotate(name: str, room: Box3D, placed: list[Placed]) -> Scene:
    """The room as what is known of it."""
    objects = []
    for index, item in enumerate(placed):
        assert item.cloud.rgb is not None
        box = tuple(round(value, 4) for value in item.box)
        known = SceneObject(index, item.model.label, box, colour_name(item.cloud.rgb))  # type: ignore[arg-type]
        objects.append(replace(known, captions=captions(known, item.model.name)))
    return Scene(name, f"clouds/{name}.npz", room, objects)


def captions(item: SceneObject, name: str) -> tuple[str, ...]:
    """The caption by the class, and the same by the catalogue's name where that differs."""
    texts = [describe(item), describe(replace(item, name=name))]
    return tuple(dict.fromkeys(texts))


def scan(rng: np.random.Generator, room: Box3D, placed: list[Placed]) -> PointCloud:
    """Points of all surfaces: the things, the floor, the back wall and the left wall."""
    xyz, rgb = [], []
    for item in placed:
        w, d, h = item.model.size
        count = int(np.clip(DENSITY * 2 * (w * d + w * h + d * h), FEWEST, MOST))
        some = item.cloud[rng.permutation(len(item.cloud))[:count]]
        angle = item.turns * np.pi / 2
        turn = np.round([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        xyz.append(some.xyz @ turn.T + item.place)
        rgb.append(some.rgb)
    width, depth = room[3] - room[0], room[4] - room[1]
    for axis, at, area in ((2, 0.0, width * depth), (1, room[4], width * HEIGHT), (0, room[0], depth * HEIGHT)):
        plane = rng.uniform(room[:3], room[3:], (int(80 * area), 3))
        plane[:, axis] = at
        xyz.append(plane)
        rgb.append(np.broadcast_to(rng.uniform(0.35, 0.95) + rng.normal(0, 0.05, 3), plane.shape))
    points = np.concatenate(xyz)
    points = points + rng.normal(0, NOISE, points.shape)
    light = np.concatenate(rgb) * rng.uniform(0.85, 1.1)
    return PointCloud(points.astype(np.float32), light.clip(0, 1).astype(np.float32))
