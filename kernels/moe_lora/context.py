"""`route` tells the experts of a model which of them a batch uses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.layers import MoELoRALinear
from moe_lora.routing import Routing
from moe_lora.slot import Base, Entry, RouteSlot


@contextmanager
def route(model: nn.Module, routing: Routing, images: Sequence[int] | Tensor | None = None) -> Iterator[None]:
    """Within it, the experts of `model` use `routing`; the innermost of nested ones counts.

    It holds for the asyncio task or thread that enters it, for tasks that are started within it, and in a generator
    for that generator alone, so that requests which take turns never see each other's. It may be left in another
    thread than it was entered in.

    Holds for `model.generate` with beams and num_return_sequences too, and for what gradient checkpointing of
    transformers (`model.gradient_checkpointing_enable()`) recomputes later, in backward. What `torch.utils.checkpoint`
    itself recomputes has no routing unless backward runs within it too, in this thread.

    If requests take turns on a compiled model, give this the compiled one, `route(torch.compile(model), ...)`, or
    compile in place with `model.compile()`; a compiled function that calls the model by itself is not seen.

    Args:
        model: a model with experts, or one that holds it, as DDP or torch.compile do.
        routing: of the batch that the model is called with; layers on other devices use a copy of it there.
        images: the instance of each image, for experts in an image tower whose images are not one to an instance. None
            means what the image tokens of each row say, where they say it.
    Raises:
        ValueError: the model has no experts, or parts of it were given experts by separate calls of `apply`.
        TypeError: routing is no Routing.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a moe_lora.Routing, got {type(routing).__name__}")
    slot = prepare(model)
    with enter(slot, routing, images):
        yield


@contextmanager
def enter(slot: RouteSlot, routing: Routing | Base, images: Any = None) -> Iterator[None]:
    """`route` for the layers of a slot."""
    before, entry = slot.routing, Entry(slot, routing, images)
    entry.enter()
    if torch.compiler.is_compiling():
        slot.routing = routing
    try:
        yield
    finally:
        slot.siblings, slot.copied = None, None  # siblings that a failed forward left
        if torch.compiler.is_compiling():
            slot.routing = before
        else:
            entry.leave()


def prepare(model: nn.Module) -> RouteSlot:
    """The slot of the model's layers; also makes its checkpointing carry the routing, and compiled parts see it."""
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
    if not torch.compiler.is_compiling():
        for module in model.modules():
            compiled = module._compiled_call_impl  # of module.compile()
            if compiled is not None and not isinstance(compiled, _Synced):
                module._compiled_call_impl = _Synced(compiled, slot)
        if "_orig_mod" in model._modules and not isinstance(model.forward, _Synced):  # torch.compile(module)
            model.forward = _Synced(model.forward, slot)
    return slot


class _Synced:
    """Compiled code that sees the routing of the context which calls it."""

    def __init__(self, compiled: Callable[..., Any], slot: RouteSlot):
        self.compiled, self.slot = compiled, slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.slot.sync()
        return self.compiled(*args, **kwargs)


class _RoutedCheckpoint:
    """Runs a checkpointed function, and its recomputation in backward, under the routing of its forward.

    The gates go in as an argument, so that reentrant checkpointing, which detaches its arguments, returns their
    gradient.
    """

    def __init__(self, checkpoint: Callable[..., Any], slot: RouteSlot):
        self.checkpoint, self.slot = checkpoint, slot

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing = self.slot.current()
        if not isinstance(routing, Routing):
            return self.checkpoint(function, *args, **kwargs)
        gates = routing.gates
        if torch.is_grad_enabled() and not gates.requires_grad:
            # reentrant checkpointing returns no gradient at all unless one argument requires it
            gates = gates.detach().requires_grad_()
        return self.checkpoint(partial(_under, self.slot, routing, self.slot.batch, function), gates, *args, **kwargs)


def _under(
    slot: RouteSlot,
    routing: Routing,
    batch: Any,
    function: Callable[..., Any],
    gates: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    around, slot.batch = slot.batch, batch
    try:
        with enter(slot, routing.with_gates(gates)):
            return function(*args, **kwargs)
    finally:
        slot.batch = around
