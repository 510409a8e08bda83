"""Work that several processes share through a folder: each part is made once, by whoever comes to it first."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_lora import storage

READY = "ready"  # inside the folder of a part, whose lock keeps others from making it too
WAIT = 0.2  # seconds between two looks at parts that others make


def share_out(folder: Path, keys: Sequence[str], is_whole: Callable[[Path], bool], make: Callable[[int, Path], None]):
    """Have every part `folder/KEY/ready` whole; ranks begin at different parts, and none waits while one is free.

    Args:
        folder: of all parts.
        keys: names of the parts.
        is_whole: whether a part is there and undamaged.
        make: number of a part, and where it goes: writes it with `storage.staged`.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    order = deque(range(len(keys)))
    order.rotate(-(rank * len(keys) // max(world, 1)))
    waiting = 0
    while order:
        number = order[0]
        target = folder / keys[number] / READY
        if not is_whole(target):
            try:
                with storage.lock(target.parent):
                    if not is_whole(target):
                        make(number, target)
            except storage.BusyError:
                order.rotate(-1)
                waiting += 1
                if waiting >= len(order):
                    time.sleep(WAIT)
                    waiting = 0
                continue
        order.popleft()
        waiting = 0
