"""Instructions that lanes of a warp or warps of a block execute together: barriers, shuffles, votes; and traps."""

import warnings

import numpy as np

from ptxemu.fault import Fault, Unknown
from ptxemu.formats import DTYPE
from ptxemu.operands import alu, reader, writer
from ptxemu.parse import Instruction, Program
from ptxemu.table import instruction


class Barrier:
    """bar.sync a{, b}; bar.arrive a, b."""

    def __init__(self, ins: Instruction, program: Program):
        kind = next((mod for mod in ins.mods if mod in ("sync", "arrive")), None)
        if kind is None or "red" in ins.mods:
            raise Unknown("barrier with a reduction")
        self.wait = kind == "sync"
        texts = [*(ins.operands or ["0"]), "0"]
        self.number, self.count = (reader(program, text, "u32") for text in texts[:2])

    def all_threads(self, s) -> bool:
        """One barrier of the whole block: if every lane is here, it opens at once."""
        count = self.count(s)
        return self.wait and count.ndim == 0 and int(count) in (0, s.launch.threads) and self.number(s).ndim == 0

    def __call__(self, s, m, step, pc) -> None:
        lanes = s.index[m]
        number, count = (np.broadcast_to(read(s), s.n)[m] for read in (self.number, self.count))
        s.batch.arrive(s, step, lanes, number, count, self.wait)


@instruction("bar", "barrier")
def barrier(ins: Instruction, program: Program):
    if ins.mods[0] == "warp":  # the lanes of the mask have met: see `Warps.collective`
        return lambda s, m: None
    if ins.mods[0] == "cluster":
        raise Unknown("clusters of blocks")
    return Barrier(ins, program)


@instruction("shfl")
def shuffle(ins: Instruction, program: Program):
    kind = ins.mods[1]
    first, _, second = ins.operands[0].partition("|")
    write, write_valid = writer(program, first, "b32"), writer(program, second or "_", "pred")
    value = reader(program, ins.operands[1], "b32")
    b, c, mask = (reader(program, text, "u32") for text in ins.operands[2:5])

    def execute(s, m):
        offset, limits, lane = b(s).astype(np.int64) & 31, c(s).astype(np.int64), s.lane
        segment = limits >> 8 & 31
        low, high = lane & segment, (lane & segment) | (limits & 31 & ~segment)
        if kind == "up":
            source = lane - offset
            valid = source >= high
        else:
            source = {"down": lane + offset, "bfly": lane ^ offset, "idx": low | (offset & ~segment)}[kind]
            valid = source <= high
        source = np.where(valid, source, lane)
        named = np.broadcast_to(mask(s), s.n) >> source.astype(np.uint32) & 1 != 0
        if not (named if m is None else named | ~m).all():
            raise Fault("shuffle", "a lane reads from a lane that its mask does not name")
        if m is not None and not m[(s.rows + source)[m]].all():
            raise Fault("shuffle", "a lane reads from a lane that does not take part")
        write(s, np.broadcast_to(value(s), s.n)[s.rows + source], m)
        write_valid(s, valid, m)

    return execute


def by_warp(s, x: np.ndarray | np.bool, m) -> np.ndarray:
    """[lanes] to [warps, 32], inactive lanes False."""
    x = np.broadcast_to(x, s.n)
    return (x if m is None else x & m).reshape(-1, 32)


WEIGHTS = (np.uint64(1) << np.arange(32, dtype=np.uint64)).astype(np.uint64)


@instruction("vote")
def vote(ins: Instruction, program: Program):
    kind = ins.mods[1]
    write = writer(program, ins.operands[0], ins.type)
    p = reader(program, ins.operands[1], "pred")

    def execute(s, m):
        yes, here = by_warp(s, p(s), m), by_warp(s, np.True_, m)
        if kind == "ballot":
            result = (yes * WEIGHTS).sum(1).astype(np.uint32)
        else:
            count, total = yes.sum(1), here.sum(1)
            result = {"any": count > 0, "all": count == total, "uni": (count == 0) | (count == total)}[kind]
        write(s, np.repeat(result, 32), m)

    return execute


