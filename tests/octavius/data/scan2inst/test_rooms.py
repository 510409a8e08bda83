"""mini-Scan2Inst: rooms without collisions, exact boxes, held-out models; the same seed gives the same bytes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from octavius.assets import registry
from octavius.data.scan2inst import furniture, rooms
from octavius.data.scan2inst.furniture import CLASSES, Furniture
from octavius.data.scan2inst.relations import COLOURS
from octavius.points.cloud import PointCloud, read_cloud
from octavius.points.proposals import crop

SIZES = rooms.RoomCounts(12, 5, 3)


def model(label: str, size=(0.6, 0.5, 0.8), catalogue="A", number=0) -> Furniture:
    return Furniture(f"{catalogue}#{label}{number}", label, "Office", catalogue, size, 0.0, "", "", (), label)


def shell(item: Furniture) -> PointCloud:
    """Points on the faces of the model's box, all corners among them."""
    rng = np.random.default_rng(len(item.id))
    unit = np.concatenate((rng.random((2000, 3)), np.indices((2, 2, 2)).reshape(3, -1).T))
    unit[np.arange(2000), rng.integers(3, size=2000)] = rng.integers(2, size=2000)
    xyz = (unit - (0.5, 0.5, 0)) * item.size
    return PointCloud(xyz.astype(np.float32), np.full((2008, 3), 0.9, np.float32))


@pytest.fixture(scope="module")
def stock():
    items = [model(label, (0.4 + 0.1 * i, 0.5, 0.7)) for i, label in enumerate(("chair", "sofa", "bed", "window"))]
    items += [model("table", (1.4, 0.9, 0.7)), model("lamp", (0.2, 0.2, 0.4)), model("door", (0.9, 0.1, 2.0))]
    return {item: shell(item) for item in items}


@pytest.mark.parametrize("seed", range(25))
def test_rooms_have_no_collisions(stock, seed):
    rng = np.random.default_rng(seed)
    room, placed = rooms.compose(rng, stock)
    assert len(placed) >= 3
    for index, item in enumerate(placed):
        assert rooms.fits(item.box, room)
        assert not any(rooms.collide(item.box, other.box) for other in placed[:index])
    scene = rooms.annotate("x", room, placed)
    cloud = rooms.scan(rng, room, placed)
    for item, points in zip(scene.objects, crop(cloud, np.array([o.box for o in scene.objects]), 0.03), strict=True):
        inside = points.xyz[(np.abs(points.rgb - 0.9) < 0.2).all(1)]
        assert item.colour == "white" and len(points) >= rooms.FEWEST * 0.9
        assert np.all(inside.min(0) >= np.array(item.box[:3]) - 0.031)


@pytest.mark.parametrize("turns", range(4))
def test_box_is_that_of_the_turned_points(stock, turns):
    item = next(item for item in stock if item.label == "table")
    placed = rooms.Placed(item, stock[item], turns, (0.3, -0.2, 0.1))
    room = (-3.0, -3.0, 0.0, 3.0, 3.0, 2.6)
    rng = np.random.default_rng(0)
    before, rooms.NOISE = rooms.NOISE, 0.0
    try:
        cloud = rooms.scan(rng, room, [placed])
    finally:
        rooms.NOISE = before
    count = int(np.clip(rooms.DENSITY * 2 * (1.4 * 0.9 + 1.4 * 0.7 + 0.9 * 0.7), rooms.FEWEST, rooms.MOST))
    np.testing.assert_allclose(cloud[slice(0, count)].box, placed.box, atol=0.02)


def test_split_keeps_models_and_twins_apart():
    twin = model("chair", number=1)
    models = [twin, model("chair", number=2), *(model("sofa", (1 + i, 1, 1), number=i) for i in range(8))]
    models += [model("chair", catalogue=furniture.UNSEEN)]
    splits = furniture.split(models)
    assert [m.catalogue for m in splits["zeroshot"]] == [furniture.UNSEEN]
    assert len(splits["test"]) == 2 and {m.label for m in splits["test"]} == {"sofa"}
    assert models[0] in splits["train"] and models[1] in splits["train"]  # of one name and size


@pytest.mark.assets
def test_catalogue_and_points(tmp_path):
    folder = registry.path("furniture")
    models = furniture.catalogue(folder)
    assert len(models) == 820 and len({m.id for m in models}) == 820
    splits = furniture.split(models)
    counts = {split: Counter(m.label for m in members if m.label) for split, members in splits.items()}
    assert set(counts["train"]) == set(CLASSES) == set(counts["test"]) and len(counts["zeroshot"]) >= 10
    assert not {m.id for m in splits["train"]} & {m.id for m in splits["test"]}
    held = {split: Counter(m.label for m in members) for split, members in rooms.usable(models).items()}
    assert len(held["test"]) == 11 and min(held["test"].values()) >= 3 and set(held["train"]) == set(held["test"])
    assert set(held["zeroshot"]) < set(held["test"]) and "" not in held["train"]
    for item in models[::120]:
        cloud = furniture.sample(folder, item)
        np.testing.assert_allclose(cloud.xyz.max(0) - cloud.xyz.min(0), item.size, rtol=0.12)
        assert abs(cloud.xyz[:, 2].min()) < 0.02 * max(item.size) and cloud.rgb.min() >= 0 and cloud.rgb.max() <= 1
        assert furniture.icon(folder, item).size[0] > 50


