"""AdamW that counts, for each expert, the steps in which the expert was used.

    m_e ← β₁ m_e + (1 - β₁) g_e,  v_e ← β₂ v_e + (1 - β₂) g_e²,  n_e ← n_e + 1       only for experts e with g_e ≠ 0
    p_e ← (1 - η λ) p_e - η m̂_e / (sqrt(v̂_e) + ε),   m̂_e = m_e / (1 - β₁^n_e),   v̂_e = v_e / (1 - β₂^n_e)

Plain AdamW corrects the bias of m and v by the steps of the whole run. An expert that is first used at step 400 then
has m̂ = 0.1 g and v̂ = g² (1 - β₂) / (1 - β₂^400), so that with β₂ = 0.999 its first update is 1.8 times the rate and
the next ones rise to 3.8 times (at a constant gradient). Experts that a batch leaves out drift on by what remains of m.
Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), applied to each expert.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class ExpertAdamW(torch.optim.Optimizer):
    """AdamW whose groups with `experts: True` hold parameters [E, ...] of which each expert has steps of its own.

    An expert whose gradient is exactly zero is left alone: no step, no decay. Other groups are plain AdamW.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: of AdamW; a group may have its own.
        experts: whether the parameters of a group are stacks of experts; a group may have its own.
    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        experts: bool = False,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr, eps and weight_decay must be at least 0 and betas in [0, 1), got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "experts": experts}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            rows = self._rows(params, group["experts"])
            if not rows:
                continue
            values, grads, first, second, steps = (list(column) for column in zip(*rows, strict=True))
            beta1, beta2 = group["betas"]
            adamw(
                values,
                grads,
                first,
                second,
                [],
                steps,
                fused=values[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss

    def _rows(self, params: list[Tensor], experts: bool) -> list[tuple[Tensor, ...]]:
        """(parameter, gradient, m, v, steps) of what has a gradient: of whole parameters, or of each used expert."""
        states = [self._state(p, experts) for p in params]
        if not experts:
            return [(p, _grad(p), *state) for p, state in zip(params, states, strict=True)]
        # One transfer for all parameters: on a GPU each would wait for the device.
        used = [_grad(p).flatten(1).ne(0).any(1) for p in params]  # [E] each
        flags = torch.cat(used).tolist() if used else []
        rows, start = [], 0
        for p, state in zip(params, states, strict=True):
            tensors = (p, _grad(p), *state)
            rows += [tuple(tensor[e] for tensor in tensors) for e in range(len(p)) if flags[start + e]]
            start += len(p)
        return rows

    def _state(self, p: Tensor, experts: bool) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(len(p) if experts else (), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