@instruction("activemask")
def active_mask(ins: Instruction, program: Program):
    write = writer(program, ins.operands[0], "b32")

    def execute(s, m):
        write(s, np.repeat((by_warp(s, np.True_, m) * WEIGHTS).sum(1).astype(np.uint32), 32), m)

    return execute


@instruction("match")
def match(ins: Instruction, program: Program):
    if ins.mods[0] != "any":
        raise Unknown("match.all")
    write, value = writer(program, ins.operands[0], "b32"), reader(program, ins.operands[1], ins.type)

    def execute(s, m):
        v, here = np.broadcast_to(value(s), s.n).reshape(-1, 32), by_warp(s, np.True_, m)
        same = (v[:, :, None] == v[:, None, :]) & here[:, None, :]
        write(s, (same * WEIGHTS).sum(2).astype(np.uint32).reshape(-1), m)

    return execute


@instruction("redux")
def reduce_warp(ins: Instruction, program: Program):
    kind, type = ins.mods[1], ins.type
    write, value = writer(program, ins.operands[0], type), reader(program, ins.operands[1], type)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    function["xor"] = np.bitwise_xor
    if type == "f32" and "NaN" not in ins.mods:
        function |= {"min": np.fmin, "max": np.fmax}

    def execute(s, m):
        v = np.broadcast_to(value(s), s.n).reshape(-1, 32)
        here = by_warp(s, np.True_, m)
        first = v[np.arange(len(v)), here.argmax(1)]
        total = first
        for lane in range(32):
            new = function[kind](total, v[:, lane])
            use = here[:, lane] & (here.argmax(1) != lane)
            total = np.where(use, new, total)
        write(s, np.repeat(total.astype(DTYPE[type]), 32), m)

    return execute


@instruction("elect")
def elect(ins: Instruction, program: Program):
    first, _, second = ins.operands[0].partition("|")
    write, write_chosen = writer(program, first, "b32"), writer(program, second, "pred")

    def execute(s, m):
        leader = np.repeat(by_warp(s, np.True_, m).argmax(1), 32)
        write(s, leader.astype(np.uint32), m)
        write_chosen(s, leader == s.lane, m)

    return execute


@instruction("trap")
def trap(ins: Instruction, program: Program):
    def execute(s, m):
        raise Fault("trap", "the kernel trapped")

    return execute


@instruction("call")
def call(ins: Instruction, program: Program):
    """Only printf, which is ignored with a warning, and failed assertions of the device."""
    name = next((text for text in ins.operands if text[0] != "("), "")

    def execute(s, m):
        if name == "__assertfail":
            raise Fault("trap", "a device assertion failed")
        warnings.warn(f"{s.program.name}: printf is not emulated, its output is lost", stacklevel=2)

    if name not in ("vprintf", "__assertfail"):
        raise Unknown(f"call of {name}")
    return execute


@instruction("fence", "membar")
def fence(ins: Instruction, program: Program):
    """Values are always in order here; `fence.proxy.async` orders ordinary writes before asynchronous reads."""
    if "proxy" not in ins.mods or not any("async" in mod for mod in ins.mods):
        return lambda s, m: None

    def execute(s, m):
        s.batch.clocks.fence(np.unique(s.warp if m is None else s.warp[m]))

    return execute


@instruction(
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "setmaxnreg",
    "nanosleep",
    "discard",
    "applypriority",
    "createpolicy",
    "pmevent",
)
def ignored(ins: Instruction, program: Program):
    """No meaning for values: one instruction is done before the next begins. The race detector has its own rules."""
    if ins.name == "createpolicy":
        return alu(ins, program, "b64", [], lambda: np.zeros((), np.uint64))
    return lambda s, m: None
