"""Towers and the feature store: right tokens, computed once, bad images reported and not fatal."""

import io
import os
import struct
import subprocess

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from moe_lora import storage
from PIL import Image
from transformers import CLIPVisionModel, Dinov2Config, Dinov2Model

from octavius.assets import registry
from octavius.vision import features
from octavius.vision.features import FeatureStore
from octavius.vision.towers import CLIP, EfficientNetTower, ViTTower, load_tower
from tests.support import tiny


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """A tower of 4×4 tokens."""
    folder = tmp_path_factory.mktemp("fine")
    tiny.save_tower(folder, patch=7)
    return folder


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for index, path in enumerate(paths):
        tiny.draw(path, index)
    return paths


@pytest.fixture
def tower(parts):
    return load_tower(str(parts.tower))


def test_tower_is_frozen_and_says_its_shape(tower):
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    assert (tower.tokens, tower.width, tower.size, tower.mean_std) == (4, 32, 28, CLIP)
    assert tower(torch.randn(3, 3, 28, 28)).shape == (3, 4, 32)


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_tokens_are_the_hidden_state_without_class_token(parts, layer):
    pixels = torch.randn(2, 3, 28, 28)
    states = CLIPVisionModel.from_pretrained(parts.tower)(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert not torch.allclose(states[layer], states[layer - 1])
    assert torch.equal(load_tower(str(parts.tower), layer)(pixels), states[layer][:, 1:])


def test_last_layer_is_before_the_final_norm(parts):
    pixels = torch.randn(1, 3, 28, 28)
    net = CLIPVisionModel.from_pretrained(parts.tower)
    normed = []
    net.get_submodule(next(name for name, _ in net.named_modules() if name.endswith("encoder"))).register_forward_hook(
        lambda module, args, out: normed.append(out[0])
    )
    net(pixel_values=pixels)
    assert torch.equal(load_tower(str(parts.tower), -1)(pixels), normed[0][:, 1:])


def test_merge_joins_neighbours(fine):
    plain, merged = load_tower(str(fine)), load_tower(str(fine), merge=2)
    assert (plain.tokens, plain.width) == (16, 32) and (merged.tokens, merged.width) == (4, 128)
    pixels = torch.randn(2, 3, 28, 28)
    grid, got = plain(pixels).view(2, 4, 4, 32), merged(pixels).view(2, 2, 2, 32, 2, 2)
    for row in range(4):
        for column in range(4):
            assert torch.equal(got[:, row // 2, column // 2, :, row % 2, column % 2], grid[:, row, column])


def test_other_vit_drops_its_class_token(tmp_path):
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=56, mlp_ratio=2
    )
    net = Dinov2Model(config).eval()
    net.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), layer=-1)
    assert (tower.tokens, tower.width, tower.size) == (16, 24, 224) and tower.mean_std != CLIP
    pixels = torch.randn(1, 3, 224, 224)
    want = net(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    torch.testing.assert_close(tower(pixels), want, atol=1e-5, rtol=1e-5)


def test_tower_must_be_a_vit_and_merge_must_fit(parts, fine):
    with pytest.raises(ValueError, match="tower must be EfficientNet-Lite0 or a ViT with patches, got llama"):
        ViTTower(str(parts.llm))
    with pytest.raises(ValueError, match="tower_merge must divide the 4 tokens of a side, got 3"):
        ViTTower(str(fine), merge=3)


def test_pixels_are_squashed_and_normalised(tower):
    left = Image.new("RGB", (41, 17), "black")
    left.paste("white", (20, 0, 41, 17))
    pixels = tower.pixels(left)
    mean, std = torch.tensor(CLIP)
    assert pixels.shape == (3, 28, 28) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 14, 2], -mean / std)
    torch.testing.assert_close(pixels[:, 14, -2], (1 - mean) / std)


