"""The gate: upstream's numbers, the mask, its modes, the balance loss."""

import pytest
import torch
from moe_lora import InstanceGate, Routing, expert_share, load_balancing_loss


def upstream(embeddings, w):
    """The equation as section 9 of our notes on upstream has it: all positions, softmax before top-2, renormalised."""
    p = (embeddings @ w).mean(1).softmax(-1)
    first = p.argmax(-1)
    second = p.scatter(1, first[:, None], -1.0).argmax(-1)
    experts = torch.stack([first, second], 1)
    gates = p.gather(1, experts)
    return experts, gates / gates.sum(1, keepdim=True)


def test_gate_with_padding_is_upstreams():
    gate = InstanceGate(16, 6, include_padding=True)
    embeddings = torch.randn(5, 9, 16)
    routing, logits = gate(embeddings, torch.zeros(5, 9))
    experts, gates = upstream(embeddings, gate.w_gating)
    assert torch.equal(routing.experts.long(), experts)
    torch.testing.assert_close(routing.gates, gates)
    torch.testing.assert_close(logits, embeddings.mean(1) @ gate.w_gating)


def test_gate_does_not_see_padding():
    gate, embeddings = InstanceGate(16, 6), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    embeddings[0, 4:] = float("nan")
    routing, _ = gate(embeddings, mask)
    alone, _ = gate(embeddings[:1, :4])
    torch.testing.assert_close(routing.gates[:1], alone.gates)
    assert torch.equal(routing.experts[:1], alone.experts)


