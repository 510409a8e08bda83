"""The memory spaces: bounds and alignment of every access, counters and race detection on the way."""

from dataclasses import dataclass

import numpy as np

from ptxemu.fault import Fault
from ptxemu.formats import U
from ptxemu.operands import GLOBAL_BASE, LOCAL_WINDOW, SHARED_WINDOW

GAP = 4096  # bytes that belong to nobody between two allocations


@dataclass(frozen=True)
class Buffer:
    """A pointer argument.

    Args:
        name: for messages and counters.
        data: the bytes of the whole storage.
        offset: where in them the pointer points.
        extent: bytes [low, high) of the storage that belong to the tensor; None for all.
        uninitialised: its contents must not be read before they are written.
    """

    name: str
    data: np.ndarray
    offset: int = 0
    extent: tuple[int, int] | None = None
    uninitialised: bool = False


class GlobalMemory:
    """All buffers in one array, with gaps between them; addresses start at GLOBAL_BASE."""

    def __init__(self, buffers: list[Buffer]):
        self.places: dict[tuple[int, int], int] = {}  # storage (pointer, bytes): offset
        self.buffers, self.names = buffers, []
        ranges, size = [], GAP
        storages = {}
        for buffer in buffers:
            key = (buffer.data.ctypes.data, buffer.data.nbytes)
            if key not in storages:
                storages[key] = buffer.data
                self.places[key] = size
                size += -(-buffer.data.nbytes // 512) * 512 + GAP
            low, high = buffer.extent or (0, buffer.data.nbytes)
            ranges.append((self.places[key] + low, self.places[key] + high, buffer.name))
        self.bytes = np.zeros(size, np.uint8)
        self.storages = storages
        for key, data in storages.items():
            self.bytes[self.places[key] :][: data.nbytes] = data
        merged: list[list] = []
        for low, high, name in sorted(r for r in ranges if r[0] < r[1]):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
                merged[-1][2] += "" if name in merged[-1][2].split("/") else f"/{name}"
            else:
                merged.append([low, high, name])
        self.starts = np.array([0] + [m[0] for m in merged])
        self.ends = np.array([0] + [m[1] for m in merged])
        self.names = ["nothing"] + [m[2] for m in merged]
        self.written = None
        if any(b.uninitialised for b in buffers):
            self.written = np.ones(size, bool)
            for b in buffers:
                if b.uninitialised:
                    low, high = b.extent or (0, b.data.nbytes)
                    place = self.places[b.data.ctypes.data, b.data.nbytes]
                    self.written[place + low : place + high] = False

    def address(self, buffer: Buffer) -> int:
        return GLOBAL_BASE + self.places[buffer.data.ctypes.data, buffer.data.nbytes] + buffer.offset

    def name(self, offset: int) -> str:
        return self.names[int(np.searchsorted(self.starts, offset, "right")) - 1]

    def check(self, at: np.ndarray, size: int) -> None:
        """Bytes [at, at + size) of every lane lie in one buffer."""
        which = np.searchsorted(self.starts, at, "right") - 1
        bad = (at + size > self.ends[which]) | (at < 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            after, name = int(at[i]) - int(self.ends[which[i]]), self.names[which[i]]
            if which[i] + 1 < len(self.starts) and self.starts[which[i] + 1] - at[i] < after:
                after, name = int(at[i]) - int(self.starts[which[i] + 1]), self.names[which[i] + 1]
                raise Fault(
                    "out of bounds", f"{size} bytes of global memory, {-after} bytes before the start of {name}"
                )
            raise Fault(
                "out of bounds",
                f"{size} bytes of global memory, {after} bytes after the end of {name}, in {int(bad.sum())} lanes",
            )

    def copy_back(self) -> None:
        for key, data in self.storages.items():
            if data.flags.writeable:
                data[:] = self.bytes[self.places[key] :][: data.nbytes]


def plain(size: int, raw: np.ndarray) -> np.ndarray:
    """Bytes seen as words of a size."""
    return raw[: len(raw) // size * size].view(U[8 * size] if size <= 8 else np.complex128)


def chosen(x: np.ndarray, m) -> np.ndarray:
    return x if m is None else x[m]


def reach(s, ins, space: str, addr: np.ndarray, size: int, m, kind: str, values=None) -> tuple[np.ndarray, np.ndarray]:
    """Check, count and record an access of `size` bytes per lane.

    Args:
        s: the running lanes.
        addr: [lanes] addresses in `space` (generic ones if it is "").
        m: which lanes; None for all.
        kind: "read", "write" or "atomic".
        values: a function to the bytes that the lanes of `m` write, for shared memory.

    Returns:
        the bytes of the space and the offsets in them of the lanes of `m`.
    """
    if space == "":
        space, addr = resolve(s, addr, m)
    at = chosen(addr, m)
    if (at & (size - 1)).any():
        bad = int(at[(at & (size - 1)) != 0][0])
        name = f" of {s.launch.memory.name(bad - GLOBAL_BASE)}" if space == "global" else ""
        raise Fault(
            "misaligned",
            f"{size} bytes of {space} memory{name} at an address that is {bad % size} beyond a multiple of {size}",
        )
    if space == "global":
        return reach_global(s, ins, addr - GLOBAL_BASE, size, m, kind)
    if space == "local":
        if (at < 0).any() or (at + size > s.program.local).any():
            raise Fault("out of bounds", f"local memory has {s.program.local} bytes, access at {int(at.max())}")
        return s.local, at + chosen(s.local_base, m)
    assert space == "shared", space
    bad = (at < 0) | (at + size > s.batch.shared_bytes)
    if bad.any():
        raise Fault(
            "out of bounds", f"shared memory has {s.batch.shared_bytes} bytes, access of {size} at {int(at[bad][0])}"
        )
    s.launch.profile.count_shared(ins, addr, size, m, kind)
    at = at + chosen(s.shared_base, m)
    if s.batch.shadow is not None:
        shadow, warp = s.batch.shadow, chosen(s.warp, m)
        if kind == "read":
            shadow.read(warp, at, size)
        else:
            shadow.write(warp, at, size, values, kind == "atomic")
    return s.batch.shared, at


def reach_global(s, ins, offset: np.ndarray, size: int, m, kind: str):
    launch, at = s.launch, chosen(offset, m)
    memory = launch.memory
    touch_global(s, at, size, chosen(s.block_number, m), kind)
    launch.profile.count_global(ins, memory, offset, size, m, kind)
    return memory.bytes, at


def touch_global(s, at: np.ndarray, size: int, block: np.ndarray, kind: str) -> None:
    """Check an access by blocks and remember it."""
    launch, memory = s.launch, s.launch.memory
    memory.check(at, size)
    if memory.written is not None:
        each = at[:, None] + np.arange(size)
        if kind != "write" and not memory.written[each].all():
            raise Fault("uninitialised", f"{memory.name(int(at[0]))} is read where nobody wrote")
        memory.written[each] = True
    if launch.shadow is not None:
        try:
            if kind == "read":
                launch.shadow.read(block, at, size)
            else:
                launch.shadow.write(block, at, size, kind == "atomic")
        except Fault as fault:
            text, _, place = str(fault).partition(": ")[2].partition("@")
            raise Fault("blocks", f"{text} in {memory.name(int(place))}") from None


def resolve(s, addr: np.ndarray, m) -> tuple[str, np.ndarray]:
    """The space of generic addresses, which must be one for all lanes of an instruction."""
    at = chosen(addr, m)
    shared = (at >= SHARED_WINDOW) & (at < LOCAL_WINDOW)
    local = (at >= LOCAL_WINDOW) & (at < GLOBAL_BASE)
    if shared.all():
        return "shared", addr - SHARED_WINDOW
    if local.all():
        return "local", addr - LOCAL_WINDOW
    if shared.any() or local.any():
        raise Fault("operand", "generic addresses of one instruction lie in different spaces: not emulated")
    return "global", addr
