"""Matrix instructions of a warp, mma and ldmatrix, and what all share: fragments in registers, matrices by descriptors.

Products are exact and summed in float64, and the result is rounded once to the accumulator's type. Hardware aligns the
products of one instruction and truncates; its results differ in the last bits of float32.
"""

import re

import numpy as np

from ptxemu.fault import Fault, Unknown
from ptxemu.formats import DTYPE, U, from_bf16, from_fp8
from ptxemu.operands import address, reader, untyped, writer
from ptxemu.parse import Instruction, Program, bits, found, split
from ptxemu.table import instruction

LANE = np.arange(32)
POISON = np.uint32(0x7FC0DEAD)  # in registers whose results are in flight
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
        rows = lanes.reshape(-1, 32)[:, : 8 * count]
        if load:
            at = row_access(s, ins, addr, rows, "read")
        else:
            pairs = np.stack([np.broadcast_to(read(s), s.n)[lanes].reshape(-1, 32) for read in reads], 1)
            x = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
            x = np.ascontiguousarray(x.swapaxes(2, 3) if transpose else x)
            at = row_access(s, ins, addr, rows, "write", lambda: x.view(np.uint8).reshape(-1, 16))
        half = s.batch.shared.view(np.uint16)
        index = (at // 2).reshape(-1, count, 8)[..., None] + np.arange(8)
        if load:
            x = half[index]
            x = x.swapaxes(2, 3) if transpose else x
            pairs = np.ascontiguousarray(x).view(np.uint32).reshape(-1, count, 32)
            for j, write in enumerate(writes):
                write(s, spread(s, pairs[:, j], m), m)
        else:
            half[index] = x

    return execute


def spread(s, rows: np.ndarray, m) -> np.ndarray:
    """[warps that take part, 32] to [lanes]."""
    if m is None:
        return np.ascontiguousarray(rows).reshape(-1)
    full = np.zeros(s.n, rows.dtype)
    full[m] = rows.reshape(-1)
    return full


def row_access(s, ins, addr: np.ndarray, lanes: np.ndarray, kind: str, values=None) -> np.ndarray:
    """Check and record rows of 16 bytes, [warps, rows]; returns their places in the flat shared memory."""
    if (addr & 15).any():
        raise Fault("misaligned", "a matrix row in shared memory is not aligned to 16 bytes")
    if (addr < 0).any() or (addr + 16 > s.batch.shared_bytes).any():
        raise Fault("out of bounds", f"shared memory has {s.batch.shared_bytes} bytes, matrix row at {int(addr.max())}")
    s.launch.profile.count_rows(ins, addr, kind)
    at = addr + s.shared_base[lanes]
    if s.batch.shadow is not None:
        warp, flat = s.warp[lanes].reshape(-1), at.reshape(-1)
        if kind == "read":
            s.batch.shadow.read(warp, flat, 16)
        else:
            s.batch.shadow.write(warp, flat, 16, values)
    return at


def fragment(kind: str, columns: int, per: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each element of an operand in registers, [registers, 32 lanes, elements of a register].

    A (16 rows): register i holds rows GROUP + 8·(i mod 2), columns from 4·per·(i div 2). B is a transpose, of 8 rows.
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
    m16, n8, depth = map(int, found(re.search(r"m(\d+)n(\d+)k(\d+)", ".".join(ins.mods))).groups())
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
    """Rows and columns of 32-bit accumulators, [registers, 32, 1]; register 2j + h: 2·QUAD + h, GROUP + 8·(j mod 2)."""
    i = np.arange(2 * pairs)[:, None, None]
    row, column = np.broadcast_arrays(GROUP[:, None] + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * QUAD[:, None] + i % 2)
    return row, column


def described(ins: Instruction, d: np.ndarray, rows, depth: int, element: int, trans: int) -> np.ndarray:
    """[n, rows, depth] places in shared memory of matrices that descriptors name: start, two offsets, swizzle.

    Rows lie along lines of 128, 64 or 32 bytes, or across them (`trans`); eight lines repeat the swizzle.
    """
    mode, d = d >> np.uint64(61), d.astype(np.int64)[:, None, None]
    start, leading, stride = (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4
    if (mode != mode[0]).any() or int(mode[0]) not in (0, 2, 4, 6):
        raise Unknown(f"swizzle {int(mode[0])} of a matrix in shared memory, {ins}")
    span = {0: 16, 2: 128, 4: 64, 6: 32}[int(mode[0])]
    i, k = np.broadcast_to(rows, (len(d), np.shape(rows)[-1]))[..., None], np.arange(depth)[None, None]
    line, along = (k, i * element) if trans else (i, k * element)
    if trans and span == 16:
        stride, leading = leading, stride
    at = start + line // 8 * stride + line % 8 * span + along // span * leading + along % span
    return at ^ (at >> 3 & (span - 16))


def row_heads(s, ins, lane, at: np.ndarray, element: int, trans: int, readers=slice(None)) -> np.ndarray:
    """[n, pieces] of 16 bytes that hold the elements, in the flat shared memory; checks bounds and counts."""
    if (at + element > s.batch.shared_bytes).any():
        text = f"a matrix is read at shared byte {int(at.max())} of {s.batch.shared_bytes}"
        raise Fault("out of bounds", text)
    chunk = 16 // element  # eight pieces of 16 bytes are a matrix
    heads = (at[:, ::chunk] if trans else at[:, :, ::chunk].swapaxes(1, 2)).reshape(len(at), -1)
    s.launch.profile.count_rows(ins, heads[readers], "read")
    return heads + s.shared_base[lane][:, None]


def elements(s, lane, at: np.ndarray, element: int, type: str) -> np.ndarray:
    raw = s.batch.shared.view(U[8 * element])[(at + s.shared_base[lane][:, None, None]) // element]
    return decode(raw, type).astype(np.float64)
