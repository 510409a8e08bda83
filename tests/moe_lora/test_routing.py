"""`Routing`: what it accepts, what it refuses, and how often it looks at values."""

import copy

import moe_lora
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_lora import Routing


def routing(N=3, K=2, offsets=None):
    return Routing(torch.arange(N * K).view(N, K) % 4, torch.rand(N, K), offsets)


def test_routing_keeps_int32_and_gates_as_given():
    gates = torch.rand(3, 2, requires_grad=True)
    made = Routing(torch.zeros(3, 2, dtype=torch.int64), gates, torch.tensor([0, 1, 1, 4]))
    assert made.experts.dtype == made.offsets.dtype == torch.int32
    assert made.gates is gates
    assert Routing(made.experts, gates).experts is made.experts


BAD = (
    ([[0, 1]], torch.rand(1, 2), None, TypeError, "experts must be a tensor, got list"),
    (torch.zeros(3, dtype=torch.int), torch.rand(3), None, ValueError, r"experts must be \[N, K\] .* got \(3,\)"),
    (torch.zeros(3, 0, dtype=torch.int), torch.rand(3, 0), None, ValueError, r"K >= 1, got \(3, 0\)"),
    (torch.zeros(3, 2, dtype=torch.int), torch.rand(2, 3), None, ValueError, r"gates must be \[N, K\] = \(3, 2\)"),
    (torch.zeros(3, 2, dtype=torch.int), torch.ones(3, 2).int(), None, TypeError, "gates must be floating point"),
    (torch.zeros(3, 2), torch.rand(3, 2), None, TypeError, "experts must be integer, got torch.float32"),
    (torch.zeros(3, 2).bool(), torch.rand(3, 2), None, TypeError, "experts must be integer, got torch.bool"),
    (torch.full((3, 2), 2**32 + 1), torch.rand(3, 2), None, ValueError, "experts must fit into int32, got 4294967297"),
    (torch.zeros(3, 2).int(), torch.rand(3, 2, device="meta"), None, ValueError, "gates must be on cpu like experts"),
    (
        torch.zeros(3, 2).int(),
        torch.rand(3, 2),
        torch.zeros(3).int(),
        ValueError,
        r"offsets must be \[N \+ 1\] = \(4,\)",
    ),
    (torch.zeros(3, 2).int(), torch.rand(3, 2), torch.zeros(4), TypeError, "offsets must be integer"),
    (torch.zeros(3, 2).int(), torch.rand(3, 2), [0, 1, 2, 3], TypeError, "offsets must be a tensor, got list"),
)


@pytest.mark.parametrize("experts, gates, offsets, kind, message", BAD, ids=[case[-1] for case in BAD])
def test_routing_bad_input_is_refused(experts, gates, offsets, kind, message):
    with pytest.raises(kind, match=message):
        Routing(experts, gates, offsets)


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 7), (6, 5, 7), (3, 2, 5, 7), (3, 0, 7)], ids=str)
def test_routing_fits_its_batch_and_multiples(shape):
    routing().check(torch.Size(shape), 4)


@pytest.mark.parametrize("shape", [(4, 6, 7), (1, 6, 7), (5, 7), (7,), (2, 9, 7)], ids=str)
def test_routing_refuses_another_batch(shape):
    with pytest.raises(ValueError, match="3 instances must be x's first dimensions or divide the first"):
        routing().check(torch.Size(shape), 4)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_routing_runs_never_cut_an_entry(batch, N, L):
    fits = batch * L == N or batch == N or batch % N == 0
    try:
        routing(N).check(torch.Size((batch, L, 7)), 4)
        assert fits
    except ValueError:
        assert not fits


def test_routing_values_are_looked_at_once(monkeypatch):
    made, looks = routing(offsets=torch.tensor([0, 2, 2, 5])), []
    look = Routing._check_values
    monkeypatch.setattr(Routing, "_check_values", lambda self, E, T: looks.append((E, T)) or look(self, E, T))
    for _ in range(3):
        made.check(torch.Size((5, 7)), 4)
    made.with_gates(torch.rand(3, 2)).check(torch.Size((5, 7)), 4)
    assert looks == [(4, 5)]
    made.check(torch.Size((5, 7)), 6)
    assert looks == [(4, 5), (6, 5)]


