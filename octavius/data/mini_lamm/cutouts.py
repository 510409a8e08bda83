"""Captioned cut-out photographs of the `stamps` asset: which of them are used, under what category, in which split.

The folders of the package are not classes, so CATEGORIES picks, merges and leaves out by hand, after looking at every
image. Photographs only, with three exceptions where the package has too few: buildings are rendered miniatures,
a few insects and vehicles are drawings. Left out: bare outlines, silhouettes, overlays, things a short name would
call wrong (dolphins as mammals that look like fish, lobsters in the fish folder), shapes thinner than 1:3.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from octavius.data.mini_lamm.compose import mask_box

# category -> (patterns under the stamps folder, stems left out). Single words, as upstream's word test needs them.
CATEGORIES: dict[str, tuple[str, str]] = {
    "bird": ("animals/birds/*", ""),
    "fish": ("animals/fish/*", "lobster shrimp"),
    "insect": ("animals/insects/* animals/insects/cartoon/[bdl]*", "Brown_slug Woodlouse"),
    "mammal": (
        "animals/mammals/* animals/mammals/apes/* animals/mammals/bears/* animals/mammals/bovines/* "
        "animals/mammals/camel/* animals/mammals/cats/* animals/mammals/deer/* animals/mammals/dogs/* "
        "animals/mammals/equines/* animals/mammals/rodents/* animals/marsupials/*",
        "echidna hedgehog tamarin_emperor",
    ),
    "fruit": ("food/fruit/*", ""),
    "vegetable": ("food/vegetables/*", "mushroom corn"),
    "flower": ("plants/flowers/* plants/flowers/plastic/*", "appooppanthady"),
    "vehicle": (
        "vehicles/auto/* vehicles/construction/dumper* vehicles/emergency/firetruck* vehicles/garbagetruck* "
        "vehicles/masstransit/green* military/vehicles/bradley* military/vehicles/infantry* "
        "vehicles/emergency/cartoon/* vehicles/masstransit/cartoon/* vehicles/construction/cartoon/*",
        "",
    ),
    "instrument": ("hobbies/music/*/*", "bassoon"),
    "tool": ("household/tools/* household/arttools/scissors_small_open*", "cementmixer toolbox wrench_adjustable"),
    "planet": ("space/planets/*", "0_sun"),
    "sign": (
        "town/roadsigns/*",
        "traffic_cone railroad_crossing stoplight_01_red stoplight_02_yellow stoplight_03_green",
    ),
    "building": ("town/houses/cartoon/*", "cave_entrance circus city medieval_tent tent tepee"),
}
# Whole categories that no training image shows.
UNSEEN: dict[str, tuple[str, str]] = {
    "ball": ("sports/* sports/cartoon/volley*", "rugby_goal_posts tennis_racket trophy_cup"),
    "tree": ("plants/trees/* seasonal/christmas/Christmas_Tree_photo*", "holly_leaves pinecone rambutan"),
    "mushroom": ("plants/mushrooms/* food/vegetables/mushroom*", ""),
}

# Kinds whose file names differ: they must not be split between training and test. Everything else is grouped by
# the first word of its file name (apple_red with apple_green, gnu-baby with gnu-stand, mirrored and numbered ones).
FAMILIES = (
    "chicken chicken_profile hen rooster",
    "duck drake",
    "peacock albino_peahen",
    "penguin little-penguin magellanic_penguin",
    "gull seagull silver-gull",
    "guineafowl helmeted_guineafowl",
    "cow cow_white bull",
    "sheep sheep_lamb ram",
    "goat mountaingoat",
    "deer doe",
    "camel dromedary",
    "bear european-bear",
    "orange orange_seville sliced_orange mandarine",
    "pepper yellowpepper chilepepper",
    "lettuce redlettuce",
    "garlic garlics",
    "hibiscus chemparathi flower10",
    "fort fortress",
    "yield give_way_sign",
    "wildboar pig",
)

# Captions that are advice, not a description; the rule of `clean_caption` serves the others.
CAPTIONS = {
    "broccoli": "Broccoli.",
    "tomato": "A ripe, red tomato.",
    "lionfish": "A lionfish.",
    "hoverfly": "A hoverfly.",
    "adeenia": "A desert rose.",
    "anthoorium": "An anthurium flower.",
    "bolsom": "A balsam flower.",
    "chemparathi": "A hibiscus flower.",
    "bradley": "An armored personnel carrier.",
    "infantry-stryker": "An armored personnel carrier.",
    "cep-2": "Two ceps.",
    "dead_end_sign": "A dead end sign.",
    "give_way_sign": "A give way sign.",
    "no_entry_sign": "A no entry sign.",
    "roundabout": "A roundabout sign.",
    "school_sign": "A school sign.",
    "yield": "A yield sign.",
    "arrow": "An arrow sign.",
    "crossroads": "A crossroads sign.",
    "hospital": "A hospital sign.",
    "no_uturn": "A no U-turn sign.",
    "stop": "A stop sign.",
    "t-junction": "A T-intersection sign.",
    "toilets": "A toilets sign.",
    "xing_ped": "A pedestrian crossing sign.",
    "xing_school": "A school crossing sign.",
}

MAX_SIDE = 200  # pixels kept of a cut-out's long side: no image shows it larger
MAX_ASPECT = 3.4
NEAR = 6  # of 64 bits of the perceptual hash


@dataclass(frozen=True)
class Cutout:
    """One photograph: RGBA pixels [H, W, 4] cropped to its mask, and what it shows."""

    name: str
    category: str
    family: str
    caption: str
    rgba: np.ndarray


def load_cutouts(folder: Path, categories: dict[str, tuple[str, str]]) -> list[Cutout]:
    """Read the photographs of some categories (CATEGORIES or UNSEEN), sorted by name.

    Args:
        folder: `usr/share/tuxpaint/stamps` of the unpacked asset.
        categories: table of this module.
    Returns:
        Cut-outs that have a caption, a real mask and a shape that a box describes fairly.
    """
    found: dict[str, Cutout] = {}
    for category, (patterns, dropped) in categories.items():
        skip = set(dropped.split())
        for path in sorted({p for pattern in patterns.split() for p in folder.glob(pattern + ".png")}):
            if path.stem in skip or path.stem.endswith("_mirror"):
                continue
            rgba = crop(Image.open(path).convert("RGBA"))
            text = path.with_suffix(".txt")
            if rgba is None or not text.exists():
                continue
            caption = CAPTIONS.get(path.stem) or clean_caption(text.read_text(encoding="utf-8").split("\n", 1)[0])
            name = path.relative_to(folder).with_suffix("").as_posix()
            found[name] = Cutout(name, category, f"{category}/{family(path.stem)}", caption, rgba)
    return [found[name] for name in sorted(found)]


def crop(image: Image.Image) -> np.ndarray | None:
    """Pixels inside the mask's box, at most MAX_SIDE long; None if there is no usable mask or the shape is too thin."""
    box = mask_box(image)
    if box is None:
        return None
    image = image.crop(box)
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height) or min(width, height) < 24:
        return None
    if max(width, height) > MAX_SIDE:
        scale = MAX_SIDE / max(width, height)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    return np.asarray(image)


