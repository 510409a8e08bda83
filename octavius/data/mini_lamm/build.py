"""mini-LAMM: the six 2D tasks of Octavius in upstream's JSON format, built from captioned cut-outs and drawn faces.

Scenes of one to four photographs carry detection and multiple-choice questions; images of one photograph carry a
caption, a class and a box; faces carry hair colour and smile. Training and test share no photograph, near-duplicate
or hair style; `zeroshot.json` shows whole categories that training never does. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from octavius.assets import registry
from octavius.data.mini_lamm import compose, faces, questions
from octavius.data.mini_lamm.cutouts import CATEGORIES, UNSEEN, Cutout, load_cutouts, split_cutouts

VERSION = 4  # of the builder: raise it whenever the same settings give other bytes
QUALITY = 90  # of the JPEG files
SPLITS = ("train", "test", "zeroshot")
SINGLE = (0.50, 0.85)  # long side of the object in an image of its own
NOT_MIRRORED = ("sign", "planet")  # lettering and continents have a side


@dataclass(frozen=True)
class ImageCounts:
    """Numbers of images per file; each carries one to three records."""

    train: int
    test: int
    zeroshot: int


PRESETS = {"smoke": ImageCounts(150, 40, 16), "demo": ImageCounts(2500, 250, 96), "mini": ImageCounts(9000, 600, 192)}
SCENES, FACES = 0.48, 0.22  # share of the images; the rest shows one photograph each


@dataclass(frozen=True)
class ImagePlan:
    """What one image will show."""

    split: str
    index: int
    kind: str  # scene | single | face
    cutouts: tuple[Cutout, ...] = ()
    hair: str = ""
    smile: bool = False

    @property
    def name(self) -> str:
        return f"{self.split}_{self.index:05d}"

    @property
    def image(self) -> str:
        return f"images/{self.name}.jpg"


def build(
    folder: str | Path, size: str | ImageCounts = "demo", seed: int = 0, assets: dict[str, Path] | None = None
) -> Path:
    """Write the data set, or return at once if the folder already holds it with the same settings.

    Args:
        folder: receives train.json, test.json, zeroshot.json, images/ and manifest.json, in one rename at the end.
        size: "smoke", "demo", "mini", or numbers of images.
        seed: of everything random.
        assets: ready folders of the assets `stamps` and `faces`; fetched into the cache when None. Where there are no
            cutouts, every image shows a face and zeroshot.json is empty.
    Returns:
        The folder.
    Raises:
        ValueError: unknown size, or the folder holds something that is not a mini-LAMM.
        FileNotFoundError: an asset cannot be had on this machine.
    """
    folder = Path(folder)
    if isinstance(size, str):
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)} or a minilamm.ImageCounts, got {size!r}")
        size = PRESETS[size]
    ready = assets or registry.fetch(("stamps", "faces"))
    if "faces" not in ready:
        raise FileNotFoundError("mini-LAMM needs the asset faces, which could not be had")
    hashes = {name: registry.ASSETS[name].sha256 for name in sorted(ready)}
    settings = {"version": VERSION, "seed": seed, "sizes": asdict(size), "assets": hashes}
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "manifest.json").exists():
            raise ValueError(f"{folder} is not empty and holds no mini-LAMM; choose another folder or empty it")
        manifest = json.loads((folder / "manifest.json").read_text())
        if all(manifest.get(key) == value for key, value in settings.items()) and whole(folder):
            return folder
    sets = (CATEGORIES, UNSEEN)
    known, unseen = (load_cutouts(ready["stamps"], names) if "stamps" in ready else [] for names in sets)
    train, test = split_cutouts(known, seed)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    (draft / "images").mkdir(parents=True)
    try:
        counts = {}
        for split, cutouts in zip(SPLITS, (train, test, unseen), strict=True):
            records = write_split(draft, split, cutouts, getattr(size, split), seed, ready["faces"])
            counts[split] = dict(sorted(Counter(r["benchmark"] for r in records).items()))
            (draft / f"{split}.json").write_text(json.dumps(records, indent=0, ensure_ascii=False) + "\n")
        photographs = {
            split: dict(sorted(Counter(c.category for c in cutouts).items()))
            for split, cutouts in zip(SPLITS, (train, test, unseen), strict=True)
        }
        manifest = settings | {"records": counts, "photographs": photographs}
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        old = draft.with_name(draft.name + ".old")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def whole(folder: Path) -> bool:
    """The three files are there, and every image that they name."""
    files = [folder / f"{split}.json" for split in SPLITS]
    if not all(file.is_file() for file in files):
        return False
    images = {record["image"] for file in files for record in json.loads(file.read_text())}
    return all((folder / image).is_file() for image in images)


def write_split(
    folder: Path, split: str, cutouts: list[Cutout], number: int, seed: int, parts: Path
) -> list[dict[str, Any]]:
    """Draw the images of one file and write its records, in the order of the images."""
    plans = list(plan(split, cutouts, number, seed))
    photographs = sorted({c.category for c in cutouts})
    names = sorted(CATEGORIES) + (photographs if split == "zeroshot" else [])
    writer = questions.ChoiceWriter(names)
    with ThreadPoolExecutor(2) as pool:
        facts = pool.map(lambda p: draw(folder, p, seed, parts), plans)
        records: list[dict[str, Any]] = []
        for item, boxes in zip(plans, facts, strict=True):
            rng = np.random.default_rng([seed, 3, SPLITS.index(split), item.index])
            records += ask(rng, item, boxes, writer)
    return records


class Deck:
    """Deals items in random order and reshuffles when empty, so that all come up equally often."""

    def __init__(self, rng: np.random.Generator, items: Sequence[Any]) -> None:
        self.rng, self.items, self.left = rng, list(items), []

    def draw(self) -> Any:
        if not self.left:
            self.left = [self.items[int(i)] for i in self.rng.permutation(len(self.items))]
        return self.left.pop()


def plan(split: str, cutouts: list[Cutout], number: int, seed: int) -> Iterator[ImagePlan]:
    """Decide what each image shows: categories, photographs, hair colours and smiles in equal numbers."""
    rng = np.random.default_rng([seed, 2, SPLITS.index(split)])
    names = sorted({c.category for c in cutouts})
    categories = {kind: Deck(rng, names) for kind in ("scene", "single")}
    photographs = {name: Deck(rng, [c for c in cutouts if c.category == name]) for name in names}
    hair = Deck(rng, [(color, smile) for color in faces.HAIR_COLORS for smile in (True, False)])
    if split == "zeroshot":
        number, drawn = (number if cutouts else 0), 0
    else:
        drawn = round(FACES * number) if cutouts else number
    many = round(SCENES * number) if cutouts else 0
    kinds = ["scene"] * many + ["face"] * drawn + ["single"] * (number - many - drawn)
    sizes = Deck(rng, (1, 2, 3, 4))
    for index, place in enumerate(rng.permutation(number)):
        kind = kinds[int(place)]
        if kind == "face":
            color, smile = hair.draw()
            yield ImagePlan(split, index, kind, hair=color, smile=smile)
            continue
        picked = [categories[kind].draw() for _ in range(sizes.draw() if kind == "scene" else 1)]
        if len(picked) > 1 and rng.random() < 0.25:
            picked[1] = picked[0]  # two of a kind
        yield ImagePlan(split, index, kind, tuple(photographs[name].draw() for name in picked))


def draw(folder: Path, item: ImagePlan, seed: int, parts: Path) -> list[questions.Box]:
    """Write one image; its boxes in the order of the plan's cut-outs (none for a face)."""
    rng = np.random.default_rng([seed, 4, SPLITS.index(item.split), item.index])
    if item.kind == "face":
        image, boxes = draw_face(rng, item, parts), []
    else:
        flip = [c.category not in NOT_MIRRORED for c in item.cutouts]
        sides = SINGLE if item.kind == "single" else None
        scene = compose.compose(rng, [c.rgba for c in item.cutouts], flip, sides)
        image, boxes = scene.image, scene.boxes
    image.save(folder / item.image, quality=QUALITY)
    return boxes


