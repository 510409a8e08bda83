"""`MoELoRALinear`: a frozen linear with E low-rank experts, in place of `nn.Linear`."""

import math
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_lora.group import linear_group
from moe_lora.ops import autocast_dtype, linear
from moe_lora.routing import Routing


@dataclass(frozen=True)
class MoELoRAConfig:
    """What `apply` puts where.

    Args:
        num_experts, top_k, rank: E, K, R.
        alpha: the update is scaled by alpha / rank.
        dropout: probability on the input of the experts, in training only.
        target_modules: names of linears, matched as the whole name or its end after a dot, each of which must match;
            or one str, a regular expression for the whole name; or "all-linear", every nn.Linear but the output
            embedding.
    Raises:
        ValueError: a number is out of its range or none, or target_modules is empty or no regular expression.
    """

    num_experts: int = 4
    top_k: int = 2
    rank: int = 32
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = field(default=("q_proj", "k_proj", "v_proj", "o_proj"))

    def __post_init__(self):
        targets = self.target_modules
        if isinstance(targets, Iterable) and not isinstance(targets, str):
            object.__setattr__(self, "target_modules", tuple(targets))
        for name in ("num_experts", "top_k", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        self._check_target_modules()

    def _check_target_modules(self) -> None:
        targets = self.target_modules
        if (
            not isinstance(targets, str | tuple)
            or not targets
            or not all(isinstance(name, str) and name for name in targets)
        ):
            raise ValueError(f"target_modules must be names of linears or one str, got {targets!r}")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules must be a regular expression, got {targets!r}: {error}") from error


class RouteSlot(threading.local):
    """Where the layers of one model find the routing of the batch; each thread has its own.

    A `threading.local` and not a `ContextVar`, because torch.compile traces the one and not the other.
    """

    def __init__(self):
        # in the instance, not in the class: torch.compile would guard that the instance has none yet
        self.routing: Routing | None = None
        self.siblings: Siblings | None = None  # while the forward of their parent runs
        self.copied: tuple[tuple, Routing] | None = None  # the last routing that was wanted on another device

    def on(self, device: torch.device, routing: Routing) -> Routing:
        """The routing on a device; the layers there, of a model that lies on several, share one copy."""
        if device == routing.experts.device:
            return routing
        if torch.compiler.is_compiling():  # what a compiled graph returns keeps that graph's backward
            return routing.to(device)
        changed = None if routing.gates.is_inference() else routing.gates._version
        key = (device, routing, changed, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if self.copied is None or self.copied[0] != key:
            self.copied = key, routing.to(device)
        return self.copied[1]

    def __reduce__(self):
        return RouteSlot, ()


class MoELoRALinear(nn.Module):
    """y = x Wᵀ + bias + (alpha / R) Σ_k g_k drop(x) A_e B_e, with the routing of `moe_lora.route` or an explicit one.

    Args:
        weight: [F, D], the frozen base; taken over, not copied. A plain tensor stays out of the state dict.
        bias: [F] or None, frozen too.
        config: E, R, alpha and dropout; its top_k and target_modules are not used here.
        slot: where `moe_lora.route` leaves the routing, shared by the layers of a model; None makes one.
    Raises:
        TypeError: weight is no tensor [F, D], or config no MoELoRAConfig.

    Attributes: weight, bias; lora_a [E, D, R] and lora_b [E, R, F], trainable, float32 also over a bf16 base (float64
    over float64); in_features, out_features, scale = alpha / R, config.

    A starts as U(±1/sqrt(D)) like in an ordinary LoRA, each expert with its own draw; B starts at zero.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, config: MoELoRAConfig, slot: RouteSlot | None = None):
        super().__init__()
        if not isinstance(config, MoELoRAConfig):
            raise TypeError(f"config must be a moe_lora.MoELoRAConfig, got {type(config).__name__}")
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(f"weight must be a tensor [F, D], got {tuple(getattr(weight, 'shape', ())) or weight!r}")
        self.out_features, self.in_features = weight.shape
        self.config = config
        self.scale = config.alpha / config.rank
        self.weight = weight.requires_grad_(False)
        self.bias = bias if bias is None else bias.requires_grad_(False)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        E, R = config.num_experts, config.rank
        self.lora_a = nn.Parameter(torch.empty(E, self.in_features, R, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.empty(E, R, self.out_features, dtype=dtype, device=weight.device))
        self.slot = slot or RouteSlot()
        self.reset_parameters()

    @classmethod
    def from_linear(cls, base: nn.Linear, config: MoELoRAConfig, slot: RouteSlot | None = None) -> "MoELoRALinear":
        """Takes over the base's parameters, which it freezes; no copy."""
        layer = cls(base.weight, base.bias, config, slot)
        layer.train(base.training)
        return layer

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """y [..., F] for x [..., D]; experts and gates are those of `routing`, or if it is None of `moe_lora.route`.

        Raises:
            RuntimeError: there is neither.
            ValueError, TypeError: as `moe_lora.linear`.
        """
        if routing is None:
            routing = self.slot.routing
            if routing is None:
                raise RuntimeError(
                    "MoELoRALinear needs a routing: call the model inside `with moe_lora.route(model, routing)`, in "
                    "the same thread, or pass routing=; if this is a recomputation in backward, checkpoint with "
                    "model.gradient_checkpointing_enable()"
                )
        if isinstance(routing, Routing) and isinstance(x, Tensor):  # linear says what else is wrong
            routing = self.slot.on(x.device, routing)
        siblings = None if torch.compiler.is_compiling() else self.slot.siblings
        y = siblings.output(self, x, routing) if siblings is not None else None
        if y is not None:
            return y
        dropout = self.config.dropout if self.training else 0.0
        return linear(x, self.weight, self.bias, self.lora_a, self.lora_b, routing, self.scale, dropout)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_experts={config.num_experts}, rank={config.rank}, scale={self.scale:g}, dropout={config.dropout}"
        )


class Siblings:
    """Layers which their parent calls one after the other with the same x: the first call computes all of them.

    One is made for each run of the parent's forward (see `inject.py`) and dropped after it. A layer gets what was
    computed for it if it is called with that very x, not changed since, and the same routing and modes; otherwise it
    runs alone.
    """

    def __init__(self, layers: list[MoELoRALinear]):
        self.layers = layers
        self.waiting: dict[MoELoRALinear, Tensor] = {}
        self.call: tuple = ()

    def output(self, layer: MoELoRALinear, x: Tensor, routing: Routing) -> Tensor | None:
        """y of the layer; None if it must run alone."""
        if layer not in self.layers or x.is_inference():  # inference tensors do not count their changes
            return None
        modes = (torch.is_grad_enabled(), autocast_dtype(x), layer.training, x._version)
        if not self.waiting and all(_alike(layer, other) for other in self.layers):
            ys = linear_group(
                x,
                [each.weight for each in self.layers],
                [each.bias for each in self.layers],
                [each.lora_a for each in self.layers],
                [each.lora_b for each in self.layers],
                routing,
                layer.scale,
                layer.config.dropout if layer.training else 0.0,
            )
            self.waiting, self.call = dict(zip(self.layers, ys, strict=True)), (x, routing, modes)
        if layer not in self.waiting or self.call[0] is not x or self.call[1:] != (routing, modes):
            return None
        return self.waiting.pop(layer)


def _alike(layer: MoELoRALinear, other: MoELoRALinear) -> bool:
    """Whether the other's parameters are there (not sharded, not offloaded) and it would run like the layer."""
    return (
        other.training == layer.training
        and all(
            type(one) is type(two) and one.device == two.device and one.dtype == two.dtype
            for one, two in ((layer.weight, other.weight), (layer.lora_a, other.lora_a))
        )
        and other.weight.shape == (other.out_features, other.in_features)
        and other.lora_a.shape == layer.lora_a.shape
    )
