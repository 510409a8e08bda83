"""Bulk copies between global and shared memory, of plain ranges and of boxes of tensors (TMA), and their tensor maps.

The format of a tensor map in memory is not documented; this one is our own. Kernels see it only through instructions.
"""

from dataclasses import dataclass

import numpy as np

from ptxemu.convert import round_tf32
from ptxemu.counters import Traffic
from ptxemu.fault import Fault, Unknown
from ptxemu.mbarrier import advance, of, places
from ptxemu.memory import Buffer, chosen, reach, touch_global
from ptxemu.operands import GLOBAL_BASE, PARAM_WINDOW, address, reader
from ptxemu.parse import Instruction, Program, split
from ptxemu.table import instruction

# field: offset in our tensor map, bytes of an entry
FIELDS = {"global_address": (0, 8), "rank": (8, 4), "elemtype": (12, 4), "swizzle_mode": (16, 4), "fill_mode": (20, 4)}
FIELDS |= {"interleave_layout": (24, 4), "global_dim": (28, 4), "global_stride": (48, 8), "box_dim": (80, 4)}
FIELDS |= {"element_stride": (100, 4)}
ELEMENT_BYTES = (
    1,
    2,
    4,
    4,
    8,
    8,
    2,
    4,
    4,
    8,
    2,
    4,
)  # by elemtype: u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32
TF32 = 11


@dataclass(frozen=True)
class TensorMap:
    """A tensor and the box that a copy moves; dimensions from the innermost out.

    Args:
        buffer: its memory.
        dims, box: elements; strides: bytes, of all dimensions but the innermost.
        elemtype, swizzle, fill: numbers as of `tensormap.replace`.
    """

    buffer: Buffer
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    elemtype: int
    swizzle: int = 0
    fill: int = 0

    def encode(self, address: int) -> bytes:
        raw = bytearray(128)
        values = {"global_address": [address], "rank": [len(self.dims) - 1], "elemtype": [self.elemtype]}
        values |= {"swizzle_mode": [self.swizzle], "fill_mode": [self.fill], "global_dim": self.dims}
        values |= {"global_stride": self.strides, "box_dim": self.box, "element_stride": [1] * len(self.dims)}
        for name, entries in values.items():
            start, size = FIELDS[name]
            for i, value in enumerate(entries):
                raw[start + i * size : start + (i + 1) * size] = int(value).to_bytes(size, "little")
        return bytes(raw)


