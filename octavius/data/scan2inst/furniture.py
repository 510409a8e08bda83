"""The models of the `furniture` asset (Sweet Home 3D's catalogues): names, sizes in metres, surfaces, classes.

Every model is scaled to its catalogue's size and stands on z = 0, its front towards -y. CLASSES puts 300 of the 820
into classes by name; one catalogue, UNSEEN, is kept for the zero-shot sets, and of every class a quarter for the tests.
"""

import io
import os
import posixpath
import re
import zipfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image
from trimesh.resolvers import ZipResolver

from octavius.points.cloud import PointCloud
from octavius.points.mesh import from_scene, z_up

UNSEEN = "BlendSwap-CC-BY"  # catalogue that no training sees
POINTS = 8192  # kept of each model
TEST_SHARE = 4  # every fourth model of a class is a test model

# class -> pattern that a name must contain; the first that fits counts. Chosen by reading all names.
CLASSES: dict[str, str] = {
    "armchair": r"armchair(?! ottoman)|relax chair",
    "stool": r"stool|piano bench|ottoman",
    "television": r"\btv\b(?! stand| remote)|^screen$|imac",
    "oven": r"oven|stove|cooker\b(?! 2| 4)",
    "plant": r"plant\b|plant box|ficus|yucca|cactus|tulips|flower|bamboo|bonsai|lily|orchids|spathiphyllum|christmas",
    "chair": r"(?<!wheel)chair|teck",
    "sofa": r"sofa|couch|futon",
    "desk": r"\bdesk\b(?! lamp)|workbench",
    "bed": r"(?<!dog )\bbed\b|crib",
    "lamp": r"(?<!street )lamp\b|hanging light|pedestal|chandelier",
    "table": r"table\b(?! fan| tennis)(?<!bedside table)(?<!changing table)(?<!dressing table)",
    "bookcase": r"bookcase|shelves",
    "cabinet": r"cabinet|cupboard|dresser|vanity|wardrobe|locker",
    "sink": r"washbasin|^sink$|basin|lavatory",
    "toilet": r"toilets? unit|urinal|bidet",
    "radiator": r"radiator",
    "window": r"window(?! shutter| blind)",
    "door": r"(?<!elevator )(?<!garage )(?<!shower )\bdoor\b(?! cabinet)",
    "box": r"(?<!mail)(?<!bread )(?<!medicine )(?<!letters )\bbox$|crate|suitcase|trunck",
    "person": r"male|\bboy\b|\bgirl\b",
}


@dataclass(frozen=True)
class Furniture:
    """One model of a catalogue.

    size: width, depth, height in metres, in x, y, z; label: its class or ""; model, icon: names inside the archive.
    """

    id: str
    name: str
    category: str
    catalogue: str
    size: tuple[float, float, float]
    elevation: float
    model: str
    icon: str
    rotation: tuple[float, ...]
    label: str

    def text(self) -> str:
        """What a catalogue would print: name, room and size."""
        width, depth, height = self.size
        size = f"{width:.1f} m wide, {depth:.1f} m deep, {height:.1f} m high"
        return f"{article(self.name)}, {self.category.lower()}, {size}"


