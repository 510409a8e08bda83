"""Where the layers of one model find the routing of the batch."""

import threading
from typing import Any

import torch

from moe_lora.routing import Routing


class RouteSlot(threading.local):
    """Where the layers of one model find the routing of the batch; each thread has its own.

    A `threading.local` and not a `ContextVar`, because torch.compile traces the one and not the other.
    """

    def __init__(self):
        # in the instance, not in the class: torch.compile would guard that the instance has none yet
        self.routing: Routing | None = None
        self.siblings: Any = None  # a `Siblings`, while the forward of their parent runs
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
