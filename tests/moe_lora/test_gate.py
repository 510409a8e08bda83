"""The gate: upstream's numbers, the mask, its modes, the balance loss."""

import pytest
import torch
from moe_lora import InstanceGate, Routing, expert_share, load_balancing_loss, mutual_information


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
    experts, gates, logits = gate(embeddings, torch.zeros(5, 9))
    expected_experts, expected_gates = upstream(embeddings, gate.w_gating)
    assert torch.equal(experts.long(), expected_experts)
    torch.testing.assert_close(gates, expected_gates)
    torch.testing.assert_close(logits, embeddings.mean(1) @ gate.w_gating)


def test_gate_does_not_see_padding():
    gate, embeddings = InstanceGate(16, 6), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    embeddings[0, 4:] = float("nan")
    routing = gate.routing(embeddings, mask)
    alone = gate.routing(embeddings[:1, :4])
    torch.testing.assert_close(routing.gates[:1], alone.gates)
    assert torch.equal(routing.experts[:1], alone.experts)


def test_gate_row_without_token_is_refused_or_safe(monkeypatch):
    gate, mask = InstanceGate(16, 6), torch.ones(3, 9).bool()
    mask[1] = False
    with pytest.raises(ValueError, match="every row of mask must have a token, got none in row 1"):
        gate(torch.randn(3, 9, 16), mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    _, gates, logits = gate(torch.randn(3, 9, 16), mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(gates[1], torch.full((2,), 0.5))


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_gate_top_k_weights_sum_to_one(top_k):
    experts, gates, logits = InstanceGate(16, 6, top_k)(torch.randn(4, 3, 16))
    assert experts.shape == (4, top_k) and logits.shape == (4, 6)
    torch.testing.assert_close(gates.sum(1), torch.ones(4))
    assert all(len(set(row)) == top_k for row in experts.tolist())


def test_gate_dense_uses_all_experts():
    gate = InstanceGate(16, 6, mode="dense")
    experts, gates, logits = gate(torch.randn(4, 3, 16))
    assert experts.tolist() == [list(range(6))] * 4
    assert torch.equal(gates, logits.softmax(-1))


def test_gate_token_routes_every_token_for_itself():
    gate, embeddings = InstanceGate(16, 6, mode="token"), torch.randn(4, 3, 16)
    experts, gates, logits = gate(embeddings, torch.ones(4, 3))
    assert experts.shape == (12, 2) and logits.shape == (12, 6)
    assert torch.equal(experts[7:8], gate(embeddings[2:3, 1:2])[0])
    Routing(experts, gates).check(torch.Size((4, 3, 8)), 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_gate_computes_in_float32_and_trains(dtype, autocast):
    gate = InstanceGate(16, 6)
    embeddings = torch.randn(4, 3, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, gates, logits = gate(embeddings)
    assert logits.dtype == gates.dtype == torch.float32
    gates[:, 0].sum().backward()
    assert embeddings.grad.abs().sum() > 0 and gate.w_gating.grad.abs().sum() > 0


def test_gate_starts_with_logits_of_unit_variance():
    *_, logits = InstanceGate(512, 64)(torch.randn(64, 1, 512))
    assert 0.9 < logits.std() < 1.1


def test_gate_compiles_whole():
    gate, embeddings, mask = InstanceGate(16, 6), torch.randn(4, 3, 16), torch.ones(4, 3)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")(embeddings, mask)
    for one, other in zip(compiled, gate(embeddings, mask), strict=True):
        torch.testing.assert_close(one, other)


BAD = (
    ({"top_k": 7}, None, "top_k must be in 1..num_experts = 6, got 7"),
    ({"top_k": 0}, None, "top_k must be in 1..num_experts = 6, got 0"),
    ({"top_k": 1.0}, None, "top_k must be an integer of at least 1, got 1.0"),
    ({"dim": 0}, None, "dim must be an integer of at least 1, got 0"),
    ({"num_experts": 0, "mode": "dense"}, None, "num_experts must be an integer of at least 1, got 0"),
    ({}, (torch.randn(4, 0, 16), None), r"every question must have a token, got embeddings \(4, 0, 16\)"),
    ({"mode": "dual"}, None, "mode must be instance, dense or token, got 'dual'"),
    ({"universal": True, "top_k": 1}, None, "a universal expert needs .* got instance, 1 and 6"),
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
        load_balancing_loss(torch.zeros(1, 6), InstanceGate(16, 6).routing(torch.randn(1, 2, 16)))
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


def questions(groups=5, n=40, D=32):
    """Mean embeddings [n, D] of questions in groups that a large common part hides, and the groups [n]."""
    group = torch.arange(n) % groups
    return 10 * torch.randn(D) + torch.randn(groups, D)[group] + 0.1 * torch.randn(n, D), group


def test_standardised_gate_sees_what_the_common_part_hides():
    torch.manual_seed(0)
    m, _ = questions()
    plain, centred = InstanceGate(32, 64), InstanceGate(32, 64)
    centred.standardise(m)
    z = (m - centred.center) * centred.scale
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.full((32,), 32**-0.5), atol=1e-4, rtol=0)
    pairs = [len({tuple(row) for row in gate(m[:, None])[0].tolist()}) for gate in (plain, centred)]
    assert pairs[0] <= 2 and pairs[1] >= 4, pairs
    assert 0.5 < centred(m[:, None])[2].std() < 1.5
    other = InstanceGate(32, 64)
    other.load_state_dict(centred.state_dict())
    assert torch.equal(other(m[:, None])[1], centred(m[:, None])[1])


def test_standardise_survives_a_constant_feature_and_refuses_nonsense():
    m, _ = questions()
    m[:, 3] = 7.0
    gate = InstanceGate(32, 6)
    gate.standardise(m)
    assert gate(m[:, None])[2].isfinite().all()
    with pytest.raises(ValueError, match=r"questions must be \[n, D\] with n >= 2 and D = 32, got \(1, 32\)"):
        gate.standardise(m[:1])
    m[2, 2] = float("nan")
    with pytest.raises(ValueError, match="questions must be finite"):
        gate.standardise(m)


def test_bias_balances_the_choice_and_not_the_gates():
    torch.manual_seed(0)
    gate, x = InstanceGate(16, 6), torch.randn(200, 1, 16)
    gate.w_gating.data[:, 0] *= 6.0
    x[..., 0] = 2.0
    gate.w_gating.data[0] = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, -1.0])
    before = expert_share(gate(x)[0], 6)
    for _ in range(1500):
        gate.balance(expert_share(gate(x)[0], 6), 0.0005)
    experts, gates, logits = gate(x)
    assert before.max() > 0.3 and expert_share(experts, 6).max() < 0.2
    chosen = logits.softmax(-1).gather(1, experts.long())
    torch.testing.assert_close(gates, chosen / chosen.sum(1, keepdim=True))


def test_universal_expert_serves_all_and_gets_the_rest():
    gate, x = InstanceGate(16, 6, top_k=3, universal=True), torch.randn(9, 4, 16)
    experts, gates, logits = gate(x)
    assert (experts[:, 0] == 0).all() and (experts[:, 1:] > 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(9))
    torch.testing.assert_close(gates[:, 1:], logits[:, 1:].softmax(-1).topk(2).values)
    gates[:, 0].sum().backward()
    assert gate.w_gating.grad[:, 1:].abs().sum() > 0 and not gate.w_gating.grad[:, 0].any()
    gate.balance(expert_share(experts, 6), 0.1)
    assert gate.bias[0] == 0 and gate.bias[1:].any()


def test_mutual_information_is_one_for_a_partition_and_zero_for_independence():
    assert mutual_information(torch.eye(4)) == pytest.approx(1.0)
    assert mutual_information(torch.ones(4, 6)) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(torch.tensor([[3.0, 5.0]])) == 0.0  # one task has nothing to tell
    # Two tasks of equal weight, the second half on either expert: I = log 2 - 3/4 H(1/3) in nats.
    two = mutual_information(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    expected = 1 - 0.75 * -(torch.tensor([1 / 3, 2 / 3]) * torch.tensor([1 / 3, 2 / 3]).log2()).sum().item()
    assert two == pytest.approx(expected)
    with pytest.raises(ValueError, match="table must be"):
        mutual_information(torch.zeros(2, 3))