def article(name: str) -> str:
    """ "a chair", "an armchair"."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def catalogue(folder: Path) -> list[Furniture]:
    """All models of the asset, by catalogue and number."""
    models = []
    for file in sorted(folder.glob("*.sh3f")):
        with zipfile.ZipFile(file) as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
        entries: dict[int, dict[str, str]] = defaultdict(dict)
        for key, number, value in re.findall(r"^(\w+)#(\d+)[ \t]*=[ \t]*(.*)$", re.sub(r"\\\r?\n\s*", "", text), re.M):
            entries[int(number)][key] = value.strip()
        models += [_furniture(file.stem, entries[number]) for number in sorted(entries)]
    return models


def split(models: list[Furniture]) -> dict[str, list[Furniture]]:
    """train, test (a quarter of every class) and zeroshot (the catalogue UNSEEN).

    Models of one name and size are taken as one, so that no twin of a test model is trained on.
    """
    splits: dict[str, list[Furniture]] = {"train": [], "test": [], "zeroshot": []}
    number: dict[str, int] = defaultdict(int)
    twins: dict[tuple, str] = {}
    for model in models:
        if model.catalogue == UNSEEN:
            splits["zeroshot"].append(model)
            continue
        twin = (model.name, *(round(length, 2) for length in model.size))
        if twin not in twins:
            group = model.label or "other"
            number[group] += 1
            twins[twin] = "test" if number[group] % TEST_SHARE == 0 else "train"
        splits[twins[twin]].append(model)
    return splits


def load_points(folder: Path, models: list[Furniture], cache: Path) -> list[PointCloud]:
    """POINTS points of every model with colours, in metres; sampled once, 45 s of a core, and kept in `cache`."""
    file = cache / f"furniture-{POINTS}-{len(models)}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            clouds = list(pool.map(sample, [folder] * len(models), models, chunksize=16))
        partial = file.with_suffix(".partial.npz")
        xyz = np.stack([cloud.xyz for cloud in clouds]).astype(np.float16)
        rgb = np.stack([cloud.rgb for cloud in clouds if cloud.rgb is not None])
        np.savez(partial, xyz=xyz, rgb=np.round(rgb * 255).astype(np.uint8))
        partial.rename(file)
    with np.load(file) as arrays:
        xyz, rgb = arrays["xyz"].astype(np.float32), arrays["rgb"].astype(np.float32) / 255
    return [PointCloud(*pair) for pair in zip(xyz, rgb, strict=True)]


def sample(folder: Path, model: Furniture, count: int = POINTS) -> PointCloud:
    """Points of one model, centred over the origin, standing on z = 0, in metres."""
    with zipfile.ZipFile(folder / f"{model.catalogue}.sh3f") as archive:
        scene = _scene(archive, model.model)
    rng = np.random.default_rng([len(model.id), *model.id.encode()])
    cloud = from_scene(scene, count, rng)
    corners = np.asarray(scene.bounds, np.float64)  # of the vertices, so that the box is the model's and not a sample's
    xyz = cloud.xyz.astype(np.float64)
    if model.rotation:
        turn = np.array(model.rotation).reshape(3, 3)
        xyz = xyz @ turn.T
        vertices = np.concatenate([part.vertices for part in scene.dump()]) @ turn.T
        corners = np.stack((vertices.min(0), vertices.max(0)))
    xyz = z_up((xyz - corners.mean(0)) / np.maximum(corners[1] - corners[0], 1e-9))  # in -0.5..0.5
    xyz = (xyz + np.array([0, 0, 0.5])) * model.size
    return PointCloud(xyz.astype(np.float32), cloud.rgb)


def icon(folder: Path, model: Furniture) -> Image.Image:
    """The catalogue's image of the model."""
    with zipfile.ZipFile(folder / f"{model.catalogue}.sh3f") as archive:
        return Image.open(io.BytesIO(archive.read(model.icon))).copy()


def _furniture(catalogue: str, entry: dict[str, str]) -> Furniture:
    name = re.sub(r"\s*\(.*?\)", "", re.sub(r"\s+", " ", entry["name"].encode("latin-1").decode("unicode_escape")))
    name = name.strip().lower()
    return Furniture(
        id=entry["id"],
        name=name,
        category=entry["category"],
        catalogue=catalogue,
        size=(float(entry["width"]) / 100, float(entry["depth"]) / 100, float(entry["height"]) / 100),
        elevation=float(entry.get("elevation", 0)) / 100,
        model=entry["model"].lstrip("/"),
        icon=entry["icon"].lstrip("/"),
        rotation=tuple(float(value) for value in entry.get("modelRotation", "").split()),
        label=next((label for label, pattern in CLASSES.items() if re.search(pattern, name)), ""),
    )


def _scene(archive: zipfile.ZipFile, name: str) -> Any:
    """An OBJ of the archive with its materials and textures."""
    folder = posixpath.dirname(name)
    files = {entry: io.BytesIO(archive.read(entry)) for entry in archive.namelist() if entry.startswith(folder + "/")}
    resolver = ZipResolver(files, namespace=folder)
    return trimesh.load_scene(files[name], file_type="obj", resolver=resolver, process=False)
