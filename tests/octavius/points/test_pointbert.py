"""The point encoder: farthest points, groups, a float64 reference of the transformer, checkpoints."""

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavius.points.cloud import PointCloud
from octavius.points.pointbert import (
    PointBert,
    PointBertConfig,
    encode,
    farthest_points,
    group,
    load_pointbert,
    normalise,
    prepare,
)

TINY = PointBertConfig(
    width=12, depth=2, heads=3, groups=5, group_size=4, patch_width=8, channels=6, points=40, drop_path=0.1
)


def clouds(*sizes):
    rng = np.random.default_rng(0)
    return [
        PointCloud(rng.normal(size=(n, 3)).astype(np.float32), rng.random((n, 3)).astype(np.float32)) for n in sizes
    ]


def test_farthest_points_are_the_farthest():
    xyz = torch.randn(3, 50, 3)
    chosen = farthest_points(xyz, 9)
    for row, points in zip(chosen.tolist(), xyz.double(), strict=True):
        assert row[0] == 0 and len(set(row)) == 9
        for step in range(1, 9):
            distance = torch.cdist(points, points[row[:step]]).min(1).values
            assert distance[row[step]] == distance.max()


def test_groups_are_the_nearest_points():
    points = torch.randn(2, 30, 6)
    groups, centres = group(points, 4, 5)
    for b in range(2):
        for g in range(4):
            distance = (points[b, :, :3] - centres[b, g]).norm(dim=1)
            nearest = points[b, distance.argsort()[:5]]
            want = torch.cat((nearest[:, :3] - centres[b, g], nearest[:, 3:]), 1)
            torch.testing.assert_close(groups[b, g], want)


def test_object_with_fewer_points_than_a_group_repeats_them():
    groups, _ = group(torch.randn(1, 3, 3), 2, 7)
    assert groups.shape == (1, 2, 7, 3) and torch.equal(groups[:, :, 0], groups[:, :, 3])
    features = encode(PointBert(TINY), clouds(1, 3, 39, 200))
    assert features.shape == (4, 24) and features.isfinite().all()


def test_input_is_centred_and_scaled():
    small, large = clouds(60)[0], PointCloud(clouds(60)[0].xyz * 1000 + 7, clouds(60)[0].rgb)
    drawn = [prepare([c], TINY, np.random.default_rng(1)) for c in (small, large)]
    (one, size), (other, larger) = map(normalise, drawn)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(1000 * size, larger)
    assert one[..., :3].norm(dim=-1).max() == pytest.approx(1) and one.shape == (1, 40, 6)
    torch.testing.assert_close(size[0], torch.from_numpy(np.ptp(drawn[0][0, :, :3].numpy(), 0)))
    assert prepare([small], replace(TINY, channels=3), np.random.default_rng(1)).shape == (1, 40, 3)


def test_size_counts_in_metres_alone():
    points = torch.rand(2, 40, 6)
    larger = torch.cat((3 * points[..., :3], points[..., 3:]), -1)
    for metric in (False, True):
        model = PointBert(replace(TINY, metric=metric)).eval()
        same = torch.allclose(model(points), model(larger), atol=1e-4)
        assert same != metric


def test_forward_matches_a_reference_in_float64():
    model = PointBert(replace(TINY, metric=True)).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.4)
    points = torch.randn(2, 40, 6)
    p = {name: value.double() for name, value in model.state_dict().items()}

    def linear(x, name):
        bias = p.get(f"{name}.bias")
        return x @ p[f"{name}.weight"].T + (0 if bias is None else bias)

    def bn(x, name):
        return x / (1 + 1e-5) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]  # fresh running statistics: 0 and 1

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    xyz = points[..., :3].double() - points[..., :3].double().mean(1, keepdim=True)
    size = xyz.amax(1) - xyz.amin(1)
    xyz = xyz / xyz.norm(dim=-1).amax(1)[:, None, None]
    groups, centres = group(torch.cat((xyz, points[..., 3:].double()), -1), 5, 4)
    local = linear(bn(linear(groups, "encoder.first_conv.0"), "encoder.first_conv.1").relu(), "encoder.first_conv.3")
    joint = torch.cat((local.amax(2, keepdim=True).expand_as(local), local), -1)
    joint = linear(bn(linear(joint, "encoder.second_conv.0"), "encoder.second_conv.1").relu(), "encoder.second_conv.3")
    x = torch.cat((p["cls_token"].expand(2, -1, -1), linear(joint.amax(2), "reduce_dim")), 1)
    gelu = torch.nn.functional.gelu
    pos = linear(gelu(linear(centres, "pos_embed.0")), "pos_embed.2")
    told = linear(gelu(linear(size.log(), "size_embed.0")), "size_embed.2")
    pos = torch.cat((p["cls_pos"] + told[:, None], pos), 1)
    for i in range(2):
        x = x + pos
        name = f"blocks.blocks.{i}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            heads.append((q[..., part] @ k[..., part].mT / 2).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    x = norm(x, "norm")
    want = torch.cat((x[:, 0], x[:, 1:].amax(1)), -1)
    torch.testing.assert_close(model(points).double(), want, atol=1e-4, rtol=1e-3)