@pytest.mark.parametrize("value", [-1, 4], ids=str)
def test_routing_expert_out_of_range_is_refused(value):
    made = Routing(torch.tensor([[0, value]]), torch.rand(1, 2))
    with pytest.raises(
        ValueError, match=rf"experts must be in 0..3, got values from {min(0, value)} to {max(0, value)}"
    ):
        made.check(torch.Size((1, 7)), 4)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 5], [1, 2, 3, 5], [0, 2, 3, 4], [0, 2, 3, 6], [0, 6, 6, 5]], ids=str)
def test_routing_offsets_must_rise_to_the_last_row(offsets):
    with pytest.raises(ValueError, match="offsets must rise from 0 to x's 5 rows, got"):
        routing(offsets=torch.tensor(offsets)).check(torch.Size((5, 7)), 4)


def test_routing_more_picks_than_experts_is_refused():
    with pytest.raises(ValueError, match="K <= E = 1, got K = 2"):
        routing().check(torch.Size((3, 7)), 1)


@pytest.mark.parametrize("factor", [0, -1, 1.5, "2"])
def test_routing_expand_takes_positive_integers(factor):
    with pytest.raises(ValueError, match="factor must be an integer of at least 1, got"):
        Routing(torch.tensor([[0]]), torch.ones(1, 1)).expand(factor)


def test_routing_expand_repeats_in_place():
    made = routing()
    expanded = made.expand(3)
    assert expanded.experts.tolist() == [row for row in made.experts.tolist() for _ in range(3)]
    assert torch.equal(expanded.gates[::3], made.gates)
    assert made.expand(1) is made
    with pytest.raises(ValueError, match=r"packed routing .* cannot be expanded"):
        routing(offsets=torch.tensor([0, 1, 2, 3])).expand(2)


def test_routing_is_a_pytree():
    made = routing(offsets=torch.tensor([0, 1, 2, 3]))
    leaves, spec = torch.utils._pytree.tree_flatten(made)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 3 and isinstance(again, moe_lora.Routing) and again.gates is made.gates


def applied():
    """Three layers, the second on another device."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).to("meta"), torch.nn.Linear(4, 4))
    return moe_lora.apply(layers, moe_lora.MoELoRAConfig(4, 2, 3, dropout=0, target_modules="all-linear"))


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 5, 5, 15])], ids=["runs", "packed"])
def test_layers_on_several_devices_share_a_route(offsets):
    layers = applied()
    here, there, _ = layers
    with moe_lora.route(layers, routing(offsets=offsets)):
        assert here(torch.rand(3, 5, 4)).device.type == "cpu"
        assert there(torch.rand(3, 5, 4, device="meta")).device.type == "meta"
    assert here.slot.copied is None
    with (
        moe_lora.route(layers, routing(N=2)),
        pytest.raises(ValueError, match="of this batch, got 2 instances"),
    ):
        there(torch.rand(3, 5, 4, device="meta"))
    with pytest.raises(TypeError, match=r"routing must be a moe_lora\.Routing, got tuple"):
        there(torch.rand(3, 5, 4, device="meta"), (1, 2))


def test_copy_on_another_device_is_shared_until_something_changes():
    slot, made, meta = applied()[0].slot, routing(), torch.device("meta")
    made.gates.requires_grad_()
    assert slot.on(torch.device("cpu"), made) is made
    first = slot.on(meta, made)
    assert slot.on(meta, made) is first and first.gates.requires_grad and first.experts.is_meta
    with torch.no_grad():
        assert not slot.on(meta, made).gates.requires_grad
    again = slot.on(meta, made)
    assert again.gates.requires_grad
    with torch.no_grad():
        made.gates.mul_(2)
    assert slot.on(meta, made) is not again
    with torch.inference_mode():
        slot.on(meta, made)
    assert slot.on(meta, made).gates.requires_grad
    other = routing()
    assert slot.on(meta, other) is not slot.on(meta, made)
    copy.deepcopy(made)
