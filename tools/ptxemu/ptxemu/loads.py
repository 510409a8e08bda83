"""Loads, stores and atomics."""

import re

import numpy as np

from ptxemu.fault import Unknown
from ptxemu.formats import DTYPE, U
from ptxemu.memory import chosen, plain, reach
from ptxemu.operands import address, alu, reader, typed, untyped, writer
from ptxemu.parse import Instruction, Program, bits, found, split
from ptxemu.table import instruction


def space_of(ins: Instruction) -> str:
    """The state space among the modifiers, "" for generic addresses."""
    names = ("global", "shared", "local", "param", "const")
    return next((space for mod in ins.mods if (space := mod.partition("::")[0]) in names), "")


def elements(ins: Instruction, text: str) -> list[str]:
    return split(text[1:-1]) if text[0] == "{" else [text]


def words(s, raw: np.ndarray, at: np.ndarray, size: int, count: int) -> np.ndarray:
    """[lanes, count] words at byte offsets that are multiples of the whole size."""
    total = size * count
    if total <= 16:
        view = plain(total, raw)[at // total]
        return view.view(U[8 * size]).reshape(-1, count) if count > 1 else view[:, None]
    return plain(size, raw)[(at // size)[:, None] + np.arange(count)]


@instruction("ld", "ldu")
def load(ins: Instruction, program: Program):
    space = space_of(ins)
    if space == "param":
        return load_param(ins, program)
    space = "global" if space == "const" else space
    names = elements(ins, ins.operands[0])
    size, type = bits(ins.type) // 8, ins.type if ins.type[0] == "s" else f"b{bits(ins.type)}"
    writes = [writer(program, name, type) for name in names]
    where, count, total = address(program, ins.operands[1]), len(names), size * len(names)
    acquires = space != "shared" and bool({"acquire"} & set(ins.mods)) and bool({"gpu", "sys"} & set(ins.mods))

    def execute(s, m):
        raw, at = reach(s, ins, space, where(s), total, m, "atomic" if acquires else "read")
        if acquires and s.launch.shadow is not None:
            order_blocks(s, where(s), m)
        data = words(s, raw, at, size, count)
        if m is not None:
            full = np.zeros((s.n, count), data.dtype)
            full[m] = data
            data = full
        for i, write in enumerate(writes):
            write(s, data[:, i], m)

    return execute


def load_param(ins: Instruction, program: Program):
    m = found(re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(\d+))?\s*\]", ins.operands[1]))
    size = bits(ins.type) // 8
    type = ins.type if ins.type[0] == "s" else f"b{8 * size}"
    writes = [writer(program, name, type) for name in elements(ins, ins.operands[0])]
    if m[1][0] == "%":
        raise Unknown("a parameter addressed through a register")
    if m[1] not in program.params:  # the result of an ignored call
        return lambda s, m: [write(s, np.zeros((), U[8 * size]), m) for write in writes]
    start = program.params[m[1]][0] + int(m[2] or 0)

    def execute(s, mask):
        for i, write in enumerate(writes):
            raw = bytes(s.launch.params[start + i * size : start + (i + 1) * size])
            write(s, np.frombuffer(raw, U[8 * size])[0].view(DTYPE[type]), mask)

    return execute


@instruction("st")
def store(ins: Instruction, program: Program):
    space = space_of(ins)
    if space == "param":  # arguments of an ignored call
        return lambda s, m: None
    names = elements(ins, ins.operands[1])
    size = bits(ins.type) // 8
    reads = [reader(program, name, f"b{8 * size}") for name in names]
    where, total = address(program, ins.operands[0]), size * len(names)

    def values(s, m):
        parts = [np.ascontiguousarray(chosen(np.broadcast_to(read(s), s.n), m)).view(np.uint8) for read in reads]
        return np.concatenate([part.reshape(-1, size) for part in parts], 1)

    def execute(s, m):
        raw, at = reach(s, ins, space, where(s), total, m, "write", lambda: values(s, m))
        words = plain(size, raw)
        index = at // size
        for i, read in enumerate(reads):
            value = read(s)
            words[index + i] = value if value.ndim == 0 else chosen(value, m)

    return execute


def swap_add(old, x, _):
    return old + x


OPERATIONS = {
    "add": swap_add,
    "exch": lambda old, x, _: x,
    "min": lambda old, x, _: min(old, x),
    "max": lambda old, x, _: max(old, x),
    "and": lambda old, x, _: old & x,
    "or": lambda old, x, _: old | x,
    "xor": lambda old, x, _: old ^ x,
    "cas": lambda old, x, y: y if old == x else old,
    "inc": lambda old, x, _: old * 0 if old >= x else old + old.dtype.type(1),
    "dec": lambda old, x, _: x if old == 0 or old > x else old - old.dtype.type(1),
}


@instruction("atom", "red")
def atomic(ins: Instruction, program: Program):
    """Lanes take turns in the order of their numbers; a single lane of a warp also orders the blocks that meet here."""
    name = next(mod for mod in ins.mods if mod in OPERATIONS)
    space, type = space_of(ins), ins.type
    operands = ins.operands if ins.name == "atom" else ["_", *ins.operands]
    where = address(program, operands[1])
    names = elements(ins, operands[2])
    values = [reader(program, text, type) for text in names]
    other = reader(program, operands[3], type) if name == "cas" else None
    writes = [writer(program, text, type) for text in elements(ins, operands[0])] if operands[0] != "_" else []
    size, function = bits(type) // 8, OPERATIONS[name]

    def execute(s, m):
        addr = where(s)
        raw, at = reach(s, ins, space, addr, size * len(names), m, "atomic")
        view = plain(size, raw)
        if s.launch.shadow is not None and space != "shared":
            order_blocks(s, addr, m)
        for i, value in enumerate(values):
            x = chosen(np.broadcast_to(value(s), (s.n, *np.shape(value(s))[1:])), m)
            y = chosen(np.broadcast_to(other(s), s.n), m) if other else x
            old = in_turn(view, at // size + i, x, y, type, function)
            if writes:
                full = np.zeros((s.n, *old.shape[1:]), old.dtype)
                full[slice(None) if m is None else m] = old
                writes[i](s, full, m)

    return execute


def in_turn(view, index, x, y, type: str, function) -> np.ndarray:
    """Apply one lane after the other; returns what each found."""
    unique = len(np.unique(index)) == len(index)
    if unique and function in (swap_add, OPERATIONS["exch"]):
        old = typed(view[index], type)
        view[index] = untyped(function(old, x, y), type)
        return old
    found = []
    for i, at in enumerate(index):
        old = typed(view[at : at + 1], type)[0]
        found.append(old)
        view[at] = untyped(np.asarray(function(old, x[i], y[i]), x.dtype), type)
    return np.array(found, x.dtype).reshape(x.shape)


def order_blocks(s, addr: np.ndarray, m) -> None:
    count = np.full(s.n // 32, 32) if m is None else m.reshape(-1, 32).sum(1)
    for row in np.flatnonzero(count == 1):
        assert m is not None
        lane = 32 * row + int(np.argmax(m[32 * row : 32 * row + 32]))
        s.launch.shadow.synchronise(int(s.block_number[lane]), int(addr[lane]))


@instruction("mapa")
def map_address(ins: Instruction, program: Program):
    """Clusters of one block: its own address."""
    return alu(ins, program, ins.type, [ins.type], lambda a: a)