def clean_caption(line: str) -> str:
    """The description at the start of a caption: no quotation marks, brackets, second sentence or dash clause."""
    line = re.sub(r"[“”\"]", "", line)
    line = re.sub(r"\s*\([^)]*\)", "", line)
    line = re.split(r"[—]|(?<=[.!?])\s|, also called|, which|, a landmark", line.strip())[0]
    return line.rstrip(".!?, ") + "."


def family(stem: str) -> str:
    """Name of the kind that a file shows; kinds are never split between training and test."""
    for row in FAMILIES:
        if stem in row.split():
            return row.split()[0]
    if re.fullmatch(r"flower\d+", stem):
        return stem  # numbered, yet different species
    return re.split(r"[_\-\d]", stem.lower().lstrip("0123456789_"))[0] or stem.lower()


def difference_hash(rgba: np.ndarray) -> np.ndarray:
    """64 bits: does brightness rise from each cell to its right neighbour, on an 8 x 9 grid over white."""
    image = Image.fromarray(rgba)
    ground = Image.new("RGBA", image.size, "white")
    gray = Image.alpha_composite(ground, image).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(gray, dtype=np.int16)
    return (cells[:, 1:] > cells[:, :-1]).ravel()


def groups(cutouts: list[Cutout]) -> list[list[Cutout]]:
    """Cut-outs that must stay together: one family, or near-duplicates (also mirrored) within a category."""
    parent = list(range(len(cutouts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    hashes = [difference_hash(c.rgba) for c in cutouts]
    mirrored = [difference_hash(c.rgba[:, ::-1]) for c in cutouts]
    for i, first in enumerate(cutouts):
        for j in range(i):
            second = cutouts[j]
            if first.category != second.category:
                continue
            distance = min(int((hashes[i] != h).sum()) for h in (hashes[j], mirrored[j]))
            if first.family == second.family or distance <= NEAR:
                parent[root(i)] = root(j)
    members: dict[int, list[Cutout]] = {}
    for i, cutout in enumerate(cutouts):
        members.setdefault(root(i), []).append(cutout)
    return [members[key] for key in sorted(members)]


def split_cutouts(cutouts: list[Cutout], seed: int, share: float = 0.3) -> tuple[list[Cutout], list[Cutout]]:
    """Divide the photographs into training and test, category by category, whole groups at a time.

    Args:
        cutouts: of `load`.
        seed: of the random order in which groups are dealt.
        share: of a category's photographs that go to the test split, at least two where it has four.
    """
    train: list[Cutout] = []
    test: list[Cutout] = []
    parts = groups(cutouts)
    for number, category in enumerate(sorted({c.category for c in cutouts})):
        mine = [part for part in parts if part[0].category == category]
        want = max(2, round(share * sum(len(part) for part in mine)))
        rng = np.random.default_rng([seed, 1, number])
        held = 0
        for index in rng.permutation(len(mine)):
            part = mine[int(index)]
            if held < want and len(part) <= max(1, want // 2):  # one large family must not be the whole test
                held += len(part)
                test += part
            else:
                train += part
    return sorted(train, key=lambda c: c.name), sorted(test, key=lambda c: c.name)
