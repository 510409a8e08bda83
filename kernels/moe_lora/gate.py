"""The gate: which experts an instance uses, chosen from its question, once per batch.

    m_i = mean of the question's token embeddings,  logits_i = m_i w,  p_i = softmax(logits_i)       in float32
    experts_i = the K largest of p_i,  gates_i = p_i at those, divided by their sum

Source: Octavius (Chen et al., ICLR 2024, arXiv 2311.02684), the instance-level top-2 gate; other K, dense and token
gates are the same equation.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_lora.routing import Routing


class InstanceGate(nn.Module):
    """One linear gate without bias, shared by all layers.

    Args:
        dim: D of the token embeddings.
        num_experts: E.
        top_k: K, experts per instance; not used by "dense".
        mode: "instance" (top-k of the mean embedding), "dense" (all E experts, softmax weights), or "token" (every
            token routed for itself; the routing has N·L instances).
        include_padding: the mean over all L positions, padding too, as upstream computes it.

    Raises:
        ValueError: dim, num_experts or top_k is no positive integer, top_k > num_experts, or there is no such mode.

    `w_gating` [D, E] is drawn from N(0, 1/D), so that features of unit variance give logits of unit variance, and the
    small ones of a language model near-uniform weights; upstream draws from N(0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        mode: Literal["instance", "dense", "token"] = "instance",
        include_padding: bool = False,
    ):
        super().__init__()
        if mode not in ("instance", "dense", "token"):
            raise ValueError(f"mode must be instance, dense or token, got {mode!r}")
        for name, value in (("dim", dim), ("num_experts", num_experts), ("top_k", top_k)):
            if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and name != "top_k"):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not 1 <= top_k <= num_experts and mode != "dense":
            raise ValueError(f"top_k must be in 1..num_experts = {num_experts}, got {top_k}")
        self.dim, self.num_experts, self.mode, self.include_padding = dim, num_experts, mode, include_padding
        self.top_k = num_experts if mode == "dense" else top_k
        self.w_gating = nn.Parameter(torch.empty(dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gating, std=self.dim**-0.5)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Routes a batch by its questions.

        Args:
            embeddings: [N, L, D] of the question's tokens.
            mask: [N, L], nonzero where there is a token; None means everywhere. Token routing also routes padding.
        Returns:
            The routing, and logits [N, E] ([N·L, E] for "token") in float32 for logging and `load_balancing_loss`.
        Raises:
            ValueError: shapes disagree, or a question has no token (seen on the CPU only; elsewhere its mean is 0).
        """
        for name, tensor in (("embeddings", embeddings), ("mask", mask)):
            if not isinstance(tensor, Tensor) and not (name == "mask" and tensor is None):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if embeddings.dim() != 3 or embeddings.shape[-1] != self.dim:
            raise ValueError(f"embeddings must be [N, L, D] with D = {self.dim}, got {tuple(embeddings.shape)}")
        if mask is not None and mask.shape != embeddings.shape[:2]:
            raise ValueError(f"mask must be [N, L] = {tuple(embeddings.shape[:2])}, got {tuple(mask.shape)}")
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = embeddings.flatten(0, 1) if self.mode == "token" else self._mean(embeddings, mask)
            logits = rows.float() @ self.w_gating.float()
            return self._route(logits), logits

    def _mean(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        if not embeddings.shape[1]:
            raise ValueError(f"every question must have a token, got embeddings {tuple(embeddings.shape)}")
        if mask is None or self.include_padding:
            return embeddings.float().mean(1)
        present = mask != 0
        if not torch.compiler.is_compiling() and mask.device.type == "cpu" and not bool(present.any(1).all()):
            raise ValueError(
                f"every row of mask must have a token, got none in row {int((~present.any(1)).nonzero()[0])}"
            )
        present = present[..., None]
        total = torch.where(present, embeddings.float(), 0.0).sum(1)
        return total / present.sum(1).clamp(min=1)

    def _route(self, logits: Tensor) -> Routing:
        probs = logits.softmax(-1)
        if self.mode == "dense":
            experts = torch.arange(self.num_experts, device=logits.device, dtype=torch.int32)
            return Routing(experts.expand(logits.shape[0], -1).contiguous(), probs)
        gates, experts = probs.topk(self.top_k, dim=-1)
        return Routing(experts, gates / gates.sum(-1, keepdim=True))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, mode={self.mode}"


def load_balancing_loss(
    logits: Tensor, experts: Tensor, mask: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """The balance loss of Switch and GShard: E Σ_e f_e P_e, 1 when the routing is even.

    f_e is the share of choices that fell on expert e (no gradient), P_e the mean softmax probability of e. K choices
    count 1/K each. Source: Fedus et al., "Switch Transformers" (arXiv 2101.03961), equations 4 to 6.

    Args:
        logits: [N, E] of the gate.
        experts: [N, K] chosen.
        mask: [N], nonzero for the instances (or tokens) that count; None means all.
        share: [E], f over more than this batch, such as a running mean of `expert_share`; None means this batch's. With
            batches of one task each, a batch's own f would balance within every task, and no expert could specialise
            (Qiu et al., "Demons in the Detail", arXiv 2501.11873).
    Returns:
        A float32 scalar; its gradient reaches the gate through the logits.
    Raises:
        ValueError, TypeError: shapes disagree, or what must be a tensor is none.
    """
    for name, tensor in (("logits", logits), ("experts", experts)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if logits.dim() != 2 or experts.dim() != 2 or experts.shape[0] != logits.shape[0]:
        raise ValueError(
            f"logits must be [N, E] and experts [N, K], got {tuple(logits.shape)} and {tuple(experts.shape)}"
        )
    E = logits.shape[1]
    if share is not None and share.shape != (E,):
        raise ValueError(f"share must be [E] = ({E},), got {tuple(share.shape)}")
    f = expert_share(experts, E, mask) if share is None else share.detach().float()
    return E * (f * (_weights(experts, mask) @ logits.float().softmax(-1))).sum()


def expert_share(experts: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """[E], the share of the choices that fell on each expert; sums to 1.

    Args:
        experts: [N, K] chosen.
        num_experts: E.
        mask: [N], nonzero for the instances (or tokens) that count; None means all.
    Raises:
        ValueError, TypeError: shapes disagree, or experts is no tensor of integers.
    """
    if not isinstance(experts, Tensor) or experts.is_floating_point() or experts.is_complex():
        raise TypeError(f"experts must be an integer tensor, got {getattr(experts, 'dtype', type(experts).__name__)}")
    if experts.dim() != 2:
        raise ValueError(f"experts must be [N, K], got {tuple(experts.shape)}")
    chosen = nn.functional.one_hot(experts.long(), num_experts).float().mean(1)  # [N, E]
    return _weights(experts, mask) @ chosen


def _weights(experts: Tensor, mask: Tensor | None) -> Tensor:
    """[N] equal weights of what counts, summing to 1."""
    N = experts.shape[0]
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    counts = torch.ones(N, device=experts.device) if mask is None else (mask != 0).float()
    if counts.shape != (N,):
        raise ValueError(f"mask must be [N] = ({N},), got {tuple(counts.shape)}")
    return counts / counts.sum().clamp(min=1)
