"""wgmma: products of four warps, asynchronous, with operands in shared memory that descriptors name.

Results appear in the registers at the wait; until then they hold a NaN.
"""

import re

import numpy as np

from ptxemu.fault import Unknown
from ptxemu.formats import DTYPE
from ptxemu.operands import reader, typed, untyped
from ptxemu.parse import Instruction, Program, found, split
from ptxemu.table import instruction
from ptxemu.tensor_core import POISON, accumulator, described, elements, fragment, gather, row_heads, spread


class Products:
    """Products of wgmma in flight: their warps, the group of each warp, their registers, the places they read."""

    def __init__(self, n: int):
        self.group = np.zeros(n // 32, np.int64)  # that each warp fills now
        self.results: dict[int, np.ndarray] = {}  # register: what it will hold
        self.flying: list[tuple[np.ndarray, np.ndarray, list[int], dict[int, list[np.ndarray]]]] = []

    def wait(self, s, m, left: int) -> None:
        """All but the last `left` groups of the warps are done: their registers hold the result."""
        here = np.ones(s.n // 32, bool) if m is None else m.reshape(-1, 32).any(1)
        flying, self.flying = self.flying, []
        for warps, group, registers, held in flying:
            done = here[warps] & (group < self.group[warps] - left)
            for warp in warps[done]:
                for places in held.pop(int(warp), []):
                    s.batch.shadow.release(int(s.warp[32 * warp]), places)
            if not done.all():
                self.flying.append((warps[~done], group[~done], registers, held))
        busy: dict[int, np.ndarray] = {}
        for warps, _, registers, _ in self.flying:
            for index in registers:
                busy.setdefault(index, np.zeros(len(here), bool))[warps] = True
        for index, value in list(self.results.items()):
            ready = np.repeat(here & ~busy.get(index, np.zeros(len(here), bool)), 32)
            s.R[index] = np.where(ready, value, s.R[index])
        if not self.flying:
            self.results.clear()


@instruction("wgmma")
def warpgroup(ins: Instruction, program: Program):
    if ins.mods[0] == "fence":
        return lambda s, m: None
    if ins.mods[0] == "commit_group":

        def commit(s, m):
            s.products.group[slice(None) if m is None else m.reshape(-1, 32).any(1)] += 1

        return commit
    if ins.mods[0] == "wait_group":
        left = int(ins.operands[0])
        return lambda s, m: s.products.wait(s, m, left)
    return WarpgroupProduct(ins, program)


class WarpgroupProduct:
    """wgmma.mma_async m64nNkK: four warps multiply 64 rows; operands in shared memory, A may be in registers."""

    def __init__(self, ins: Instruction, program: Program):
        _, self.n, self.k = map(int, found(re.search(r"m(\d+)n(\d+)k(\d+)", ".".join(ins.mods))).groups())
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
        lanes = (np.arange(s.n) if m is None else np.flatnonzero(m)).reshape(-1, 32)
        held: dict[int, list[np.ndarray]] = {}
        b = self.operand(s, lanes, self.desc_b, np.arange(self.n)[None], self.trans_b, self.tb, held)
        if self.a:
            a = gather(s, self.a, self.ta, lanes.reshape(-1), self.pa, (16, self.k))
        else:
            rows = 16 * (s.warp[lanes[:, :1]] % s.batch.warps_each % 4) + np.arange(16)
            a = self.operand(s, lanes, self.desc_a, rows, self.trans_a, self.ta, held)
        product = (self.signs[0] * a) @ (self.signs[1] * b).swapaxes(1, 2)
        values = product[:, self.pd[0][..., 0], self.pd[1][..., 0]].swapaxes(0, 1)
        keep, pending = np.broadcast_to(self.keep(s), s.n), s.products.results
        for index, value in zip(self.d, values, strict=True):
            before = pending.get(index, s.R[index])
            busy = s.R[index] == POISON  # a result in flight, onto which hardware adds in order
            old = typed(np.where(busy, before, s.R[index]), self.td)
            total = np.where(keep, old, 0).astype(value.dtype) + spread(s, value, m)
            total = untyped(total.astype(DTYPE[self.td]), self.td)
            pending[index] = total if m is None else np.where(m, total, before)
            s.R[index] = np.full(s.n, POISON) if m is None else np.where(m, POISON, s.R[index])
        warps = lanes[:, 0] // 32
        s.products.flying.append((warps, s.products.group[warps], self.d, held))
        s.launch.profile.flops[f"{self.ta} mma"] += 2 * 16 * self.n * self.k * len(warps)

    def operand(self, s, lanes, descriptor, rows, trans: int, type: str, held: dict) -> np.ndarray:
        """[warps, rows, K] elements; the places they come from are held until the wait."""
        lane = lanes[:, 0]
        d = np.broadcast_to(descriptor(s), s.n)[lane]
        at = described(self.ins, d, rows, self.k, self.element, trans)
        readers = lane // 32 % 4 == 0 if descriptor is self.desc_b else slice(None)  # four warps share B
        heads = row_heads(s, self.ins, lane, at, self.element, trans, readers)
        if s.batch.shadow is not None:
            s.batch.shadow.read(np.repeat(s.warp[lane], heads.shape[1]), heads.reshape(-1), 16, proxy=True)
            for i, first in enumerate(lane):
                places = s.batch.shadow.granules(heads[i], 16).reshape(-1)
                s.batch.shadow.hold(places)
                held.setdefault(int(first) // 32, []).append(places)
        return elements(s, lane, at, self.element, type)
