"""The gate: which experts an instance uses, chosen from its question, once per batch.

    m_i = mean of the question's token embeddings,  z_i = (m_i - center) · scale,  logits_i = z_i w       in float32
    p_i = softmax(logits_i),  experts_i = the K largest of p_i + bias,  gates_i = p_i at those, divided by their sum

Source: Octavius (Chen et al., ICLR 2024, arXiv 2311.02684), the instance-level top-2 gate: center and bias 0, scale 1,
as a new gate has them. `standardise` sets center and scale, `balance` moves the bias. Other K, dense and token gates
are the same equation.
"""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from moe_lora.routing import Routing


class InstanceGate(nn.Module):
    """One linear gate, shared by all layers.

    Args:
        dim: D of the token embeddings.
        num_experts: E.
        top_k: K, experts per instance; not used by "dense".
        mode: "instance" (top-k of the mean embedding), "dense" (all E experts, softmax weights), or "token" (every
            token routed for itself; the routing has N·L instances).
        include_padding: the mean over all L positions, padding too, as upstream computes it.
        universal: expert 0 serves every instance. The K - 1 chosen of the others keep their softmax weights p, and
            expert 0 gets what remains of 1 (Gou et al., "Mixture of Cluster-conditional LoRA Experts", arXiv
            2312.12379).

    Raises:
        ValueError: dim, num_experts or top_k is no positive integer, top_k > num_experts, there is no such mode, or
            universal with a mode that weighs all experts or with K < 2 or E < 3.

    `w_gating` [D, E] is drawn from N(0, 1/D), so that features of unit variance give logits of unit variance, and the
    small ones of a language model near-uniform weights; upstream draws from N(0, 1). The buffers `center` [D],
    `scale` [D] and `bias` [E] are saved with it.
    """

    center: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        mode: Literal["instance", "dense", "token"] = "instance",
        include_padding: bool = False,
        universal: bool = False,
    ):
        super().__init__()
        if mode not in ("instance", "dense", "token"):
            raise ValueError(f"mode must be instance, dense or token, got {mode!r}")
        for name, value in (("dim", dim), ("num_experts", num_experts), ("top_k", top_k)):
            if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and name != "top_k"):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not 1 <= top_k <= num_experts and mode != "dense":
            raise ValueError(f"top_k must be in 1..num_experts = {num_experts}, got {top_k}")
        if universal and (mode == "dense" or top_k < 2 or num_experts < 3):
            raise ValueError(
                "a universal expert needs mode instance or token, top_k of at least 2 and num_experts of at least 3, "
                f"got {mode}, {top_k} and {num_experts}"
            )
        self.dim, self.num_experts, self.mode, self.include_padding = dim, num_experts, mode, include_padding
        self.top_k, self.universal = num_experts if mode == "dense" else top_k, universal
        self.w_gating = nn.Parameter(torch.empty(dim, num_experts))
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gating, std=self.dim**-0.5)

    @torch.no_grad()
    def standardise(self, questions: Tensor) -> None:
        """Centre the input by the mean of these questions and scale it by their deviation and 1/sqrt(D).

        Most of a mean embedding is common to all questions, and hides from the gate what tells them apart. The scale
        gives z a norm of about 1; `w_gating` is drawn anew from N(0, 1), so that logits keep unit variance.

        Args:
            questions: [n, D] mean embeddings of training questions, n >= 2, as `mean` computes them.
        Raises:
            ValueError: the shape is another, or a value is not finite.
        """
        if questions.dim() != 2 or questions.shape[1] != self.dim or len(questions) < 2:
            raise ValueError(f"questions must be [n, D] with n >= 2 and D = {self.dim}, got {tuple(questions.shape)}")
        if not bool(questions.isfinite().all()):
            raise ValueError("questions must be finite, got NaN or infinity")
        deviation, center = torch.std_mean(questions.to(self.center.device, torch.float64), 0)
        floor = 1e-3 * deviation.square().mean().sqrt().clamp(min=1e-12)  # a feature that never varies says nothing
        self.center.copy_(center)
        self.scale.copy_((deviation.clamp(min=floor) * self.dim**0.5).reciprocal())
        nn.init.normal_(self.w_gating)

    @torch.no_grad()
    def balance(self, share: Tensor, rate: float) -> None:
        """Move the bias of the choice by `rate` up for each expert below the even share, down for each above it.

        The gates' values, and with them the loss, do not see the bias. Source: DeepSeek-V3 (arXiv 2412.19437),
        section 2.1.2, and Wang et al. (arXiv 2408.15664).

        Args:
            share: [E], as `expert_share` gives it, best as a running mean over batches.
            rate: step of the bias; probabilities are in 0..1.
        """
        routed = share[self.universal :]  # a universal expert is not chosen
        self.bias[self.universal :] += rate * (routed.mean() - routed).sign().to(self.bias)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts for a batch by its questions.

        Args:
            embeddings: [N, L, D] of the question's tokens.
            mask: [N, L], nonzero where there is a token; None means everywhere. Token routing also routes padding.
        Returns:
            experts [N, K] int32, gates [N, K] and logits [N, E] in float32 (N·L rows for "token"). They are plain
            tensors, so that hooks of DDP, FSDP and DeepSpeed see them; `Routing(experts, gates)` is the routing.
        Raises:
            ValueError: shapes disagree, or a question has no token (seen on the CPU only; elsewhere its mean is 0).
        """
        device = embeddings.device.type if isinstance(embeddings, Tensor) else "cpu"
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # meta knows no autocast
            rows = embeddings.float().flatten(0, 1) if self._checked(embeddings, mask) else self.mean(embeddings, mask)
            logits = ((rows - self.center) * self.scale) @ self.w_gating.float()
            return *self._choose(logits), logits

    def routing(self, embeddings: Tensor, mask: Tensor | None = None) -> Routing:
        """The `Routing` of what `forward` chooses, for who needs no logits."""
        experts, gates, _ = self(embeddings, mask)
        return Routing(experts, gates)

    def mean(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """m [N, D], the mean embedding of each question, in float32; the arguments are those of `forward`."""
        self._checked(embeddings, mask)
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

    def _checked(self, embeddings: Tensor, mask: Tensor | None) -> bool:
        """Whether every token is routed for itself; raises if the input cannot be."""
        for name, tensor in (("embeddings", embeddings), ("mask", mask)):
            if not isinstance(tensor, Tensor) and not (name == "mask" and tensor is None):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if embeddings.dim() != 3 or embeddings.shape[-1] != self.dim:
            raise ValueError(f"embeddings must be [N, L, D] with D = {self.dim}, got {tuple(embeddings.shape)}")
        if mask is not None and mask.shape != embeddings.shape[:2]:
            raise ValueError(f"mask must be [N, L] = {tuple(embeddings.shape[:2])}, got {tuple(mask.shape)}")
        return self.mode == "token"

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == "dense":
            experts = torch.arange(self.num_experts, device=logits.device, dtype=torch.int32)
            return experts.expand(logits.shape[0], -1).contiguous(), logits.softmax(-1)
        first = int(self.universal)
        probs = logits[:, first:].softmax(-1)
        experts = (probs.detach() + self.bias[first:]).topk(self.top_k - first, dim=-1).indices
        gates = probs.gather(1, experts)
        if self.universal:
            experts = nn.functional.pad(experts + 1, (1, 0))
            gates = torch.cat((1 - gates.sum(-1, keepdim=True), gates), 1)
        else:
            gates = gates / gates.sum(-1, keepdim=True)
        return experts.int(), gates

    def extra_repr(self) -> str:
        universal = ", universal=True" if self.universal else ""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, mode={self.mode}{universal}"


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


def mutual_information(table: Tensor) -> float:
    """I(task; expert) / H(task): how much of the task the choice of an expert tells, 0 to 1.

    Args:
        table: [tasks, E] counts, or sums of weights, of the experts that each task's instances used.
    Returns:
        The information as a fraction of the task's entropy; 0 where only one task occurs.
    Raises:
        ValueError: the table is not two-dimensional, is negative somewhere, or holds no instance.
    """
    table = table.double()
    if table.dim() != 2 or bool((table < 0).any()) or not bool(table.sum() > 0):
        raise ValueError(f"table must be [tasks, E] of counts with a positive sum, got {table.tolist()!r:.80}")
    joint = table / table.sum()
    task, expert = joint.sum(1), joint.sum(0)
    entropy = -torch.special.xlogy(task, task).sum()
    shared = (
        torch.special.xlogy(joint, joint).sum()
        - torch.special.xlogy(task, task).sum()
        - torch.special.xlogy(expert, expert).sum()
    )
    return float(shared / entropy) if entropy > 1e-12 else 0.0
