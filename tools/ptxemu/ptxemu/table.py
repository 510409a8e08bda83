"""The table of instructions, and what most entries share.

`@instruction("name", ...)` registers a function that turns a parsed instruction into a closure `execute(s, m)`: `s` are
the running lanes, `m` the mask of those that take part (None: all). A new instruction is usually one call of `alu`.
"""

import re
from collections.abc import Callable

import numpy as np

from ptxemu.fault import Unknown
from ptxemu.formats import flush
from ptxemu.parse import Instruction

TABLE: dict[str, Callable] = {}
TYPE = re.compile(r"pred|[busf]\d+|bf16|[bfus]\d+x\d|bf16x2|tf32|e\dm\d(x\d)?")
MIXED = {  # may name more than one type
    *("add", "sub", "fma"),  # float32 with narrower operands
    *("cvt", "set", "slct", "dp4a", "mma", "wgmma", "tensormap"),
}
ROUNDINGS = ("rn", "rz", "rm", "rp")
CALCULATE = {"add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "sqrt", "rsqrt", "rcp", "ex2"}
CALCULATE |= {"lg2", "sin", "cos", "tanh"}
CALCULATE_MODS = {*ROUNDINGS, "ftz", "sat", "relu", "NaN", "approx", "full", "wide", "hi", "lo", "cc"}


def instruction(*names: str):
    def register(decode):
        for name in names:
            assert name not in TABLE, name
            TABLE[name] = decode
        return decode

    return register


def types(ins: Instruction) -> list[str]:
    """The types that an instruction names, in order."""
    found = [mod for mod in ins.mods if TYPE.fullmatch(mod)]
    if len(found) > 1 and (ins.name not in MIXED or (ins.name in ("add", "sub", "fma") and found[0] != "f32")):
        raise Unknown(f"types of {ins.name}")
    if ins.name in CALCULATE and set(ins.mods) - CALCULATE_MODS - set(found):
        raise Unknown(f"modifier of {ins.name}")
    return found


def is_float(type: str) -> bool:
    return type[0] == "f" or type.startswith("bf16")


def rounding(ins: Instruction) -> str:
    return next((mod for mod in ins.mods if mod in ROUNDINGS), "rn")


def finished(ins: Instruction, function: Callable) -> Callable:
    """`.ftz` flushes subnormal inputs and results, `.sat` clamps to [0, 1], `.relu` to at least 0."""
    if "ftz" in ins.mods and "f32" in ins.type:
        function = flushed(function)

    if "sat" in ins.mods and is_float(ins.type):
        function = after(function, lambda r: np.where(np.isnan(r), r.dtype.type(0), np.clip(r, 0, 1).astype(r.dtype)))

    if "relu" in ins.mods:
        function = after(function, lambda r: np.where((r > 0) | np.isnan(r), r, r.dtype.type(0)))
    return function


def after(function: Callable, then: Callable) -> Callable:
    return lambda *args: then(function(*args))


def flushed(function: Callable) -> Callable:
    return lambda *args: flush(function(*[flush(a) if a.dtype == np.float32 else a for a in args]))
