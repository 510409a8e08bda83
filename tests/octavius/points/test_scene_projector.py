"""The aggregation against a float64 reference written from the equations, and its masks."""

import pytest
import torch

from octavius.config import CloudConfig
from octavius.points.scene_projector import SceneProjector

WIDTH, DIM, HEADS, QUERIES = 24, 20, 3, 5


def reference(p, features, boxes, mask, heads):
    """One scene at a time, objects that the mask hides left out, softmax written as it is defined. All float64."""

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attend(name, queries, keys):
        q, k, v = (linear(x, f"{name}.attention.{f}") for f, x in (("fc_q", queries), ("fc_k", keys), ("fc_v", keys)))
        out, size = [], q.shape[-1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            power = (q[:, part] @ k[:, part].T / size**0.5).exp()
            out.append(power / power.sum(1, keepdim=True) @ v[:, part])
        return norm(queries + linear(torch.cat(out, 1), f"{name}.attention.fc_o"), f"{name}.layer_norm")

    tokens = []
    for h, r, seen in zip(features, boxes, mask, strict=True):
        h, r = h[seen], r[seen]
        objects = h + linear(linear(r, "pos_3d_proj.0").relu(), "pos_3d_proj.2")
        x = attend("resampler_3d.cross_attn.0", p["resampler_3d.query_embed.weight"], objects)
        x = attend("resampler_3d.self_attn.0", x, x)
        tokens.append(norm(linear(x, "llama_proj_3d.0"), "llama_proj_3d.1"))
    return torch.stack(tokens)


@pytest.fixture
def module():
    made = SceneProjector(WIDTH, DIM, torch.zeros(DIM), 0.3, CloudConfig(queries=QUERIES, heads=HEADS, dropout=0.0))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def batch():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1]]).bool()
    return torch.randn(3, 4, WIDTH), torch.rand(3, 4, 6), mask


def test_forward_and_gradients_match_the_reference(module, batch):
    features, boxes, mask = batch
    out, weights = module(*batch)
    exact = {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}
    want = reference(exact, features.double(), boxes.double(), mask, HEADS)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-4)
    seed = torch.randn_like(out)
    (out * seed).sum().backward()
    (want * seed.double()).sum().backward()
    for name, value in module.named_parameters():
        if name != "markers":
            torch.testing.assert_close(value.grad.double(), exact[name].grad, atol=2e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, QUERIES))
    assert not weights[~mask[:, None].expand_as(weights)].any()


def test_padding_changes_nothing(module, batch):
    features, boxes, mask = batch
    alone, _ = module(features[1:2, :1], boxes[1:2, :1], mask[1:2, :1])
    features[1, 1:], boxes[1, 1:] = 1e4, -1e4
    together, _ = module(features, boxes, mask)
    torch.testing.assert_close(together[1:2], alone)


def test_order_of_objects_changes_nothing(module, batch):
    features, boxes, mask = batch
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(features[:, order], boxes[:, order], mask[:, order])[0], module(*batch)[0])


def test_scene_without_objects_is_finite_in_both_directions(module, batch):
    features, boxes, mask = batch
    mask[1] = False
    out, _ = module(features, boxes, mask)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for n, p in module.named_parameters() if n != "markers")


def test_parameters_have_upstreams_names_and_shapes():
    names = {
        name: tuple(value.shape)
        for name, value in SceneProjector(768, 5120, torch.zeros(5120), 1.0, CloudConfig()).named_parameters()
    }
    assert (
        sum(
            value.numel()
            for value in SceneProjector(768, 5120, torch.zeros(5120), 1.0, CloudConfig()).resampler_3d.parameters()
        )
        == 4_740_096
    )
    assert names["resampler_3d.query_embed.weight"] == (16, 768)
    assert names["resampler_3d.cross_attn.0.attention.fc_q.weight"] == (768, 768)
    assert names["resampler_3d.self_attn.0.layer_norm.bias"] == (768,)
    assert names["pos_3d_proj.0.weight"] == (256, 6) and names["pos_3d_proj.2.weight"] == (768, 256)
    assert names["llama_proj_3d.0.weight"] == (5120, 768) and names["llama_proj_3d.1.weight"] == (5120,)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide the width 24, got 5"):
        SceneProjector(24, DIM, torch.zeros(DIM), 1.0, CloudConfig(heads=5))
