"""A frozen linear layer with per-instance low-rank experts, forward and backward as one fused pass."""

from moe_lora.checkpoint import load, save
from moe_lora.dispatch import backends, explain
from moe_lora.gate import InstanceGate, expert_share, load_balancing_loss
from moe_lora.group import linear_group
from moe_lora.inject import apply, route
from moe_lora.layers import MoELoRAConfig, MoELoRALinear
from moe_lora.ops import linear
from moe_lora.routing import Routing

__all__ = [
    "InstanceGate",
    "MoELoRAConfig",
    "MoELoRALinear",
    "Routing",
    "apply",
    "backends",
    "expert_share",
    "explain",
    "linear",
    "linear_group",
    "load",
    "load_balancing_loss",
    "route",
    "save",
]