@pytest.mark.assets
def test_build_is_repeatable_and_holds_out_models(tmp_path):
    one, other = rooms.build(tmp_path / "a", SIZES), rooms.build(tmp_path / "b", SIZES)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 12 + 5 + 3 + 4
    for file in files:
        if file.suffix == ".json":
            assert (one / file).read_bytes() == (other / file).read_bytes()
        else:
            with np.load(one / file) as a, np.load(other / file) as b:
                assert sorted(a) == sorted(b) == ["boxes", "ids", "rgb", "xyz"]
                assert all(np.array_equal(a[name], b[name]) for name in a)
    stamp = (one / "train.json").stat().st_mtime_ns
    assert rooms.build(one, SIZES) == one and (one / "train.json").stat().st_mtime_ns == stamp
    (one / "clouds/test_00002.npz").unlink()
    assert rooms.build(one, SIZES) == one and (one / "clouds/test_00002.npz").is_file()
    for split in rooms.SPLITS:
        check_split(one, split)


def check_split(folder: Path, split: str) -> None:
    for record in json.loads((folder / f"{split}.json").read_text()):
        with np.load(folder / record["pcl"]) as arrays:
            assert record["object_id"] in arrays["ids"] and (arrays["boxes"][:, 3:] > arrays["boxes"][:, :3]).all()
        assert record.get("label", "") in record.get("labels", [""])
        if record.get("kind") == "colour":
            assert record["label"] in COLOURS
    assert len(read_cloud(folder / record["pcl"])) > 2000


def test_wrong_folder_and_size_are_named(tmp_path):
    with pytest.raises(ValueError, match="size must be one of smoke, demo, mini"):
        rooms.build(tmp_path / "x", "huge")
    (tmp_path / "mine").write_text("precious")
    for manifest in (None, '{"version": 1}', '{"kind": "web app"}', "[]", "{"):
        if manifest is not None:
            (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match="holds no mini-Scan2Inst"):
            rooms.build(tmp_path, SIZES)
    assert (tmp_path / "mine").read_text() == "precious"


def test_build_replaces_its_own_folder_alone(tmp_path, monkeypatch, stock):
    monkeypatch.setattr(registry, "need", lambda name: tmp_path)
    monkeypatch.setattr(furniture, "catalogue", lambda folder: list(stock))
    monkeypatch.setattr(furniture, "load_points", lambda folder, models, cache: list(stock.values()))
    monkeypatch.setattr(furniture, "split", lambda models: dict.fromkeys(rooms.SPLITS, models))
    monkeypatch.setattr(rooms, "FEWEST_MODELS", 1)
    one = rooms.build(tmp_path / "x", rooms.RoomCounts(1, 1, 1))
    before = (one / "test.json").read_bytes()
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="stopped"):
        broken.setattr(rooms, "write_split", stop)
        rooms.build(one, rooms.RoomCounts(2, 1, 1))
    assert (one / "test.json").read_bytes() == before
    rooms.build(one, rooms.RoomCounts(2, 1, 1))
    assert len(list((one / "clouds").iterdir())) == 4 and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_every_side_shows_its_own_models(tmp_path, monkeypatch):
    items = [model(label, number=n) for n in range(8) for label in ("chair", "sofa", "bed", "table")]
    items = [replace(item, name=f"{item.name} {n}") for n, item in enumerate(items)]
    items += [model(label, catalogue=furniture.UNSEEN) for label in ("chair", "sofa", "bed", "table", "lamp")]
    stock, shown, annotate = {item: shell(item) for item in items}, {}, rooms.annotate

    def watch(name, room, placed):
        shown.setdefault(name.split("_")[0], set()).update(item.model.id for item in placed)
        return annotate(name, room, placed)

    monkeypatch.setattr(registry, "need", lambda name: tmp_path)
    monkeypatch.setattr(furniture, "catalogue", lambda folder: list(stock))
    monkeypatch.setattr(furniture, "load_points", lambda folder, models, cache: list(stock.values()))
    monkeypatch.setattr(rooms, "annotate", watch)
    monkeypatch.setattr(rooms, "FEWEST_MODELS", 2)
    rooms.build(tmp_path / "x", rooms.RoomCounts(8, 8, 4))
    own = {split: {item.id for item in members} for split, members in furniture.split(items).items()}
    assert set(shown) == set(rooms.SPLITS) and all(shown[split] <= own[split] for split in shown)
    assert not any("lamp" in item for item in set.union(*shown.values()))  # no test model is one
    assert all(len(ids) >= 3 for ids in shown.values()) and len(set.union(*own.values())) == len(items)


def stop(*_):
    raise RuntimeError("stopped")
