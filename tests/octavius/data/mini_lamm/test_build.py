"""mini-LAMM: same bytes from the same seed, exact boxes, nothing shared between splits, no answer to guess."""

import json
from collections import Counter
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
from PIL import Image, ImageDraw

from octavius.assets import registry
from octavius.data.mini_lamm import build, compose, cutouts, faces

SIZES = build.ImageCounts(train=48, test=16, zeroshot=8)
KEYS = {
    "mini-detection": {"object", "labels"},
    "mini-caption": {"sentences"},
    "mini-classification": {"label", "labels"},
    "mini-vqa": {"gt_choice", "gt_choices"},
    "mini-hair": {"attr", "labels"},
    "mini-smile": {"attr", "labels"},
}


def blob(rng: np.random.Generator) -> Image.Image:
    """A cut-out of random blocks in an ellipse, with a margin that cropping must remove."""
    blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((90, 70), Image.Resampling.NEAREST)
    mask = Image.new("L", blocks.size)
    ImageDraw.Draw(mask).ellipse((5, 5, 84, 64), fill=255)
    blocks.putalpha(mask)
    return blocks


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> dict[str, Path]:
    """Stand-ins for the assets: five blobs per category, and a face of rectangles."""
    root = tmp_path_factory.mktemp("assets")
    rng = np.random.default_rng(0)
    words = ("amber", "birch", "cedar", "delta", "ember")
    for category, (patterns, _) in (cutouts.CATEGORIES | cutouts.UNSEEN).items():
        folder = root / "stamps" / Path(patterns.split()[0].replace("/*/", "/one/")).parent
        folder.mkdir(parents=True, exist_ok=True)
        for word in words:
            blob(rng).save(folder / f"{word}.png")
            (folder / f"{word}.txt").write_text(f"A {word} {category}. Look!\nde.utf8=Etwas.\n")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="264" height="280" viewBox="0 0 264 280">{}</svg>'
    slots = "".join(f'<g id="{s}"/>' for s in ("Clothing", "Mouth", "Nose", "Eyes", "Eyebrow", "Top"))
    parts = {
        "styles": ["transparent"],
        "top/hair": [*faces.HAIR_TRAIN, *faces.HAIR_TEST],
        "mouth": [*faces.SMILES, *faces.NO_SMILES],
        "nose": faces.NOSES,
        "eyes": faces.EYES,
        "eyebrows": faces.EYEBROWS,
        "clothes": faces.CLOTHES,
        "accessories": [name for name in faces.GLASSES if name],
    }
    inner = {
        "styles": f'<g id="Skin-Color" fill=""><rect x="60" y="60" width="140" height="200"/></g>{slots}',
        "top/hair": '<g id="Hair-Color" fill=""><rect x="60" y="20" width="140" height="60"/></g><g id="Accessory"/>',
    }
    for folder, names in parts.items():
        (root / "faces" / folder).mkdir(parents=True)
        for name in names:
            text = svg.format(inner.get(folder, '<rect x="90" y="180" width="50" height="12"/>'))
            (root / "faces" / folder / f"{name}.svg").write_text(text)
    return {"stamps": root / "stamps", "faces": root / "faces"}


@pytest.fixture(scope="module")
def built(fake, tmp_path_factory) -> Path:
    pytest.importorskip("resvg_py")
    return build.build(tmp_path_factory.mktemp("data") / "a", SIZES, seed=3, assets=fake)


