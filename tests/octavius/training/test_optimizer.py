"""AdamW with steps of its own for each expert."""

import pytest
import torch
from torch import nn

from octavius.training.optimizer import ExpertAdamW

RATE = 0.01


def run(optimizer, p, grads):
    """Displacements of p [steps, ...], one for each gradient."""
    moved = []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.clone()
        optimizer.step()
        moved.append(p.detach() - before)
    return torch.stack(moved)


def late(steps, start, E=3):
    """Gradients [steps, E, 4, 5] of which the last expert has none before `start`."""
    torch.manual_seed(0)
    grads = torch.randn(steps, E, 4, 5)
    grads[:start, -1] = 0
    return grads


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_late_expert_moves_like_a_new_one(beta2):
    grads = late(420, 400)
    p = nn.Parameter(torch.zeros(3, 4, 5))
    moved = run(ExpertAdamW([p], RATE, (0.9, beta2), experts=True), p, grads)[:, -1]
    alone = nn.Parameter(torch.zeros(4, 5))
    expected = run(torch.optim.AdamW([alone], RATE, (0.9, beta2), weight_decay=0.0), alone, grads[400:, -1])
    assert not moved[:400].any()
    torch.testing.assert_close(moved[400:], expected, atol=1e-7, rtol=1e-4)
    assert moved[400:].abs().max() < 1.5 * RATE


def test_plain_adamw_blows_a_late_expert_up():
    """What the counting mends: with one count for all, the late expert's early updates are several times the rate."""
    torch.manual_seed(0)
    steady = torch.ones(3, 4, 5).expand(420, 3, 4, 5).clone()
    steady[:400, -1] = 0
    p = nn.Parameter(torch.zeros(3, 4, 5))
    moved = run(torch.optim.AdamW([p], RATE, (0.9, 0.999), weight_decay=0.0), p, steady)
    assert moved[400:, -1].abs().max() > 3 * RATE
    q = nn.Parameter(torch.zeros(3, 4, 5))
    moved = run(ExpertAdamW([q], RATE, (0.9, 0.999), experts=True), q, steady)
    torch.testing.assert_close(moved[400:, -1], torch.full((20, 4, 5), -RATE), atol=1e-6, rtol=1e-4)


def test_always_used_experts_and_other_parameters_are_adamws():
    grads = late(30, 0)
    for experts in (True, False):
        p, q = (nn.Parameter(torch.full((3, 4, 5), 0.5)) for _ in range(2))
        ours = run(ExpertAdamW([p], RATE, (0.9, 0.95), weight_decay=0.1, experts=experts), p, grads)
        theirs = run(torch.optim.AdamW([q], RATE, (0.9, 0.95), weight_decay=0.1), q, grads)
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


def test_unused_expert_keeps_its_bits_under_decay_and_momentum():
    grads = late(6, 0)
    grads[3:, 1] = 0
    p = nn.Parameter(torch.ones(3, 4, 5))
    moved = run(ExpertAdamW([p], RATE, weight_decay=0.1, experts=True), p, grads)
    assert moved[:3, 1].all() and not moved[3:, 1].any() and moved[3:, 0].all()


def test_state_is_saved_and_goes_on():
    grads = late(20, 7)
    p, q = (nn.Parameter(torch.zeros(3, 4, 5)) for _ in range(2))
    whole = run(ExpertAdamW([p], RATE, experts=True), p, grads)
    first = ExpertAdamW([q], RATE, experts=True)
    run(first, q, grads[:10])
    second = ExpertAdamW([q], RATE, experts=True)
    second.load_state_dict(first.state_dict())
    assert second.state[q]["step"].tolist() == [10, 10, 3]
    assert torch.equal(run(second, q, grads[10:]), whole[10:])


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"betas in \[0, 1\), got lr=0\.01, .*betas=\(0\.9, 1\.0\)"):
        ExpertAdamW([nn.Parameter(torch.zeros(1))], RATE, (0.9, 1.0))