def test_gate_row_without_token_is_refused_or_safe(monkeypatch):
    gate, mask = InstanceGate(16, 6), torch.ones(3, 9).bool()
    mask[1] = False
    with pytest.raises(ValueError, match="every row of mask must have a token, got none in row 1"):
        gate(torch.randn(3, 9, 16), mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    routing, logits = gate(torch.randn(3, 9, 16), mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(routing.gates[1], torch.full((2,), 0.5))


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_gate_top_k_weights_sum_to_one(top_k):
    routing, logits = InstanceGate(16, 6, top_k)(torch.randn(4, 3, 16))
    assert routing.experts.shape == (4, top_k) and logits.shape == (4, 6)
    torch.testing.assert_close(routing.gates.sum(1), torch.ones(4))
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())


def test_gate_dense_uses_all_experts():
    gate = InstanceGate(16, 6, mode="dense")
    routing, logits = gate(torch.randn(4, 3, 16))
    assert routing.experts.tolist() == [list(range(6))] * 4
    assert torch.equal(routing.gates, logits.softmax(-1))


def test_gate_token_routes_every_token_for_itself():
    gate, embeddings = InstanceGate(16, 6, mode="token"), torch.randn(4, 3, 16)
    routing, logits = gate(embeddings, torch.ones(4, 3))
    assert routing.experts.shape == (12, 2) and logits.shape == (12, 6)
    one, _ = InstanceGate.forward(gate, embeddings[2:3, 1:2])
    assert torch.equal(routing.experts[7:8], one.experts)
    routing.check(torch.Size((4, 3, 8)), 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_gate_computes_in_float32_and_trains(dtype, autocast):
    gate = InstanceGate(16, 6)
    embeddings = torch.randn(4, 3, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing, logits = gate(embeddings)
    assert logits.dtype == routing.gates.dtype == torch.float32
    routing.gates[:, 0].sum().backward()
    assert embeddings.grad.abs().sum() > 0 and gate.w_gating.grad.abs().sum() > 0


def test_gate_starts_with_logits_of_unit_variance():
    _, logits = InstanceGate(512, 64)(torch.randn(64, 1, 512))
    assert 0.9 < logits.std() < 1.1


def test_gate_compiles_whole():
    gate, embeddings, mask = InstanceGate(16, 6), torch.randn(4, 3, 16), torch.ones(4, 3)
    routing, _ = torch.compile(gate, fullgraph=True, backend="aot_eager")(embeddings, mask)
    assert isinstance(routing, Routing)
    torch.testing.assert_close(routing.gates, gate(embeddings, mask)[0].gates)


BAD = (
    ({"top_k": 7}, None, "top_k must be in 1..num_experts = 6, got 7"),
    ({"top_k": 0}, None, "top_k must be in 1..num_experts = 6, got 0"),
    ({"top_k": 1.0}, None, "top_k must be an integer of at least 1, got 1.0"),
    ({"dim": 0}, None, "dim must be an integer of at least 1, got 0"),
    ({"num_experts": 0, "mode": "dense"}, None, "num_experts must be an integer of at least 1, got 0"),
    ({}, (torch.randn(4, 0, 16), None), r"every question must have a token, got embeddings \(4, 0, 16\)"),
    ({"mode": "dual"}, None, "mode must be instance, dense or token, got 'dual'"),
    ({}, (torch.randn(4, 16), None), r"embeddings must be \[N, L, D\] with D = 16, got \(4, 16\)"),
    ({}, (torch.randn(4, 3, 8), None), r"embeddings must be \[N, L, D\] with D = 16, got \(4, 3, 8\)"),
    ({}, (torch.randn(4, 3, 16), torch.ones(3, 4)), r"mask must be \[N, L\] = \(4, 3\), got \(3, 4\)"),
)


@pytest.mark.parametrize("arguments, inputs, message", BAD, ids=[message for *_, message in BAD])
def test_gate_bad_input_is_refused(arguments, inputs, message):
    with pytest.raises(ValueError, match=message):
        InstanceGate(**({"dim": 16, "num_experts": 6} | arguments))(*inputs)


def test_gate_takes_tensors_only():
    with pytest.raises(TypeError, match="embeddings must be a tensor, got NoneType"):
        InstanceGate(16, 6)(None)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        InstanceGate(16, 6)(torch.randn(1, 2, 16), [[1, 1]])
    with pytest.raises(TypeError, match="experts must be a tensor, got Routing"):
        load_balancing_loss(torch.zeros(1, 6), InstanceGate(16, 6)(torch.randn(1, 2, 16))[0])
    with pytest.raises(TypeError, match=r"experts must be an integer tensor, got torch\.float32"):
        expert_share(torch.zeros(3, 2), 6)
    with pytest.raises(ValueError, match=r"experts must be \[N, K\], got \(3,\)"):
        expert_share(torch.zeros(3, dtype=torch.int32), 6)


def test_balance_loss_is_one_when_even_and_e_when_collapsed():
    even = torch.eye(4).repeat(3, 1) * 50
    torch.testing.assert_close(load_balancing_loss(even, even.argmax(-1, keepdim=True)), torch.tensor(1.0))
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 50
    torch.testing.assert_close(load_balancing_loss(collapsed, torch.full((8, 1), 2)), torch.tensor(4.0))


def test_balance_loss_is_the_formula_and_pushes_back():
    logits = torch.randn(7, 5, requires_grad=True)
    experts = logits.topk(2).indices.int()
    f = torch.stack([(experts == e).float().sum() / 14 for e in range(5)])
    loss = load_balancing_loss(logits, experts)
    torch.testing.assert_close(loss, 5 * (f * logits.softmax(-1).mean(0)).sum())
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_balance_loss_masks_and_refuses():
    logits, experts = torch.randn(6, 5), torch.randint(0, 5, (6, 2))
    mask = torch.tensor([1, 0, 1, 0, 0, 1])
    torch.testing.assert_close(
        load_balancing_loss(logits, experts, mask), load_balancing_loss(logits[mask != 0], experts[mask != 0])
    )
    with pytest.raises(ValueError, match=r"logits must be \[N, E\] and experts \[N, K\], got \(6, 5\) and \(5, 2\)"):
        load_balancing_loss(logits, experts[:5])
    with pytest.raises(ValueError, match=r"mask must be \[N\] = \(6,\), got \(5,\)"):
        load_balancing_loss(logits, experts, mask[:5])
