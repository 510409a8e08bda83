"""A frozen linear layer with per-instance low-rank experts, forward and backward as one fused pass.

    y_t = x_t Wᵀ + bias + s Σ_k g_{i,k} drop(x_t) A_{e(i,k)} B_{e(i,k)}       t a row of instance i,  s = alpha / R

Shapes: N instances, T rows (tokens) of D features in and F out; E experts of rank R, K of them for each instance.

In a model: `apply` gives its linears experts as a `MoELoRAConfig` says, `route` tells them the `Routing` of a batch,
which an `InstanceGate` makes; `save` and `load` keep the experts in a folder, with `storage`. `load_balancing_loss`,
`expert_share` and `mutual_information` are for training the gate and for seeing what it does.
A model that routes itself: `attach` puts the gate into it, as a `GateConfig` says; `parameter_groups` gives the gate a
learning rate of its own, `disable` is the model without experts, `print_trainable_parameters` counts.
By itself: `MoELoRALinear` is the layer, `linear` the op, `linear_group` the op for several linears of one x;
`linear` also takes a base in 8 or 4 bits, a `QuantizedWeight`.
What runs: `backends` and `explain` tell, and `python -m moe_lora` checks every backend on this machine. The environment
variable MOE_LORA_BACKEND names the backend that "auto" takes; "rule" switches timing off. `register_backend` adds one;
`share_choices` has several ranks choose alike.
"""

from moe_lora import storage
from moe_lora.adopt import attach, disable, parameter_groups, print_trainable_parameters
from moe_lora.backend.autotune import export_choices, import_choices, share_choices
from moe_lora.backend.dispatch import backends, explain, register_backend
from moe_lora.checkpoint import load, save
from moe_lora.config import GateConfig, MoELoRAConfig
from moe_lora.context import route
from moe_lora.gate import InstanceGate, expert_share, load_balancing_loss, mutual_information
from moe_lora.group import linear_group
from moe_lora.inject import apply
from moe_lora.layers import MoELoRALinear
from moe_lora.ops import linear
from moe_lora.routing import Routing
from moe_lora.weight import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "GateConfig",
    "InstanceGate",
    "MoELoRAConfig",
    "MoELoRALinear",
    "QuantizedWeight",
    "Routing",
    "apply",
    "attach",
    "backends",
    "disable",
    "expert_share",
    "explain",
    "export_choices",
    "import_choices",
    "linear",
    "linear_group",
    "load",
    "load_balancing_loss",
    "mutual_information",
    "parameter_groups",
    "print_trainable_parameters",
    "register_backend",
    "route",
    "save",
    "share_choices",
    "storage",
]
