"""`apply` puts experts into a model."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.calls import watch
from moe_lora.config import MoELoRAConfig
from moe_lora.gate import InstanceGate
from moe_lora.layers import MoELoRALinear
from moe_lora.rows import is_tower
from moe_lora.siblings import group_siblings
from moe_lora.slot import RouteSlot

_ROUTER = re.compile(r"(^|_)(gate|router|switch)$")
_HEADS = ("classifier", "score", "qa_outputs", "classification_head")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def apply(
    model: nn.Module,
    config: MoELoRAConfig,
    group: bool | tuple[type, ...] = True,
    train: tuple[str, ...] | None = None,
) -> nn.Module:
    """Replaces the config's target linears by `MoELoRALinear`, in place, and freezes every other parameter.

    Every target must be called with the rows of the whole batch in its order, [N, L, D] or flattened: the rows are
    counted to know whose they are. A linear that is given picked rows, as one expert of a sparse MoE model is, cannot
    be a target. Names of an image tower can: see `images` of `route`.

    Args:
        model: any model; its frozen parameters keep their dtype and device, and the experts are made on that device.
        config: how many experts of which rank, on which linears.
        group: compute q_proj, k_proj and v_proj of a causal attention together, and gate_proj and up_proj, by
            `linear_group`, if all of them are targets, in the attentions and MLPs of transformers; a tuple of classes:
            in those too, which must not change x between the calls through x.data. Names, parameters and results stay
            as they are; the siblings share a dropout mask. In a compiled graph and in inference mode, where a change
            of x between the calls could not be seen, each layer runs alone.
        train: names of modules that go on training whole, such as a new head ("score",), matched like target_modules;
            () for none. None means none, too, but is refused for a model with a head of a classifier's name.

    Returns:
        The model.
    Raises:
        ValueError: no linear matches the config or one of its names (names what there is), the model has experts
            already, a target is no plain nn.Linear (GPT-2's Conv1D, a quantised linear), has hooks or gets picked rows,
            the model's code would go round the layers, or a head would be frozen unasked.
        TypeError: config is no MoELoRAConfig.
    """
    if not isinstance(config, MoELoRAConfig):
        raise TypeError(f"config must be a moe_lora.MoELoRAConfig, got {type(config).__name__}")
    targets = find_targets(model, config)
    kept = _kept(model, targets, train)
    model.requires_grad_(False)
    for module in kept:
        module.requires_grad_(True)
    slot = RouteSlot()
    layers: dict[nn.Module, MoELoRALinear] = {}
    towers = {name for name in targets if is_tower(model, name)}
    for name, base in targets.items():
        if base not in layers:  # one linear may have two names
            layers[base] = MoELoRALinear.from_linear(base, config, slot)
            layers[base].tower = name in towers
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[base])
    if group:
        for parent in list(model.modules()):
            group_siblings(parent, slot, group if isinstance(group, tuple) else ())
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and _holds_experts(module):
            _keep_slow(module)
    watch(model, slot)
    return model


def find_targets(model: nn.Module, config: MoELoRAConfig) -> dict[str, nn.Linear]:
    """The linears that `apply` would replace, by name; raises what it raises, and changes nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, MoELoRALinear):
            raise ValueError(f"the model must have no experts yet, got a MoELoRALinear at {name or 'its root'}")
        if getattr(getattr(module, "config", None), "pretraining_tp", 1) > 1:
            raise ValueError(
                "config.pretraining_tp must be 1, got more: such a model slices q_proj.weight itself and would go "
                "round the experts; set model.config.pretraining_tp = 1"
            )
    matches = _matcher(model, config.target_modules)
    targets: dict[str, Any] = {name: module for name, module in modules.items() if name and matches(name, module)}
    wanted = config.target_modules if isinstance(config.target_modules, tuple) else ()
    idle = [target for target in wanted if not any(_named(name, target) for name in targets)]
    if not targets or idle:
        got = f"none for {', '.join(idle)}" if targets else repr(config.target_modules)
        raise ValueError(f"target_modules must match a linear, got {got}; {_linears(modules)}")
    for name, module in targets.items():
        if type(module) is not nn.Linear:
            raise ValueError(f"targets must be nn.Linear, got {_kind(module)} at {name}")
        if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
            got = f"{type(module.weight).__name__} {module.weight.dtype}"
            raise ValueError(f"targets must have a plain floating point weight, got {got} at {name}")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise ValueError(f"targets must have no hooks, which would be lost, got some at {name}; hook after apply")
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"targets must not be dispatched yet, got a hook of Accelerate at {name}, whose weights may be "
                "elsewhere; apply first, then accelerate.dispatch_model"
            )
        picked = _picked(modules, name)
        if picked:
            raise ValueError(
                f"targets must get the rows of the whole batch, got {name}, which is one of the experts {picked}, "
                "whose rows are picked by a router; leave them out of target_modules"
            )
        parent = modules[name.rpartition(".")[0]]
        attention = getattr(parent, "self_attn", None)
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            raise ValueError(f"targets must get the batch first, got {name} of a layer with batch_first=False")
    return targets


