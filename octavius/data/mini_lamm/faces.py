"""Parametric cartoon faces with known attributes, drawn from the SVG parts of the `faces` asset.

A face is a template with slots (top, eyes, mouth, ...); a part fills a slot; the colours of hair and skin are the
`fill` of one named group each. The attributes are therefore exact: nothing is labelled by eye but the lists below.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

# Eight colours that a person tells apart at 100 pixels; the package's own ten hold four browns.
HAIR_COLORS = {
    "black": "#1c1a1e",
    "brown": "#6b4226",
    "blonde": "#e2bd54",
    "red": "#b8231a",
    "gray": "#9c9c9f",
    "white": "#f6f4ef",
    "pink": "#f279b4",
    "blue": "#2f63c9",
}
SMILES = ("smile", "twinkle", "big_smile", "default")
NO_SMILES = ("serious", "sad", "concerned", "disbelief")  # grimace and tongue can be read either way

# Styles whose colour is the chosen one and covers enough of the image (looked at one by one).
# fmt: off
HAIR_TRAIN = (
    "bob", "big_hair", "bun", "curly", "curvy", "dreads", "fro", "long_not_too_long", "shaggy", "short_curly",
    "short_dreads_1", "short_round", "short_waved", "straight_1", "straight_strand", "pixie", "loose_hair",
    "caesar_side_part", "quiff", "einstein_hair",
)
HAIR_TEST = (
    "mia_wallace", "short_flat", "shaggy_mullet", "wild", "short_dreads_2", "pompadour", "mowgli", "elvis",
)
# fmt: on

SKINS = ("#ffdbb4", "#edb98a", "#d08b5b", "#ae5d29", "#614335")
CLOTHES = ("hoodie", "shirt_crew_neck", "shirt_scoop_neck", "shirt_v_neck", "collar_sweater", "blazer_shirt", "overall")
FABRICS = ("#262e33", "#65c9ff", "#5199e4", "#25557c", "#929598", "#a7ffc4", "#ffafb9", "#ff5c5c", "#ffffb1", "#ffffff")
EYES = ("default", "happy", "side", "squint", "surprised", "wink")
EYEBROWS = ("default", "default_natural", "flat_natural", "raised_excited_natural", "up_down_natural")
NOSES = ("default", "small", "wide")
GLASSES = ("", "", "", "round", "prescription_01", "prescription_02")


@dataclass(frozen=True)
class Face:
    """The parts of one face: names of files, colours as #rrggbb."""

    hair: str
    hair_color: str
    mouth: str
    skin: str = SKINS[1]
    eyes: str = "default"
    eyebrows: str = "default"
    nose: str = "default"
    clothes: str = "hoodie"
    fabric: str = FABRICS[1]
    glasses: str = ""


def random_face(rng: np.random.Generator, hair_color: str, smile: bool, train: bool) -> Face:
    """A face with the asked hair colour (a key of HAIR_COLORS) and mouth; train and test have different hair styles."""

    def pick(options) -> str:
        return options[int(rng.integers(len(options)))]

    return Face(
        hair=pick(HAIR_TRAIN if train else HAIR_TEST),
        hair_color=HAIR_COLORS[hair_color],
        mouth=pick(SMILES if smile else NO_SMILES),
        skin=pick(SKINS),
        eyes=pick(EYES),
        eyebrows=pick(EYEBROWS),
        nose=pick(NOSES),
        clothes=pick(CLOTHES),
        fabric=pick(FABRICS),
        glasses=pick(GLASSES),
    )


def render(face: Face, parts: Path, height: int = 240) -> Image.Image:
    """Draw a face with a transparent background.

    Args:
        face: what to draw.
        parts: folder of the SVG parts (`avatar_parts` of the `faces` asset).
        height: of the image in pixels; the width follows (264:280).
    Returns:
        RGBA image.
    """
    import resvg_py  # a self-contained wheel; imported here since only images of faces need it

    svg = ElementTree.tostring(assemble(face, parts), encoding="unicode")
    data = resvg_py.svg_to_bytes(svg_string=svg, height=height, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def assemble(face: Face, parts: Path) -> ElementTree.Element:
    """The SVG tree of a face, ids made unique per part."""
    root = _part(str(parts / "styles/transparent.svg"), "base")
    _find(root, "base_Skin-Color").set("fill", face.skin)
    slots = (
        ("Clothing", f"clothes/{face.clothes}.svg"),
        ("Mouth", f"mouth/{face.mouth}.svg"),
        ("Nose", f"nose/{face.nose}.svg"),
        ("Eyes", f"eyes/{face.eyes}.svg"),
        ("Eyebrow", f"eyebrows/{face.eyebrows}.svg"),
        ("Top", f"top/hair/{face.hair}.svg"),
    )
    for slot, name in slots:
        part = _part(str(parts / name), slot)
        for group, color in (("Hair-Color", face.hair_color), ("Fabric-Color", face.fabric)):
            for element in part.iter():
                if element.get("id") == f"{slot}_{group}":
                    element.set("fill", color)
        _find(root, f"base_{slot}").extend(list(part))
    if face.glasses:
        glasses = _part(str(parts / f"accessories/{face.glasses}.svg"), "Accessory")
        for element in root.iter():
            if element.get("id") == "Top_Accessory":
                element.extend(list(glasses))
                break
    return root


def _find(root: ElementTree.Element, name: str) -> ElementTree.Element:
    for element in root.iter():
        if element.get("id") == name:
            return element
    raise ValueError(f"the template of the faces asset has no slot {name!r}; fetch the asset again")


@functools.lru_cache(maxsize=256)
def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _part(path: str, prefix: str) -> ElementTree.Element:
    """A part's tree; every id and every reference to one gets the prefix, since all parts use the same ids."""
    root = ElementTree.fromstring(_read(path))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{prefix}_{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{prefix}_{value[1:]}")
            elif "url(#" in value:
                element.set(key, re.sub(r"url\(#", f"url(#{prefix}_", value))
    return root
