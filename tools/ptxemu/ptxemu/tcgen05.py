"""tcgen05: tensor memory, and the products of the tensor cores of sm_100, which read and write it.

An address is lane << 16 | column. A warp reaches the 32 lanes that belong to its place in its group of four. Products
are asynchronous: one thread starts them, in order, and a commit makes an mbarrier tell when they are done. Arithmetic
as in `tensor_core.py`.
"""

import re

import numpy as np

from ptxemu.fault import Fault, Unknown
from ptxemu.mbarrier import advance, of, places
from ptxemu.memory import reach
from ptxemu.operands import address, reader, shared_address, untyped
from ptxemu.parse import Instruction, Program, split
from ptxemu.table import instruction
from ptxemu.tensor_core import LANE, POISON, decode, described, elements, row_heads
from ptxemu.tensor_memory import COLUMNS, LANES, warps_of

TYPES = {  # of operands, by the kind of product and the number in the instruction descriptor
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": {0: "e4m3", 1: "e5m2"},
    "i8": {0: "u8", 1: "s8"},
}
RESULTS = {0: "f16", 1: "f32", 2: "s32"}


@instruction("tcgen05")
def tensor_memory(ins: Instruction, program: Program):
    kind = ins.mods[0]
    if "cta_group::2" in ins.mods:
        raise Unknown("pairs of blocks")
    if kind == "alloc":
        return allocate(ins, program)
    if kind == "dealloc":
        return deallocate(ins, program)
    if kind == "relinquish_alloc_permit":

        def close(s, m):
            s.batch.tensor.closed[s.block_in_batch[32 * warps_of(s, m)]] = True

        return close
    if kind in ("ld", "st"):
        return Transfer(ins, program)
    if kind == "wait::ld":
        return lambda s, m: s.tensor.wait_loads(s, m)
    if kind == "wait::st":
        return lambda s, m: s.tensor.wait_stores(s, m)
    if kind == "mma":
        return Product(ins, program)
    if kind == "commit":
        return commit(ins, program)
    if kind.startswith("fence::"):  # orders what barriers order here
        return lambda s, m: None
    raise Unknown("tensor memory")