class Decoded:
    """A tensor map as a copy of `rank` dimensions reads it."""

    def __init__(self, raw: bytes, rank: int):
        def get(name: str, i: int = 0) -> int:
            start, size = FIELDS[name]
            return int.from_bytes(raw[start + i * size : start + (i + 1) * size], "little")

        if get("rank") + 1 != rank or get("elemtype") >= len(ELEMENT_BYTES) or get("interleave_layout"):
            raise Fault("operand", f"the tensor map is not one of {rank} dimensions, or is interleaved")
        self.type, self.fill = get("elemtype"), 255 * get("fill_mode")
        self.size, self.span = ELEMENT_BYTES[self.type], (0, 32, 64, 128)[get("swizzle_mode")]
        self.start, self.rank = get("global_address"), rank
        self.dims, self.box = ([get(name, i) for i in range(rank)] for name in ("global_dim", "box_dim"))
        self.strides = [self.size, *(get("global_stride", i) for i in range(rank - 1))]
        if self.start % 16 or any(stride % 16 for stride in self.strides[1:]) or self.box[0] * self.size % 16:
            raise Fault("misaligned", "address, strides and inner box of a tensor map must be multiples of 16 bytes")
        if self.span and self.box[0] * self.size > self.span:
            raise Fault("operand", f"inner box of {self.box[0] * self.size} bytes, swizzle of {self.span}")
        if any(get("element_stride", i) != 1 for i in range(rank)) or not all(0 < n <= 256 for n in self.box):
            raise Fault("operand", f"box {self.box}, element strides must be 1")

    def elements(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Offset in global memory of each element of the box at a corner, and whether it lies in the tensor."""
        at, inside = np.full(1, self.start - GLOBAL_BASE), np.ones(1, bool)
        for first, n, dim, stride in zip(corner, self.box, self.dims, self.strides, strict=True):
            i = (first + np.arange(n))[:, None]
            at, inside = (at + i * stride).reshape(-1), (inside & (i >= 0) & (i < dim)).reshape(-1)
        return at, inside


class BulkQueue:
    """Bulk stores that still read shared memory, by lane and group."""

    def __init__(self, n: int):
        self.group = np.zeros(n, np.int64)
        self.flying: list[tuple[int, int, np.ndarray]] = []

    def wait(self, s, m, left: int) -> None:
        flying, self.flying = self.flying, []
        for lane, group, held in flying:
            if (m is None or m[lane]) and group < self.group[lane] - left:
                s.batch.shadow.release(int(s.warp[lane]), held)
            else:
                self.flying.append((lane, group, held))


def bulk(ins: Instruction, program: Program):
    """cp.async.bulk: copies, and the groups of those that store."""
    if "commit_group" in ins.mods:

        def commit(s, m):
            s.bulk.group[slice(None) if m is None else m] += 1

        return commit
    if "wait_group" in ins.mods:
        left = int(ins.operands[0])
        return lambda s, m: s.bulk.wait(s, m, left)
    spaces = [mod.partition("::")[0] for mod in ins.mods]
    if {"prefetch", "multicast", "im2col", "cp_mask"} & set(spaces) or not {"shared", "global"} <= set(spaces):
        raise Unknown("bulk copy")
    return BulkCopy(ins, program, spaces.index("shared") < spaces.index("global"))


class BulkCopy:
    """The bytes are moved at once; who has not waited on the mbarrier does not know of them (`races.py`)."""

    def __init__(self, ins: Instruction, program: Program, load: bool):
        self.ins, self.load, self.rank = ins, load, 0
        to, source, *rest = ins.operands
        shared, outer = (to, source) if load else (source, to)
        self.shared, self.size = address(program, shared), None
        if "tensor" in ins.mods:
            pointer, corner = split(outer[1:-1])
            self.corner = [reader(program, text, "s32") for text in split(corner[1:-1])]
            self.rank, self.outer = len(self.corner), address(program, f"[{pointer}]")
        else:
            self.outer, self.size = address(program, outer), reader(program, rest.pop(0), "u32")
        self.barrier = address(program, rest[0]) if load else None

    def __call__(self, s, m) -> None:
        for lane in np.arange(s.n) if m is None else np.flatnonzero(m):
            self.copy(s, int(lane))

    def copy(self, s, lane: int) -> None:
        at, inside, size, span, fill, kind = self.outside(s, lane)
        start, total = int(np.broadcast_to(self.shared(s), s.n)[lane]), len(at) * size
        if start % (128 if self.rank else 16):
            raise Fault("misaligned", f"a bulk copy at shared byte {start}")
        if start < 0 or start + total > s.batch.shared_bytes:
            text = f"shared memory has {s.batch.shared_bytes} bytes, bulk copy of {total} at {start}"
            raise Fault("out of bounds", text)
        place = start + size * np.arange(len(at))
        place = (place ^ (place >> 3 & (span - 16)) if span else place) + s.shared_base[lane]
        rows = np.arange(start, start + total, 16) + s.shared_base[lane]
        self.record_global(s, at[inside], size, int(s.block_number[lane]))
        memory, index = s.launch.memory.bytes, place[:, None] + np.arange(size)
        if self.load:
            data = np.full((len(at), size), fill, np.uint8)
            data[inside] = memory[at[inside][:, None] + np.arange(size)]
            if kind == TF32:
                data = round_tf32(data.view(np.uint32)).view(np.uint8)
            self.arrive(s, lane, rows, total)
            s.batch.shared[index] = data
        else:
            if s.batch.shadow is not None:
                s.batch.shadow.read(np.full(len(rows), s.warp[lane]), rows, 16, proxy=True)
                held = s.batch.shadow.granules(rows, 16).reshape(-1)
                s.batch.shadow.hold(held)
                s.bulk.flying.append((lane, int(s.bulk.group[lane]), held))
            memory[at[inside][:, None] + np.arange(size)] = s.batch.shared[index[inside]]

    def outside(self, s, lane: int) -> tuple[np.ndarray, np.ndarray, int, int, int, int]:
        """Offsets in global memory, which lie in the tensor, bytes of an element, swizzle, fill, element type."""
        where = int(np.broadcast_to(self.outer(s), s.n)[lane])
        if self.size is not None:
            n = int(np.broadcast_to(self.size(s), s.n)[lane])
            if n % 16 or where % 16:
                raise Fault("misaligned", f"a bulk copy of {n} bytes at an address that is {where % 16} beyond 16")
            return where - GLOBAL_BASE + np.arange(0, n, 16), np.ones(n // 16, bool), 16, 0, 0, 0
        tensor = Decoded(read_map(s, where, lane), self.rank)
        at, inside = tensor.elements([int(np.broadcast_to(c(s), s.n)[lane]) for c in self.corner])
        return at, inside, tensor.size, tensor.span, tensor.fill, tensor.type

    def record_global(self, s, at: np.ndarray, size: int, block: int) -> None:
        if not len(at):
            return
        kind = "read" if self.load else "write"
        touch_global(s, at, size, np.full(len(at), block), kind)
        key = (self.ins.index, kind, s.launch.memory.name(int(at[0])))
        s.launch.profile.traffic[key] += Traffic(1, len(np.unique(at >> 5)), len(at) * size)

    def arrive(self, s, lane: int, rows: np.ndarray, total: int) -> None:
        """The copy counts its bytes at its mbarrier; waiting for the phase makes it known."""
        assert self.barrier is not None
        one = np.arange(s.n) == lane
        barrier = of(s, int(places(s, self.barrier(s), one)[0]))
        s.batch.tickets += 1
        if s.batch.shadow is not None:
            warp, agent = np.full(len(rows), s.warp[lane]), (barrier.column, s.batch.tickets)
            s.batch.shadow.write(warp, rows, 16, agent=agent)
        barrier.gathering[barrier.column] = s.batch.tickets
        barrier.bytes -= total
        advance(s, barrier)


def read_map(s, where: int, lane: int) -> bytes:
    if where % 64:
        raise Fault("misaligned", "a tensor map is not aligned to 64 bytes")
    if PARAM_WINDOW <= where < PARAM_WINDOW + len(s.launch.params):
        return bytes(s.launch.params[where - PARAM_WINDOW :][:128])
    at = np.array([where - GLOBAL_BASE])
    touch_global(s, at, 128, np.array([s.block_number[lane]]), "read")
    return s.launch.memory.bytes[at[0] : at[0] + 128].tobytes()


@instruction("tensormap")
def tensor_map(ins: Instruction, program: Program):
    """tensormap.replace of one field, and the copy of a tensor map from shared to global memory."""
    if ins.mods[0] == "cp_fenceproxy":
        return publish_map(ins, program)
    if ins.mods[:2] != ("replace", "tile") or ins.mods[2] not in FIELDS:
        raise Unknown("tensor map")
    (start, size), space = FIELDS[ins.mods[2]], next(mod.partition("::")[0] for mod in ins.mods[3:])
    ordinal = int(ins.operands[1], 0) if len(ins.operands) == 3 else 0
    where, value = address(program, ins.operands[0]), reader(program, ins.operands[-1], f"b{8 * size}")

    def execute(s, m):
        raw, at = reach(s, ins, space, where(s) + start + size * ordinal, size, m, "write")
        data = np.ascontiguousarray(chosen(np.broadcast_to(value(s), s.n), m)).view(np.uint8).reshape(-1, size)
        raw[at[:, None] + np.arange(size)] = data

    return execute


def publish_map(ins: Instruction, program: Program):
    to, source = address(program, ins.operands[0]), address(program, ins.operands[1])

    def execute(s, m):
        one = (np.ones(s.n, bool) if m is None else m) & (s.lane == 0)  # a warp copies once
        for i in range(0, 128, 16):
            raw, at = reach(s, ins, "shared", source(s) + i, 16, one, "read")
            data = raw[at[:, None] + np.arange(16)]
            raw, at = reach(s, ins, "global", to(s) + i, 16, one, "write")
            raw[at[:, None] + np.arange(16)] = data

    return execute
