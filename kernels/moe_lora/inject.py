"""`apply` puts experts into a model, `route` tells it which of them a batch uses."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.layers import MoELoRAConfig, MoELoRALinear, RouteSlot, Siblings
from moe_lora.routing import Routing

# Children that a module of the Llama family calls one after the other with the same x; q, k, v if it is causal.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def apply(model: nn.Module, config: MoELoRAConfig, group: bool = True) -> nn.Module:
    """Replaces the config's target linears by `MoELoRALinear`, in place, and freezes every other parameter.

    Every target must be called with the rows of the whole batch in its order, [N, L, D] or flattened: the rows are
    counted to know whose they are. A linear that is given picked rows, as one expert of a sparse MoE model is, must not
    be a target.

    Args:
        model: any model; its frozen parameters keep their dtype and device, and the experts are made on that device.
        config: how many experts of which rank, on which linears.
        group: compute q_proj, k_proj and v_proj of a causal attention together, and gate_proj and up_proj, by
            `linear_group`, if all of them are targets. Names, parameters and results stay as they are; the siblings
            share a dropout mask. In a compiled graph and in inference mode, where a change of x between the calls
            could not be seen, each layer runs alone.

    Returns:
        The model.
    Raises:
        ValueError: no linear matches the config or one of its names (names what there is), the model has experts
            already, a target is no plain nn.Linear (GPT-2's Conv1D, a quantised linear) or has hooks, or the model's
            code would go round the layers.
        TypeError: config is no MoELoRAConfig.
    """
    if not isinstance(config, MoELoRAConfig):
        raise TypeError(f"config must be a moe_lora.MoELoRAConfig, got {type(config).__name__}")
    targets = find_targets(model, config)
    model.requires_grad_(False)
    slot = RouteSlot()
    layers: dict[nn.Module, MoELoRALinear] = {}
    for name, base in targets.items():
        if base not in layers:  # one linear may have two names
            layers[base] = MoELoRALinear.from_linear(base, config, slot)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[base])
    if group:
        for parent in list(model.modules()):
            _group(parent, slot)
    return model


def _group(parent: nn.Module, slot: RouteSlot) -> None:
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
    return targets


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


@contextmanager
def route(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Within it, the experts of `model` use `routing`, in this thread; the innermost of nested ones counts.

    Holds for `model.generate` with beams and num_return_sequences too, and for what gradient checkpointing of
    transformers (`model.gradient_checkpointing_enable()`) recomputes later, in backward. What `torch.utils.checkpoint`
    itself recomputes has no routing unless backward runs within it too, in this thread.

    Args:
        model: a model with experts, or one that holds it, as DDP or torch.compile do.
        routing: of the batch that the model is called with; layers on other devices use a copy of it there.
    Raises:
        ValueError: the model has no experts, or parts of it were given experts by separate calls of `apply`.
        TypeError: routing is no Routing.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a moe_lora.Routing, got {type(routing).__name__}")
    slot = _prepare(model)
    before, slot.routing = slot.routing, routing
    try:
        yield
    finally:
        slot.routing, slot.siblings, slot.copied = before, None, None  # siblings that a failed forward left


def _prepare(model: nn.Module) -> RouteSlot:
    """The slot of the model's layers; also makes its gradient checkpointing carry the routing."""
    slots, checkpointed = set(), []
    for module in model.modules():
        if isinstance(module, MoELoRALinear):
            slots.add(module.slot)
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _RoutedCheckpoint):
            checkpointed.append(module)
    if len(slots) != 1:
        what = "no experts; call moe_lora.apply first" if not slots else f"{len(slots)} parts applied apart; route each"
        raise ValueError(f"model must have experts from one call of moe_lora.apply, got {what}")
    slot = slots.pop()
    for module in checkpointed:
        module._gradient_checkpointing_func = _RoutedCheckpoint(module._gradient_checkpointing_func, slot)
    return slot


class _RoutedCheckpoint:
    """Runs a checkpointed function, and its recomputation in backward, under the routing of its forward.

    The gates go in as an argument, so that reentrant checkpointing, which detaches its arguments, returns their
    gradient.
    """

    def __init__(self, checkpoint: Callable[..., Any], slot: RouteSlot):
        self.checkpoint, self.slot = checkpoint, slot

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing = self.slot.routing
        if routing is None:
            return self.checkpoint(function, *args, **kwargs)
        gates = routing.gates
        if torch.is_grad_enabled() and not gates.requires_grad:
            # reentrant checkpointing returns no gradient at all unless one argument requires it
            gates = gates.detach().requires_grad_()
        return self.checkpoint(partial(_under, self.slot, routing, function), gates, *args, **kwargs)


def _under(
    slot: RouteSlot, routing: Routing, function: Callable[..., Any], gates: Tensor, *args: Any, **kwargs: Any
) -> Any:
    before, slot.routing = slot.routing, routing.with_gates(gates)
    try:
        return function(*args, **kwargs)
    finally:
        slot.routing = before


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
