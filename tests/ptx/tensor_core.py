"""Matrix instructions: fragments of mma and ldmatrix, wgmma with its descriptors.

Products are exact and summed in float64, and the result is rounded once to the accumulator's type. Hardware aligns the products of
one instruction and truncates; its results differ in the last bits of float32.
"""

import re

import numpy as np

from ptx.arithmetic import instruction
from ptx.fault import Fault, Unknown
from ptx.formats import DTYPE, U, from_bf16, from_fp8
from ptx.operands import address, reader, typed, untyped, writer
from ptx.parse import Instruction, Program, bits, split

LANE = np.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4  # row and column pair of a lane in an 8 × 8 matrix


def decode(raw: np.ndarray, type: str) -> np.ndarray:
    """Elements of an operand as exact numbers."""
    if type == "bf16":
        return from_bf16(raw)
    if type == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)
    if type in ("e4m3", "e5m2"):
        return from_fp8(raw, type)
    return raw.view(DTYPE[type])


@instruction("ldmatrix", "stmatrix")
def matrix_rows(ins: Instruction, program: Program):
    """8 × 8 matrices of 16-bit elements: lane 8j + i gives the address of row i of matrix j."""
    load = ins.name == "ldmatrix"
    if "m8n8" not in ins.mods or ins.type != "b16":
        raise Unknown("matrix shape")
    regs, place = (0, 1) if load else (1, 0)
    names = split(ins.operands[regs].strip("{}"))
    where, count, transpose = address(program, ins.operands[place]), len(names), "trans" in ins.mods
    writes = [writer(program, name, "b32") for name in names] if load else []
    reads = [] if load else [reader(program, name, "b32") for name in names]

    def execute(s, m):
        lanes = np.arange(s.n) if m is None else np.flatnonzero(m)
        addr = where(s)[lanes].reshape(-1, 32)[:, : 8 * count]
        at = row_access(s, ins, addr, lanes.reshape(-1, 32)[:, : 8 * count], "read" if load else "write")
        half = s.batch.shared.view(np.uint16)
        index = (at // 2).reshape(-1, count, 8)[..., None] + np.arange(8)
        if load:
            x = half[index]
            x = x.swapaxes(2, 3) if transpose else x
            pairs = np.ascontiguousarray(x).view(np.uint32).reshape(-1, count, 32)
            for j, write in enumerate(writes):
                write(s, spread(s, pairs[:, j], m), m)
        else:
            pairs = np.stack([np.broadcast_to(read(s), s.n)[lanes].reshape(-1, 32) for read in reads], 1)
            x = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
            half[index] = x.swapaxes(2, 3) if transpose else x

    return execute


def spread(s, rows: np.ndarray, m) -> np.ndarray:
    """[warps that take part, 32] to [lanes]."""
    if m is None:
        return np.ascontiguousarray(rows).reshape(-1)
    full = np.zeros(s.n, rows.dtype)
    full[m] = rows.reshape(-1)
    return full


def row_access(s, ins, addr: np.ndarray, lanes: np.ndarray, kind: str) -> np.ndarray:
    """Check and record rows of 16 bytes, [warps, rows]; returns their places in the flat shared memory."""
    if (addr & 15).any():
        raise Fault("misaligned", "a matrix row in shared memory is not aligned to 16 bytes")
    if (addr < 0).any() or (addr + 16 > s.batch.shared_bytes).any():
        raise Fault("out of bounds", f"shared memory has {s.batch.shared_bytes} bytes, matrix row at {int(addr.max())}")
    s.launch.profile.count_rows(ins, addr, kind)
    at = addr + s.shared_base[lanes]
    if s.batch.shadow is not None:
        (s.batch.shadow.read if kind == "read" else s.batch.shadow.write)(s.warp[lanes].reshape(-1), at.reshape(-1), 16)
    return at


def fragment(kind: str, columns: int, per: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each element of an operand in registers, [registers, 32 lanes, elements of a register].

    A (16 rows): register i holds rows GROUP + 8·(i mod 2), columns from 4·per·(i div 2). B is its transpose with 8 rows.
    """
    chunk = 4 * per
    count = (2 if kind == "a" else 1) * columns // chunk
    i = np.arange(count)[:, None, None]
    element = np.arange(per)
    down = i % 2 if kind == "a" else 0 * i
    across = i // 2 if kind == "a" else i
    row, column = np.broadcast_arrays(
        GROUP[None, :, None] + 8 * down, QUAD[None, :, None] * per + element + chunk * across
    )
    return row, column


def gather(s, reads, type: str, lanes: np.ndarray, place, shape) -> np.ndarray:
    """Registers of the warps to matrices [warps, rows, columns] in float64 (int64 for integers)."""
    raw = np.stack([np.broadcast_to(read(s), s.n)[lanes].reshape(-1, 32) for read in reads], 1)
    each = 32 if type == "tf32" else bits(type)
    values = decode(np.ascontiguousarray(raw).view(U[each]).reshape(raw.shape[0], len(reads), 32, 32 // each), type)
    out = np.zeros((len(raw), *shape), np.int64 if values.dtype.kind in "iu" else np.float64)
    out[:, place[0], place[1]] = values
    return out


@instruction("mma")
def multiply_fragments(ins: Instruction, program: Program):
    """mma.sync m16n8kK: D = A B + C."""
    m16, n8, depth = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", ".".join(ins.mods)).groups())
    td, ta, tb, tc = ins.mods[-4:]
    if (m16, n8) != (16, 8) or "sp" in ins.mods[0] or td not in ("f32", "f16", "s32") or "col" not in ins.mods:
        raise Unknown("mma shape or type")
    a, b, c = ([reader(program, name, "b32") for name in split(text[1:-1])] for text in ins.operands[1:4])
    writes = [writer(program, name, "b32") for name in split(ins.operands[0][1:-1])]
    pa = fragment("a", depth, 32 // (32 if ta == "tf32" else bits(ta)))
    pb = fragment("b", depth, 32 // (32 if tb == "tf32" else bits(tb)))[::-1]
    pc, pd = (fragment("a", 8, 32 // bits(t)) if bits(t) == 16 else accumulator(2) for t in (tc, td))
    label, work = f"{ta} mma", 2 * 16 * 8 * depth

    def execute(s, m):
        lanes = np.arange(s.n) if m is None else np.flatnonzero(m)
        product = gather(s, a, ta, lanes, pa, (16, depth)) @ gather(s, b, tb, lanes, pb, (depth, 8))
        total = product + gather(s, c, tc, lanes, pc, (16, 8))
        if td == "s32" and "satfinite" in ins.mods:
            total = np.clip(total, -(1 << 31), (1 << 31) - 1)
        raw = untyped(total[:, pd[0], pd[1]].astype(DTYPE[td]), td)
        raw = np.ascontiguousarray(raw).view(np.uint32)[..., 0]
        for i, write in enumerate(writes):
            write(s, spread(s, raw[:, i], m), m)
        s.launch.profile.flops[label] += work * (len(lanes) // 32)

    return execute


def accumulator(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of 32-bit accumulators, [registers, 32, 1]: register 2j + h is column 2·QUAD + h, row GROUP + 8·(j mod 2)."""
    i = np.arange(2 * pairs)[:, None, None]
    row, column = np.broadcast_arrays(GROUP[:, None] + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * QUAD[:, None] + i % 2)
    return row, column


class WgmmaQueue:
    """Results of wgmma that are not there yet: by register, and which shared memory is still being read."""

    def __init__(self):
        self.results: dict[int, np.ndarray] = {}
        self.open: list = []
        self.groups: list[list] = []


@instruction("wgmma")
def warpgroup(ins: Instruction, program: Program):
    if ins.mods[0] == "fence":
        return lambda s, m: None
    if ins.mods[0] == "commit_group":

        def commit(s, m):
            s.wgmma.groups.append(s.wgmma.open)
            s.wgmma.open = []

        return commit
    if ins.mods[0] == "wait_group":
        left = int(ins.operands[0])
        return lambda s, m: wait_group(s, left)
    return WarpgroupProduct(ins, program)


def wait_group(s, left: int) -> None:
    queue = s.wgmma
    while len(queue.groups) > left:
        for held in queue.groups.pop(0):
            if s.batch.shadow is not None:
                for places in held:
                    s.batch.shadow.held[places] -= 1
    if not queue.groups and not queue.open:
        for index, value in queue.results.items():
            s.R[index] = value
        queue.results.clear()


class WarpgroupProduct:
    """wgmma.mma_async m64nNkK: four warps multiply 64 rows; operands in shared memory, A may be in registers."""

    def __init__(self, ins: Instruction, program: Program):
        _, self.n, self.k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", ".".join(ins.mods)).groups())
        self.ins, (self.td, self.ta, self.tb) = ins, ins.mods[-3:]
        self.element = 32 // self.k
        if self.td not in ("f32", "s32") or self.ta not in ("bf16", "f16", "tf32", "e4m3", "e5m2", "s8"):
            raise Unknown("wgmma type")
        names = split(ins.operands[0][1:-1])
        self.d = [program.registers[name][0] for name in names]
        in_registers = ins.operands[1][0] == "{"
        self.a = [reader(program, t, "b32") for t in split(ins.operands[1][1:-1])] if in_registers else None
        self.desc_a = None if in_registers else reader(program, ins.operands[1], "b64")
        self.desc_b, self.keep = reader(program, ins.operands[2], "b64"), reader(program, ins.operands[3], "pred")
        flags = [int(t) for t in ins.operands[4:]] + [1, 1][len(ins.operands[4:]) :]
        self.signs = flags[:2]
        self.trans_a, self.trans_b = (0, *flags[2:3], 0)[:2] if in_registers else (*flags[2:4], 0, 0)[:2]
        self.pa, self.pd = fragment("a", self.k, 4 // self.element), accumulator(len(names) // 2)

    def __call__(self, s, m) -> None:
        if m is not None or (s.n % 128 and s.n != 32):
            raise Fault("barrier", "wgmma in diverged warps")
        warps = s.n // 32
        held = []
        b = self.operand(s, s_first(self.desc_b(s), s, 32), np.arange(self.n), self.trans_b, self.tb, held)
        if self.a:
            a = gather(s, self.a, self.ta, np.arange(s.n), self.pa, (16, self.k))
        else:
            rows = 16 * (s.warp[::32] % s.batch.warps_each % 4)[:, None] + np.arange(16)
            a = self.operand(s, s_first(self.desc_a(s), s, 32), rows, self.trans_a, self.ta, held)
        product = (self.signs[0] * a) @ (self.signs[1] * b).swapaxes(1, 2)
        keep = np.broadcast_to(self.keep(s), s.n)
        values = product[:, self.pd[0][..., 0], self.pd[1][..., 0]].swapaxes(0, 1).reshape(len(self.d), s.n)
        poison = np.full(s.n, 0x7FC0DEAD, np.uint32)
        for index, value in zip(self.d, values, strict=True):
            old = typed(s.wgmma.results.get(index, s.R[index]), self.td)
            total = np.where(keep, old, 0).astype(value.dtype) + value
            s.wgmma.results[index] = untyped(total.astype(DTYPE[self.td]), self.td)
            s.R[index] = poison
        s.wgmma.open.append(held)
        s.launch.profile.flops[f"{self.ta} mma"] += 2 * 16 * self.n * self.k * warps

    def operand(self, s, desc: np.ndarray, rows: np.ndarray, trans: int, type: str, held: list) -> np.ndarray:
        """[warps, rows, K] elements that descriptors name: start, leading and stride offsets, swizzle of 128, 64 or 32 bytes."""
        d = desc.astype(np.int64)[:, None, None]
        start, leading, stride = (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4
        mode = int(desc[0] >> np.uint64(62))
        span = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
        if span == 16:
            raise Unknown("wgmma without swizzle")
        i, k = np.broadcast_to(rows, (len(desc), rows.shape[-1]))[..., None], np.arange(self.k)[None, None]
        per = span // self.element
        if trans:
            at = start + k // 8 * stride + k % 8 * span + i // per * leading + i % per * self.element
        else:
            at = start + i // 8 * stride + i % 8 * span + k * self.element
        at ^= at >> 3 & (span - 16)
        if (at + self.element > s.batch.shared_bytes).any():
            raise Fault(
                "out of bounds", f"wgmma reads shared memory at {int(at.max())} of {s.batch.shared_bytes} bytes"
            )
        at = at + s.shared_base[::32][:, None, None]
        if s.batch.shadow is not None:
            self.record(s, at, held)
        return decode(s.batch.shared.view(U[8 * self.element])[at // self.element], type).astype(np.float64)

    def record(self, s, at: np.ndarray, held: list) -> None:
        shadow = s.batch.shadow
        warp = np.broadcast_to(s.warp[::32][:, None, None], at.shape)
        size = max(self.element, shadow.granule)
        shadow.read(warp.reshape(-1), at.reshape(-1), size, proxy=True)
        places = np.unique(shadow.granules(at.reshape(-1), size))
        shadow.held[places] += 1
        held.append(places)


def s_first(x: np.ndarray, s, step: int) -> np.ndarray:
    """The value of the first lane of every warp."""
    return np.broadcast_to(x, s.n)[::step]
