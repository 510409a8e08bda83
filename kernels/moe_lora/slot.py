"""Where the layers of one model find the routing of the batch: scoped to the request, never shared.

A routing that `moe_lora.route` enters is seen by the asyncio task, thread or context that entered it (a `ContextVar`),
and if the code that entered it runs in a generator, by that generator alone: it counts while the generator's frame is
on the stack, in whichever thread the generator is resumed.
torch.compile traces no `ContextVar`: compiled code reads `RouteSlot.routing`, of the thread, which `sync` sets to the
routing of the context before compiled code runs.
"""

import contextlib
import inspect
import sys
import threading
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from moe_lora.routing import Routing

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
# What drives the generator of a @contextmanager function: such a generator enters for its caller.
_MANAGERS = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._AsyncGeneratorContextManager.__aenter__.__code__,
}


class Base:
    """In place of a routing: the layers are the frozen linears alone."""

    def __reduce__(self):
        return "BASE"


BASE = Base()


class RouteSlot(threading.local):
    """What one model's layers share in one thread; each thread has its own."""

    def __init__(self):
        # in the instance, not in the class: torch.compile would guard that the instance has none yet
        self.routing: Routing | Base | None = None  # for compiled code
        self.batch: Any = None  # a `Batch`, while the forward of the model runs
        self.siblings: Any = None  # a `Siblings`, while the forward of their parent runs
        self.copied: tuple[tuple, Routing] | None = None  # the last routing that was wanted on another device

    def current(self) -> Routing | Base | None:
        """The routing of this context, or None."""
        if torch.compiler.is_compiling():
            return self.routing
        entry = _innermost(self)
        return None if entry is None else entry.routing

    def images(self) -> Any:
        """The instance of each image, as `route` was told; None if it was not."""
        entry = _innermost(self)
        return None if entry is None else entry.images

    def sync(self) -> None:
        """Let compiled code in this thread see the routing of this context."""
        self.routing = self.current()

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


class Entry:
    """A routing that was entered and not left yet.

    Args:
        slot: of the model that it holds for.
        routing: None once it was left.
        images: the instance of each image, or None.
    """

    def __init__(self, slot: RouteSlot, routing: Routing | Base, images: Any = None):
        self.slot, self.images = slot, images
        self.routing: Routing | Base | None = routing
        self.outer: Entry | None = None
        self.frame: FrameType | None = None  # the generator that it belongs to

    def enter(self) -> None:
        if torch.compiler.is_compiling():
            return
        self.frame = _generator_frame(sys._getframe(1))
        if self.frame is None:
            self.outer = _outermost_open(_ENTERED.get())
            _ENTERED.set(self)
        else:
            _GENERATORS.append(self)
        self.slot.sync()

    def leave(self) -> None:
        """Ends it for every context that sees it; may be called in another thread than `enter`."""
        if self.frame is not None:
            _GENERATORS.remove(self)
        self.frame, self.routing = None, None
        _ENTERED.set(_outermost_open(_ENTERED.get()))
        self.slot.sync()


_ENTERED: ContextVar[Entry | None] = ContextVar("moe_lora_entered", default=None)
_GENERATORS: list[Entry] = []


def _outermost_open(entry: Entry | None) -> Entry | None:
    """The entry, or the nearest around it that was not left yet."""
    while entry is not None and entry.routing is None:
        entry = entry.outer
    return entry


def _innermost(slot: RouteSlot) -> Entry | None:
    if _GENERATORS:
        mine = {id(entry.frame): entry for entry in list(_GENERATORS) if entry.slot is slot}  # the last of a frame wins
        frame: FrameType | None = sys._getframe(1) if mine else None
        while frame is not None:
            if id(frame) in mine:
                return mine[id(frame)]
            frame = frame.f_back
    entry = _ENTERED.get()
    while entry is not None and (entry.routing is None or entry.slot is not slot):
        entry = entry.outer
    return entry


def _generator_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost generator on the stack that can be suspended with what it entered still open."""
    while frame is not None:
        caller = frame.f_back
        if frame.f_code.co_flags & _SUSPENDABLE and not (caller is not None and caller.f_code in _MANAGERS):
            return frame
        frame = caller
    return None