def modes():
    clear = Image.new("RGBA", (9, 7), (0, 0, 0, 0))
    palette = Image.new("P", (9, 7), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    return {"RGBA": clear, "LA": Image.new("LA", (9, 7), (0, 0)), "P": palette, "L": Image.new("L", (9, 7), 255)}


@pytest.mark.parametrize("mode", modes())
def test_transparent_shows_white(tower, mode):
    stored = io.BytesIO()
    modes()[mode].save(stored, "PNG")
    white = tower.pixels(Image.new("RGB", (9, 7), "white"))
    torch.testing.assert_close(tower.pixels(Image.open(stored)), white)


def test_fingerprint_tells_functions_apart(parts, tower, fine):
    again = load_tower(str(parts.tower))
    others = [load_tower(str(parts.tower), -1), load_tower(str(parts.tower), merge=2), load_tower(str(fine))]
    changed = load_tower(str(parts.tower))
    next(changed.parameters()).data[0] += 0.01
    prints = [each.fingerprint() for each in (tower, *others, changed)]
    assert again.fingerprint() == prints[0] and len(set(prints)) == 5


def test_cached_features_equal_computed_ones(tower, images, tmp_path):
    kept, fresh = FeatureStore(tower, tmp_path / "cache"), FeatureStore(tower)
    assert kept.prepare([*images, images[0]], batch_size=2) == {} == fresh.prepare(images)
    order = [images[3], images[0], images[3], images[4]]
    got, want = kept(order), fresh(order)
    assert got.dtype == want.dtype == torch.float16 and got.shape == (4, 4, 32)
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
    with torch.inference_mode():
        alone = tower(tower.pixels(Image.open(images[4]))[None]).half()
    torch.testing.assert_close(got[3:], alone, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(got[0], got[1], atol=0.1)


def count(tower):
    """How many images a tower has seen, as a list that grows."""
    seen = []
    tower.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    return seen


def test_many_images_go_through_the_tower_in_chunks(tower, images):
    store, seen = FeatureStore(tower), count(tower)
    many = [images[index % 5] for index in range(37)]
    got = store(many)
    assert sum(seen) == 37 and max(seen) <= 32
    torch.testing.assert_close(got[35:], store(many[35:]), atol=1e-2, rtol=1e-2)


def test_features_are_computed_once(tower, images, tmp_path):
    seen = count(tower)
    first, second = FeatureStore(tower, tmp_path / "cache"), FeatureStore(tower, tmp_path / "cache")
    first.prepare(images)
    assert sum(seen) == 5
    second.prepare(images[::-1])
    assert torch.equal(second(images), first(images)) and sum(seen) == 5


def test_changed_image_is_computed_anew(tower, images, tmp_path):
    seen, store = count(tower), FeatureStore(tower, tmp_path / "cache")
    store.prepare(images)
    before = store(images)
    tiny.draw(images[1], 4)
    os.utime(images[1], ns=(1, 1))
    again = FeatureStore(tower, tmp_path / "cache")
    again.prepare(images)
    assert sum(seen) == 10 and not torch.equal(again(images)[1], before[1])


@pytest.mark.parametrize("name", ["index.json", "manifest.json", "rows.f16"])
@pytest.mark.parametrize("how", ["delete", "cut"])
def test_shard_that_is_not_whole_is_computed_anew(tower, images, tmp_path, name, how):
    FeatureStore(tower, tmp_path / "cache").prepare(images)
    (file,) = (tmp_path / "cache").glob(f"*/ready/{name}")
    if how == "delete":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    seen, store = count(tower), FeatureStore(tower, tmp_path / "cache")
    assert store.prepare(images) == {} and sum(seen) == 5 and store(images).isfinite().all()


def test_damaged_row_is_refused_by_name(tower, images, tmp_path):
    store = FeatureStore(tower, tmp_path / "cache")
    store.prepare(images)
    (file,) = (tmp_path / "cache").glob("*/ready/rows.f16")
    size = 2 * tower.tokens * tower.width
    with file.open("r+b") as stream:
        stream.seek(2 * size + 5)
        stream.write(b"\xff")
    order = sorted(images)
    assert store([order[1], order[3]]).isfinite().all()
    with pytest.raises(storage.DamagedError, match=rf"rows\.f16: the features of {order[2]} are damaged"):
        store([order[1], order[2]])


def test_features_that_are_not_finite_are_not_kept(tower, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tower, "features", lambda pixels: torch.full((len(pixels), 4, 32), torch.nan).half())
    with pytest.raises(ValueError, match=r"features of .*png must be finite"):
        FeatureStore(tower, tmp_path / "cache").prepare(images)
    assert not list((tmp_path / "cache").glob("*/ready"))


def test_shards_are_shared_out_among_processes(tower, images, tmp_path, monkeypatch):
    """Three processes at once compute each of the five shards once, and all read the same."""
    monkeypatch.setattr(features, "SHARD", 1)
    children = []
    for rank in range(3):
        if (child := os.fork()) == 0:
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
                torch.set_num_threads(1)
                seen, store = count(tower), FeatureStore(tower, tmp_path / "cache")
                store.prepare(images)
                torch.save((sum(seen), store(images)), tmp_path / f"{rank}.pt")
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert sum(count for count, _ in results) == 5
    assert all(torch.equal(results[0][1], rows) for _, rows in results)


def test_full_disk_while_features_are_computed_is_one_error(tower, images, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        (disk / "fill").write_bytes(bytes(8192))
        with pytest.raises(storage.DiskFullError, match="the disk is full"):
            FeatureStore(tower, disk / "cache").prepare(images * 1)
        assert not list(disk.glob("cache/*/ready"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def spoil(images):
    """A missing, an empty and a foreign image, two torn ones, and one whose header claims 4.6 billion pixels."""
    whole = io.BytesIO()
    noise = torch.randint(0, 256, (60, 50, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(whole, "JPEG")
    torn = images[0].with_name("torn.jpg")
    torn.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    missing, empty, foreign = (images[0].with_name(name) for name in ("missing.png", "empty.png", "foreign.png"))
    empty.write_bytes(b"")
    foreign.write_text("no image")
    cut = images[0].with_name("cut.png")
    cut.write_bytes(images[2].read_bytes()[:-40])
    huge = images[0].with_name("huge.bmp")
    Image.new("RGB", (9, 7)).save(huge)
    header = bytearray(huge.read_bytes())
    header[18:26] = struct.pack("<ii", 68_000, 68_000)
    huge.write_bytes(header)
    return [missing, empty, foreign, torn, cut, huge]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "on-demand"])
def test_bad_images_are_reported_with_reasons(tower, images, tmp_path, keep):
    bad = spoil(images)
    store = FeatureStore(tower, tmp_path / "cache" if keep else None)
    for _ in range(2):  # the second time from what was kept
        found = store.prepare([bad[0], *images, *bad[1:]], batch_size=3)
        assert set(found) == set(bad) and all(found.values())
    assert store(images).isfinite().all()


def test_store_of_no_image(tower, tmp_path):
    assert FeatureStore(tower, tmp_path / "cache").prepare([]) == {}


@pytest.mark.assets
def test_efficientnet_equals_its_package():
    try:
        weights = registry.path("efficientnet-lite0")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    tower = EfficientNetTower(weights).eval()
    pixels = torch.randn(2, 3, 224, 224)
    middle = []
    for block in net._blocks:
        block.register_forward_hook(lambda module, args, out: middle.append(out))
    with torch.inference_mode():
        deep, got = net.extract_features(pixels), tower(pixels)
    fine = [out for out in middle if out.shape[-1] == 14][-1]  # [2, 112, 14, 14]
    assert got.shape == (2, tower.tokens, tower.width) == (2, 49, 1280 + 4 * 112)
    cells = got.view(2, 7, 7, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(cells[:, :1280], deep, atol=1e-3, rtol=1e-3)
    for row in range(2):
        for column in range(2):
            part = cells[:, 1280 + 2 * row + column :: 4]
            torch.testing.assert_close(part, fine[:, :, row::2, column::2], atol=1e-3, rtol=1e-3)
