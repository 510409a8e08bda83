"""An instruction made ready to run: its guard, its closure, how it moves the program counter, what it counts."""

from typing import Any

# these fill the table
from ptxemu import arithmetic, bitwise, control, convert, copies, loads, tcgen05, tensor_core, wgmma  # noqa: F401
from ptxemu.fault import Unknown
from ptxemu.mbarrier import Wait
from ptxemu.operands import reader
from ptxemu.parse import Instruction, Program, bits
from ptxemu.table import TABLE, types

WHOLE_WARP = {"bar", "barrier", "mma", "ldmatrix", "stmatrix", "wgmma", "elect"}  # wait for all lanes of the warp
BY_MASK = {"shfl", "vote", "match", "redux"}  # wait for the lanes named by their last operand


class Step:
    """An instruction made ready: its guard, its closure, and how it moves the program counter."""

    def __init__(self, ins: Instruction, program: Program):
        self.ins = ins
        self.guard = (program.registers[ins.guard[0]][0], ins.guard[1]) if ins.guard else None
        self.execute: Any = None
        self.jump, self.stops, self.flops = None, ins.name in ("ret", "exit"), flops(ins)
        self.mask = None
        if ins.name == "bra":
            self.jump = program.labels[ins.operands[-1]]
        elif not self.stops:
            if ins.name not in TABLE:
                raise Unknown(f"unknown instruction, {ins}")
            try:
                types(ins)
                self.execute = TABLE[ins.name](ins, program)
            except Unknown as e:
                raise Unknown(f"{e}, {ins}") from None
        self.ready, self.polls = None, False
        if isinstance(self.execute, Wait):
            self.ready, self.polls = self.execute.ready, self.execute.polls
        self.barrier = ins.name in ("bar", "barrier") and ins.mods[0] != "warp"
        self.whole = ins.name in WHOLE_WARP or "aligned" in ins.mods
        if ins.name in BY_MASK or (ins.name == "bar" and ins.mods[0] == "warp"):
            self.mask, self.whole = reader(program, ins.operands[-1], "u32"), False


def flops(ins: Instruction) -> tuple[str, int] | None:
    """What a lane adds to the counters of operations: tensor cores count themselves."""
    if (
        ins.name in ("add", "sub", "mul", "fma", "div", "mad")
        and ins.mods
        and ins.type[0] in "fb"
        and ins.type[:2] != "b3"
    ):
        half, pair = (ins.type[:-2], 2) if ins.type.endswith("x2") else (ins.type, 1)
        return half, pair * (2 if ins.name in ("fma", "mad") else 1)
    return None


def prepare(program: Program) -> list[Step]:
    return [Step(ins, program) for ins in program.code]


def granule(program: Program, space: str) -> int:
    """The narrowest access to a space, at most four bytes."""
    sizes = [4]
    for ins in program.code:
        if ins.name in ("ld", "st", "atom", "red") and (
            space in "".join(ins.mods) or not any("shared" in m or "global" in m for m in ins.mods)
        ):
            sizes.append(max(bits(ins.type) // 8, 1))
    return min(sizes)