def draw_face(rng: np.random.Generator, item: ImagePlan, parts: Path) -> Image.Image:
    """A large face somewhere on a procedural background, the mouth and the hair always inside the image."""
    face = faces.random_face(rng, item.hair, item.smile, train=item.split == "train")
    canvas = compose.background(rng)
    image = faces.render(face, parts, height=int(rng.integers(190, 261)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    room = compose.SIZE - image.width
    x = int(rng.integers(min(0, room), max(0, room) + 1))
    y = compose.SIZE - int(image.height * rng.uniform(0.80, 1.0))  # the chest may leave the image
    canvas.paste(image, (x, max(-8, y)), image)
    return canvas


def ask(
    rng: np.random.Generator, item: ImagePlan, boxes: list[questions.Box], writer: questions.ChoiceWriter
) -> list[dict[str, Any]]:
    """The records of one image."""
    source: dict[str, Any] = {"src_image": "faces" if item.kind == "face" else "stamps"}
    write = questions.record
    if item.kind == "face":
        smile = "yes" if item.smile else "no"
        color = questions.phrase(rng, questions.HAIR)
        laugh = questions.phrase(rng, questions.SMILE)
        colors = list(faces.HAIR_COLORS)
        return [
            write(item.name, item.image, "hair", color, item.hair, **source, attr=item.hair, labels=colors),
            write(item.name, item.image, "smile", laugh, smile, **source, attr=smile, labels=["yes", "no"]),
        ]
    order = sorted(range(len(boxes)), key=lambda i: boxes[i])  # from left to right
    labels = [item.cutouts[i].category for i in order]
    boxes = [boxes[i] for i in order]
    source["photographs"] = sorted({c.name for c in item.cutouts})
    objects = [{"label": label, "bbox": list(box)} for label, box in zip(labels, boxes, strict=True)]
    xml = questions.detection_xml(labels, boxes)
    find = questions.phrase(rng, questions.DETECTION)
    records = []
    if item.kind == "scene" or item.split != "train" or item.index % 2:  # long answers: half of the easy ones will do
        truth = {"object": objects, "labels": writer.names}
        records.append(write(item.name, item.image, "detection", find, xml, **source, **truth))
    if item.kind == "single":
        caption, label = item.cutouts[0].caption, item.cutouts[0].category
        describe = questions.phrase(rng, questions.CAPTION)
        records.append(write(item.name, item.image, "caption", describe, caption, **source, sentences=[caption]))
        kind = questions.phrase(rng, questions.CLASSIFICATION)
        listed = writer.names
        if item.split == "zeroshot" or (item.split == "train" and rng.random() < 1 / 3):
            listed = options(rng, label, item.split, writer.names)
            kind = f"{kind} Options: {', '.join(listed)}."
        records.append(
            write(item.name, item.image, "classification", kind, label, **source, label=label, labels=listed)
        )
    elif item.split != "zeroshot":
        for number, (text, letter, choices) in enumerate(writer.write(rng, labels, boxes, 1 + item.index % 2)):
            answer = f"{choices[ord(letter) - ord('A')]} ({letter})"  # what is seen first, then its letter
            truth = {"gt_choice": letter, "gt_choices": choices}
            records.append(write(f"{item.name}_{number}", item.image, "vqa", text, answer, **source, **truth))
    return records


def options(rng: np.random.Generator, label: str, split: str, names: list[str]) -> list[str]:
    """Six classes to choose from in random order; of unseen ones all, so that being new does not give them away."""
    must = [name for name in names if name in UNSEEN] if split == "zeroshot" else [label]
    rest = [name for name in names if name not in must]
    listed = must + [rest[int(i)] for i in rng.permutation(len(rest))[: 6 - len(must)]]
    return [listed[int(i)] for i in rng.permutation(len(listed))]
