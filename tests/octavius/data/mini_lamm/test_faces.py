"""Faces: the drawn hair has the asked colour, parts are those that were asked for."""

import numpy as np
import pytest

from octavius.assets import registry
from octavius.data.mini_lamm import faces


def test_face_hair_has_the_colour(tmp_path):
    pytest.importorskip("resvg_py")
    slots = "".join(f'<g id="{slot}"/>' for slot in ("Clothing", "Mouth", "Nose", "Eyes", "Eyebrow", "Top"))
    inner = {
        "styles/transparent": f'<g id="Skin-Color" fill=""><rect x="60" y="60" width="140" height="200"/></g>{slots}',
        "top/hair/bob": '<g id="Hair-Color" fill=""><rect x="60" y="20" width="140" height="60"/></g>',
    }
    for name in ("mouth/smile", "nose/default", "eyes/default", "eyebrows/default", "clothes/hoodie", *inner):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = f'<svg xmlns="http://www.w3.org/2000/svg" width="264" height="280">{inner.get(name, "<g/>")}</svg>'
        (tmp_path / f"{name}.svg").write_text(text)
    face = faces.Face(hair="bob", hair_color="#2f63c9", mouth="smile")
    pixels = np.asarray(faces.render(face, tmp_path, height=280))
    assert pixels.shape == (280, 264, 4)
    assert pixels[30, 100].tolist() == [0x2F, 0x63, 0xC9, 255] and pixels[270, 5, 3] == 0


def test_random_face_has_what_was_asked():
    rng = np.random.default_rng(0)
    for smile in (True, False):
        for train in (True, False):
            face = faces.random_face(rng, "red", smile, train)
            assert face.hair_color == faces.HAIR_COLORS["red"]
            assert (face.mouth in faces.SMILES) == smile and (face.hair in faces.HAIR_TRAIN) == train
    assert not set(faces.SMILES) & set(faces.NO_SMILES) and not set(faces.HAIR_TRAIN) & set(faces.HAIR_TEST)


@pytest.mark.assets
def test_real_faces_show_the_asked_hair_colour():
    pytest.importorskip("resvg_py")
    try:
        parts = registry.path("faces")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for hair in (*faces.HAIR_TRAIN, *faces.HAIR_TEST):
        pixels = np.asarray(faces.render(faces.Face(hair, "#00ff00", "smile"), parts, height=140), dtype=int)
        green = (np.abs(pixels - [0, 255, 0, 255]).max(axis=2) < 40).mean()
        assert green > 0.02, f"{hair} shows too little of its colour"