def test_memory_goes_with_the_chunk_and_results_do_not():
    model = PointBert(TINY)
    objects = clouds(50, 8, 70, 33, 12)
    torch.testing.assert_close(encode(model, objects, batch_size=2), encode(model, objects, batch_size=5))
    assert encode(model, []).shape == (0, 24)


def test_bfloat16_features_are_near_and_weights_stay(monkeypatch):
    monkeypatch.setattr("octavius.points.pointbert.CHUNK", 3)  # 5 groups: a full chunk and a rest
    model, objects = PointBert(replace(TINY, metric=True)).eval(), clouds(50, 8)
    exact, rough = encode(model, objects), encode(model, objects, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32 and 0 < (exact - rough).norm() < 0.03 * exact.norm()
    assert all(value.dtype != torch.bfloat16 for value in model.state_dict().values())


def test_folder_round_trip(tmp_path):
    model = PointBert(TINY).eval()
    model.save(tmp_path)
    again = load_pointbert(tmp_path)
    assert again.config == TINY and not any(value.requires_grad for value in again.parameters())
    points = torch.randn(2, 40, 6)
    assert torch.equal(model(points), again(points))


def test_ulip_checkpoint_loads(tmp_path):
    """1×1 convolutions, prefixes of two wrappers, and the tensors of the text and image towers beside the encoder's."""
    model = PointBert(TINY).eval()
    state = {
        f"module.point_encoder.{name}": value[..., None] if "_conv." in name and value.ndim == 2 else value
        for name, value in model.state_dict().items()
    }
    state |= {"module.pc_projection": torch.randn(24, 24), "module.visual.conv1.weight": torch.randn(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "ulip.pt")
    points = torch.randn(2, 40, 6)
    assert torch.equal(load_pointbert(tmp_path / "ulip.pt", TINY)(points), model(points))


def test_unfit_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a Point-BERT checkpoint"):
        load_pointbert(tmp_path / "none.pt")
    state = PointBert(TINY).state_dict()
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: blocks.blocks.0.attn.proj.bias must be \(384,\) .* got \(12,\)"):
        load_pointbert(tmp_path / "x.pt")


def saved(what) -> bytes:
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


HOSTILE = {
    "empty": b"",
    "text": b"hello world",
    "command": b"cos\nsystem\n(S'true'\ntR.",
    "class": pickle.dumps(PointBert, 2),
    "number": pickle.dumps(3, 2),
    "stack": b"(((((",
    "text-cut": b"\x80\x02X\x03\x00\x00\x00\xff\xff\xff.",
    "cut": saved({"a": torch.ones(99)})[:-60],
    "list": saved([1]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unreadable_checkpoints_are_refused(tmp_path, name, suffix):
    (tmp_path / f"x{suffix}").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match="cannot be read as a Point-BERT checkpoint"):
        load_pointbert(tmp_path / f"x{suffix}")


def test_a_checkpoint_of_no_tensors_is_named(tmp_path):
    torch.save({"cls_token": 3, "epoch": "x"}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"blocks\.blocks\.0.* got None"):
        load_pointbert(tmp_path / "x.pt")
    save_file({"cls_token": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pointbert(tmp_path / "x.safetensors")


def test_config_is_checked():
    with pytest.raises(ValueError, match="channels must be 3"):
        PointBertConfig(channels=4)
    with pytest.raises(ValueError, match="points must be at least"):
        PointBertConfig(points=100)