def records(folder: Path, split: str) -> list[dict]:
    return json.loads((folder / f"{split}.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_build_same_seed_same_bytes(built, fake, tmp_path):
    again = build.build(tmp_path / "b", SIZES, seed=3, assets=fake)
    assert files(again) == files(built)
    other = build.build(tmp_path / "c", SIZES, seed=4, assets=fake)
    assert files(other)["train.json"] != files(built)["train.json"]


def test_build_without_photographs_shows_faces(fake, tmp_path):
    pytest.importorskip("resvg_py")
    folder = build.build(tmp_path / "b", build.ImageCounts(6, 4, 4), assets={"faces": fake["faces"]})
    assert {record["benchmark"] for record in records(folder, "train")} == {"mini-hair", "mini-smile"}
    assert (len(records(folder, "train")), len(records(folder, "test")), records(folder, "zeroshot")) == (12, 8, [])


def test_build_skips_what_is_there(built, fake, monkeypatch):
    monkeypatch.setattr(build, "write_split", lambda *a: pytest.fail("built again"))
    assert build.build(built, SIZES, seed=3, assets=fake) == built


@pytest.mark.parametrize("lost", ["images/test_00001.jpg", "test.json"])
def test_build_mends_what_is_lost(fake, tmp_path, lost):
    pytest.importorskip("resvg_py")
    small = build.ImageCounts(8, 4, 4)
    folder = build.build(tmp_path / "d", small, assets=fake)
    before = files(folder)
    (folder / lost).unlink()
    assert files(build.build(folder, small, assets=fake)) == before


def test_build_replaces_other_settings(fake, tmp_path):
    pytest.importorskip("resvg_py")
    small = build.ImageCounts(8, 4, 4)
    build.build(tmp_path / "d", small, seed=0, assets=fake)
    first = files(tmp_path / "d")
    build.build(tmp_path / "d", small, seed=1, assets=fake)
    assert files(tmp_path / "d") != first and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_build_refuses_foreign_folder_and_unknown_size(fake, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no mini-LAMM"):
        build.build(tmp_path, SIZES, assets=fake)
    with pytest.raises(ValueError, match=r"smoke, demo, mini .* got 'huge'"):
        build.build(tmp_path / "e", "huge", assets=fake)


def test_build_failing_leaves_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "draw", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.build(tmp_path / "f", SIZES, assets=fake)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", build.SPLITS)
def test_records_are_complete(built, split):
    ids = set()
    for record in records(built, split):
        assert {"id", "image", "conversations", "task_type", "src_image", "benchmark"} <= set(record)
        assert set(record) >= KEYS[record["benchmark"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
        assert record["task_type"] in ("detection", "description", "classification", "VQA")
        assert Image.open(built / record["image"]).size == (compose.SIZE, compose.SIZE)
        ids.add(record["id"])
    assert len(ids) == len(records(built, split))


def test_answers_agree_with_ground_truth(built):
    for record in records(built, "train") + records(built, "test") + records(built, "zeroshot"):
        answer = record["conversations"][1]["value"]
        match record["benchmark"]:
            case "mini-detection":
                items = minidom.parseString(answer).getElementsByTagName("Item")
                assert [item.getAttribute("cls") for item in items] == [o["label"] for o in record["object"]]
                for item, truth in zip(items, record["object"], strict=True):
                    box = [float(item.getAttribute(key)) for key in ("x1", "y1", "x2", "y2")]
                    assert box == truth["bbox"] and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
                    assert truth["label"] in record["labels"]
            case "mini-caption":
                assert [answer] == record["sentences"]
            case "mini-classification":
                assert answer == record["label"] and answer in record["labels"]
            case "mini-vqa":
                place = "ABCD".index(record["gt_choice"])
                assert answer == f"{record['gt_choices'][place]} ({record['gt_choice']})"
                assert len(set(record["gt_choices"])) == 4
            case "mini-hair" | "mini-smile":
                assert answer == record["attr"] and answer in record["labels"]


def test_sides_share_no_photograph(built):
    shown = {split: {n for r in records(built, split) for n in r.get("photographs", [])} for split in build.SPLITS}
    assert shown["train"] and shown["test"] and shown["zeroshot"]
    assert not shown["train"] & shown["test"] and not (shown["train"] | shown["test"]) & shown["zeroshot"]
    classes = {o["label"] for r in records(built, "zeroshot") for o in r.get("object", [])}
    assert classes <= set(cutouts.UNSEEN)
    assert "ball" not in json.dumps([r["conversations"] for r in records(built, "train")])
    assert not set(faces.HAIR_TRAIN) & set(faces.HAIR_TEST)


def test_plans_are_balanced(fake):
    known = cutouts.load_cutouts(fake["stamps"], cutouts.CATEGORIES)
    plans = list(build.plan("train", known, 400, seed=0))
    of_faces = [p for p in plans if p.kind == "face"]
    assert len(of_faces) == round(400 * build.FACES)
    assert max(Counter(p.hair for p in of_faces).values()) <= len(of_faces) / 8 + 2
    assert abs(Counter(p.smile for p in of_faces)[True] - len(of_faces) / 2) <= 8
    single = Counter(p.cutouts[0].category for p in plans if p.kind == "single")
    assert max(single.values()) - min(single.values()) <= 1
    sizes = Counter(len(p.cutouts) for p in plans if p.kind == "scene")
    assert max(sizes.values()) - min(sizes.values()) <= 1


def ready() -> dict[str, Path]:
    """The real registry, or skip."""
    pytest.importorskip("resvg_py")
    try:
        return {name: registry.path(name) for name in ("stamps", "faces")}
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.assets
def test_real_smoke_build(tmp_path):
    folder = build.build(tmp_path / "smoke", "smoke", assets=ready())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["records"]["train"]) == set(KEYS) and len(list((folder / "images").iterdir())) == 206
    total = sum(manifest["records"]["train"].values())
    assert 0.18 <= manifest["records"]["train"]["mini-detection"] / total <= 0.26
