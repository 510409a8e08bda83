"""Linears of one parent that read the same x (q, k, v; gate, up), computed together by `linear_group`."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.group import linear_group
from moe_lora.layers import MoELoRALinear
from moe_lora.ops import autocast_dtype
from moe_lora.routing import Routing
from moe_lora.slot import RouteSlot

# Children that a module of the Llama family calls one after the other with the same x; q, k, v if it is causal.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def group_siblings(parent: nn.Module, slot: RouteSlot, classes: tuple[type, ...] = ()) -> None:
    """Computes the siblings of a parent together, if it is of transformers or of one of the classes.

    Of other classes it is not known that their forward leaves x alone between the calls; a change through x.data could
    not be seen.
    """
    if not type(parent).__module__.startswith("transformers.models.") and not isinstance(parent, classes):
        return
    for names in _SIBLINGS:
        layers = [parent._modules.get(name) for name in names]
        causal = names[0] != "q_proj" or getattr(parent, "is_causal", False)
        if causal and all(isinstance(layer, MoELoRALinear) for layer in layers) and len(set(layers)) == len(layers):
            hooks = _Together(slot, names)
            parent.register_forward_pre_hook(hooks.before)
            # one that is always called would have torch.compile guard its number and compile each layer anew
            parent.register_forward_hook(hooks.after)


class _Together:
    """Hooks of a parent: while its forward runs, the layers of these names are computed together."""

    def __init__(self, slot: RouteSlot, names: tuple[str, ...]):
        self.slot, self.names = slot, names

    def before(self, parent: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():  # a change of x in place between the calls could not be seen
            return
        layers = [parent._modules.get(name) for name in self.names]
        mine = [layer for layer in layers if type(layer) is MoELoRALinear and layer.slot is self.slot]
        self.slot.siblings = Siblings(mine) if len(mine) > 1 else None

    def after(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.slot.siblings = None


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