def _picked(modules: dict[str, nn.Module], name: str) -> str | None:
    """The name of the list of experts that a linear is in, if a router beside it picks their rows."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        holder, of = modules[".".join(parts[:end])], modules[".".join(parts[: end - 1])]
        if isinstance(holder, nn.ModuleList | nn.ModuleDict) and len(holder) > 1:
            routers = [
                child
                for child_name, child in of.named_children()
                if _ROUTER.search(child_name) and len(holder) in tuple(getattr(child, "weight", torch.empty(0)).shape)
            ]
            if "expert" in parts[end - 1] or routers:
                return ".".join(parts[:end])
    return None


def _kept(model: nn.Module, targets: dict[str, nn.Linear], train: tuple[str, ...] | None) -> list[nn.Module]:
    """The modules that go on training: those named, and gates."""
    if isinstance(train, str):
        raise ValueError(f"train must be names of modules, got {train!r}; give a tuple")
    modules = dict(model.named_modules())
    idle = [name for name in train or () if not any(_named(path, name) for path in modules)]
    if idle:
        raise ValueError(f"train must name modules of the model, got none for {', '.join(idle)}")
    heads = [path for path in modules if path.rpartition(".")[2] in _HEADS and path not in targets]
    if train is None and any(True for path in heads for _ in modules[path].parameters()):
        raise ValueError(
            f"apply freezes all but the experts, which would freeze the head {heads[0]}: give train=({heads[0]!r},) to "
            "train it, or train=() to freeze it"
        )
    named = [module for path, module in modules.items() if any(_named(path, name) for name in train or ())]
    return [*named, *(module for module in modules.values() if isinstance(module, InstanceGate))]


def _holds_experts(module: nn.Module) -> bool:
    return any(isinstance(child, MoELoRALinear) for child in module.modules())


def _keep_slow(module: nn.Module) -> None:
    """Keeps torch's encoder from its fast path, which reads the linears' weights and goes round the layers."""
    if isinstance(module, nn.TransformerEncoder):
        module.enable_nested_tensor = module.use_nested_tensor = False
    else:
        module.register_forward_pre_hook(_stay)  # a layer with hooks takes no fast path


def _stay(module: nn.Module, args: Any) -> None:
    return None


def _linears(modules: dict[str, nn.Module]) -> str:
    """The model's linears by their last names, and what looks like one but is of another kind."""
    kinds: dict[str, set[str]] = {"linears": set()}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if name and isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            kind = "linears" if type(module) is nn.Linear else f"not nn.Linear but {_kind(module)}"
            kinds.setdefault(kind, set()).add(name.rpartition(".")[2])
    return "; ".join(f"{kind}: {', '.join(sorted(names)) or 'none'}" for kind, names in kinds.items())


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _matcher(model: nn.Module, target_modules: tuple[str, ...] | str) -> Callable[[str, nn.Module], bool]:
    if target_modules == "all-linear":
        output_embeddings: Any = getattr(model, "get_output_embeddings", None)
        head = output_embeddings() if output_embeddings else None
        return lambda name, module: type(module) is nn.Linear and module is not head
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        return lambda name, module: pattern.fullmatch(name) is not None
    return lambda name, module: any(_named(name, target) for target in target_modules)


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