def allocate(ins: Instruction, program: Program):
    where, count = address(program, ins.operands[0]), reader(program, ins.operands[1], "u32")
    space = "shared" if any("shared" in mod for mod in ins.mods) else ""

    def execute(s, m):
        tensor, result = s.batch.tensor, np.zeros(s.n, np.uint32)
        for warp in warps_of(s, m):
            block, n = int(s.block_in_batch[32 * warp]), int(np.broadcast_to(count(s), s.n)[32 * warp])
            if n not in (32, 64, 128, 256, 512) or tensor.closed[block]:
                raise Fault("operand", f"{n} columns of tensor memory cannot be allocated, or no longer")
            free = [c for c in range(0, COLUMNS, n) if not tensor.owned[block, c : c + n].any()]
            if not free:
                raise Fault("deadlock", f"no {n} columns of tensor memory are free: the allocation would wait")
            tensor.owned[block, free[0] : free[0] + n] = True
            result[32 * warp] = free[0]
        one = (s.lane == 0) & (np.ones(s.n, bool) if m is None else m)
        raw, at = reach(s, ins, space, where(s), 4, one, "write", lambda: result[one].view(np.uint8).reshape(-1, 4))
        raw.view(np.uint32)[at // 4] = result[one]

    return execute


def deallocate(ins: Instruction, program: Program):
    base, count = reader(program, ins.operands[0], "u32"), reader(program, ins.operands[1], "u32")

    def execute(s, m):
        tensor = s.batch.tensor
        for warp in warps_of(s, m):
            block, start, n = (
                s.block_in_batch[32 * warp],
                *(int(np.broadcast_to(read(s), s.n)[32 * warp]) for read in (base, count)),
            )
            columns = start + np.arange(n)
            at = tensor.place(block, np.arange(LANES)[:, None], columns).reshape(-1)
            if tensor.shadow is not None:
                tensor.shadow.write(np.full(len(at), s.warp[32 * warp]), 4 * at, 4)
                tensor.shadow.writer[at] = -1
            tensor.owned[block, columns] = False

    return execute


def pattern(shape: str, count: int, half: int) -> tuple[np.ndarray, ...]:
    """Lane and column, from those of the address, of each register of each thread: [registers, 32]."""
    j, t = np.arange(count)[:, None], LANE
    return {
        "32x32b": lambda: np.broadcast_arrays(t, j),
        "16x32bx2": lambda: np.broadcast_arrays(t % 16, j + t // 16 * half),
        "16x64b": lambda: np.broadcast_arrays(t % 2 * 8 + t // 4, 2 * j + t // 2 % 2),
        "16x128b": lambda: np.broadcast_arrays(t // 4 + j % 2 * 8, j // 2 * 4 + t % 4),
        "16x256b": lambda: np.broadcast_arrays(t // 4 + j // 2 % 2 * 8, j // 4 * 8 + t % 4 * 2 + j % 2),
    }[shape]()


class Transfer:
    """tcgen05.ld and tcgen05.st: registers of a warp from and to its lanes."""

    def __init__(self, ins: Instruction, program: Program):
        self.load = ins.mods[0] == "ld"
        m = re.search(r"(16x64b|16x128b|16x256b|32x32b|16x32bx2)\.x(\d+)\.b32$", ".".join(ins.mods))
        if not m:
            raise Unknown("transfer of tensor memory")
        where, *rest = ins.operands[1:] if self.load else ins.operands
        names = split((ins.operands[0] if self.load else rest.pop()).strip("{}"))
        assert len(names) == int(m[2]) * {"16x128b": 2, "16x256b": 4}.get(m[1], 1), ins
        self.base, self.tall = address(program, where), m[1] == "32x32b"
        self.lane, self.column = pattern(m[1], len(names), int(rest[0], 0) if rest else 0)
        self.registers = [program.registers[name][0] for name in names] if self.load else []
        self.reads = [] if self.load else [reader(program, name, "b32") for name in names]

    def __call__(self, s, m) -> None:
        warps, tensor = warps_of(s, m), s.batch.tensor
        base = self.base(s)[32 * warps]
        lane, column = base >> 16, base & 0xFFFF
        own = 32 * (s.warp[32 * warps] % s.batch.warps_each % 4)
        if ((lane != own) & ((lane != own + 16) | self.tall)).any():
            raise Fault("out of bounds", f"a warp may not reach lane {int(lane[0])} of tensor memory in this shape")
        block = s.block_in_batch[32 * warps]
        block, lane, column = (x[:, None, None] for x in (block, lane, column))
        at = tensor.place(block, lane + self.lane, column + self.column)
        who = np.broadcast_to(s.warp[32 * warps, None, None], at.shape).reshape(-1)
        (self.read if self.load else self.write)(s, m, warps, at, who)

    def read(self, s, m, warps: np.ndarray, at: np.ndarray, who: np.ndarray) -> None:
        tensor = s.batch.tensor
        if tensor.shadow is not None:
            tensor.shadow.read(who, 4 * at.reshape(-1), 4)
            tensor.shadow.hold(at.reshape(-1))
        s.tensor.loads.append((warps, self.registers, tensor.cells[at], at))
        for index in self.registers:
            s.R[index] = np.full(s.n, POISON) if m is None else np.where(m, POISON, s.R[index])

    def write(self, s, m, warps: np.ndarray, at: np.ndarray, who: np.ndarray) -> None:
        tensor = s.batch.tensor
        values = np.stack([np.broadcast_to(read(s), s.n).reshape(-1, 32)[warps] for read in self.reads], 1)
        if tensor.shadow is not None:
            raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4)
            tensor.shadow.write(who, 4 * at.reshape(-1), 4, lambda: raw, landing=True)
            s.tensor.stores.append((warps, at))
        tensor.cells[at] = values


def commit(ins: Instruction, program: Program):
    """The mbarrier takes one arrival when the products that the thread has started are done."""
    if any("multicast" in mod for mod in ins.mods):
        raise Unknown("clusters of blocks")
    where = shared_address(ins, program, ins.operands[0])

    def execute(s, m):
        tensor = s.batch.tensor
        for lane in np.arange(s.n) if m is None else np.flatnonzero(m):
            barrier = of(s, int(places(s, where(s), np.arange(s.n) == lane)[0]))
            done = tensor.started.get(int(s.warp[lane]), 0)
            barrier.gathering[tensor.clocks.warps] = max(done, barrier.gathering[tensor.clocks.warps])
            barrier.pending -= 1
            advance(s, barrier)

    return execute


class Product:
    """tcgen05.mma: D = A B (+ D); A and B in shared memory, A may be in tensor memory, D is.

    The instruction descriptor: types in bits 4, 7, 10; negations in 13, 14; transposes in 15, 16; N / 8 in 17, M / 16
    in 24.
    """

    def __init__(self, ins: Instruction, program: Program):
        kind = next((mod[6:] for mod in ins.mods if mod.startswith("kind::")), "")
        if kind not in TYPES or {"sp", "ws", "block_scale", "ashift"} & set(ins.mods) or len(ins.operands) != 5:
            raise Unknown("product in tensor memory")
        d, a, b, shape, keep = ins.operands
        self.ins, self.kind, self.d = ins, kind, address(program, d)
        self.a_inside = a[0] == "["
        self.a = address(program, a) if self.a_inside else reader(program, a, "b64")
        self.b, self.shape = reader(program, b, "b64"), reader(program, shape, "u32")
        self.keep = reader(program, keep, "pred")

    def __call__(self, s, m) -> None:
        shape = np.broadcast_to(self.shape(s), s.n)
        lanes = np.arange(s.n) if m is None else np.flatnonzero(m)
        while len(lanes):  # those of one shape together, of each block one
            same = np.flatnonzero(shape[lanes] == shape[lanes[0]])
            first = same[np.unique(s.block_in_batch[lanes[same]], return_index=True)[1]]
            self.multiply(s, lanes[first], int(shape[lanes[0]]))
            lanes = np.delete(lanes, first)

    def multiply(self, s, lanes: np.ndarray, shape: int) -> None:
        types = TYPES[self.kind]
        td, ta, tb = RESULTS.get(shape >> 4 & 3), types.get(shape >> 7 & 7), types.get(shape >> 10 & 7)
        rows, columns = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
        if shape & 4 or td is None or ta is None or tb is None or rows not in (64, 128) or not columns:
            raise Unknown(f"product in tensor memory with descriptor {shape:#x}, {self.ins}")
        element = {"f16": 2, "tf32": 4}.get(self.kind, 1)
        depth, tensor = 32 // element, s.batch.tensor
        tensor.tickets += 1
        agent = (tensor.clocks.warps, tensor.tickets)
        b = self.shared(s, lanes, self.b, columns, depth, element, shape >> 16 & 1, tb, agent)
        if self.a_inside:
            at = self.cells(s, lanes, self.a(s), rows, depth * element // 4)
            self.record(s, lanes, at, agent, True)
            raw = np.ascontiguousarray(tensor.cells[at]).view(f"u{element}")
            a = decode(raw, ta).astype(np.float64)
        else:
            a = self.shared(s, lanes, self.a, rows, depth, element, shape >> 15 & 1, ta, agent)
        product = a @ b.swapaxes(1, 2) * (-1 if (shape >> 13 ^ shape >> 14) & 1 else 1)
        at = self.cells(s, lanes, self.d(s), rows, columns)
        keep = np.broadcast_to(self.keep(s), s.n)[lanes]
        if keep.any():
            self.record(s, lanes[keep], at[keep], agent, True)
            old = tensor.cells[at[keep]]
            product[keep] += decode(old.astype(np.uint16) if td == "f16" else old, td)
        self.record(s, lanes, at, agent, False)
        tensor.cells[at] = untyped(product.astype({"f16": "f2", "f32": "f4", "s32": "i4"}[td]), td)
        tensor.started |= dict.fromkeys(map(int, s.warp[lanes]), tensor.tickets)
        s.launch.profile.flops[f"{ta} mma"] += 2 * rows * columns * depth * len(lanes)

    def shared(self, s, lanes, descriptor, rows, depth, element, trans, type, agent) -> np.ndarray:
        """[n, rows, depth] of an operand in shared memory."""
        d = np.broadcast_to(descriptor(s), s.n)[lanes]
        at = described(self.ins, d, np.arange(rows)[None], depth, element, trans)
        heads = row_heads(s, self.ins, lanes, at, element, trans)
        if s.batch.shadow is not None:
            warp = np.repeat(s.warp[lanes], heads.shape[1])
            s.batch.shadow.read(warp, heads.reshape(-1), 16, proxy=True, agent=agent)
        return elements(s, lanes, at, element, type)

    def cells(self, s, lanes, base: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """[n, rows, columns] of a matrix in tensor memory: 64 rows lie in the first half of each warp's lanes."""
        base, row = base[lanes, None, None], np.arange(rows)[:, None]
        lane = row if rows == LANES else row // 16 * 32 + row % 16
        return s.batch.tensor.place(
            s.block_in_batch[lanes, None, None], (base >> 16) + lane, (base & 0xFFFF) + np.arange(columns)
        )

    def record(self, s, lanes, at: np.ndarray, agent, read: bool) -> None:
        shadow = s.batch.tensor.shadow
        if shadow is not None:
            warp = np.repeat(s.warp[lanes], at[0].size)
            (shadow.read if read else shadow.write)(warp, 4 * at.reshape(-1), 4, agent=agent)
