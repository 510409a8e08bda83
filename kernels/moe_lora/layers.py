"""`MoELoRALinear`: a frozen linear with E low-rank experts, in place of `nn.Linear`."""

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_lora.config import MoELoRAConfig
from moe_lora.ops import linear
from moe_lora.routing import Routing
from moe_lora.slot import Base, RouteSlot


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
        self.tower = False  # of images, video or audio in a model that reads text
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
            context = self.slot.current()
            if context is None:
                raise RuntimeError(
                    "MoELoRALinear needs a routing: call the model inside `with moe_lora.route(model, routing)`, in "
                    "the same thread, or pass routing=; if this is a recomputation in backward, checkpoint with "
                    "model.gradient_checkpointing_enable()"
                )
            if isinstance(context, Base):
                return functional.linear(x, self.weight, self.bias)
            routing = context
            if isinstance(x, Tensor) and not torch.compiler.is_compiling():
                routing = self._own_rows(x, routing)
        if isinstance(routing, Routing) and isinstance(x, Tensor):  # linear says what else is wrong
            routing = self.slot.on(x.device, routing)
        siblings = None if torch.compiler.is_compiling() else self.slot.siblings
        y = siblings.output(self, x, routing) if siblings is not None else None
        if y is not None:
            return y
        dropout = self.config.dropout if self.training else 0.0
        return linear(x, self.weight, self.bias, self.lora_a, self.lora_b, routing, self.scale, dropout)

    def _own_rows(self, x: Tensor, routing: Routing) -> Routing:
        batch = self.slot.batch
        if batch is not None:
            return batch.routing_of(x, routing, self.tower)
        N, lead = routing.experts.shape[0], x.shape[:-1]
        if routing.offsets is None and len(lead) > 1 and lead[0] != N and N not in accumulate(lead, mul):
            raise ValueError(
                f"the routing must be of this batch, got {N} instances for x {tuple(x.shape)}; route this batch, or "
                "repeat the routing by its expand()"
            )
        return routing

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_experts={config.num_experts}, rank={config.rank}, scale={self.scale:g}, dropout={config.dropout}"
        )
