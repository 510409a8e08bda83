"""Lanes in step as arrays: those that stand at the same instruction execute it together.

Of several instructions the lowest goes first, so that lanes that parted meet again. Instructions that need their whole
warp wait for it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ptxemu import copies, tensor_memory, wgmma
from ptxemu.bulk import BulkQueue
from ptxemu.fault import Fault
from ptxemu.formats import U
from ptxemu.operands import SPECIAL
from ptxemu.step import Step

if TYPE_CHECKING:
    from ptxemu.machine import Batch

RUN, PARKED, BARRIER, DONE = 0, 1, 2, 3
STUCK = 256  # steps of diverged lanes after which those that waited longest get as many


class Warps:
    """Warps that run in step: the state that instructions read and write (`s` in their closures)."""

    def __init__(self, batch: "Batch", first: int, n: int):
        self.batch, self.launch, self.program, self.n = batch, batch.launch, batch.launch.program, n
        index = np.arange(first, first + n)
        self.first, self.index = first, index
        self.pcs, self.state, self.excused = (x[first : first + n] for x in (batch.pcs, batch.state, batch.excused))
        self.pc = -1 if (self.state == DONE).any() else 0  # of all lanes; -1: they differ
        self.stuck, self.turn = 0, np.zeros(n, np.int64)
        each = batch.lanes_each
        self.block_in_batch, thread = index // each, index % each
        self.lane, self.warp = index % 32, index // 32
        self.block_number = batch.blocks[self.block_in_batch]
        self.shared_base = self.block_in_batch * batch.shared_bytes
        self.local_bytes = -(-self.program.local // 16) * 16
        self.local, self.local_base = np.full(self.local_bytes * n, 0xFF, np.uint8), np.arange(n) * self.local_bytes
        self.rows = np.arange(n) // 32 * 32
        self.special = self.make_special(thread)
        self.by_mask = np.array([step.mask is not None for step in self.launch.steps] + [False])
        zero = {w: np.zeros(n, U[w]) for w in U} | {1: np.zeros(n, bool)}
        self.R: list[np.ndarray] = [zero[w] for _, w in self.program.registers.values()]
        self.carry = np.zeros(n, bool)
        self.copies, self.bulk = copies.Queue(n), BulkQueue(n)
        self.products = wgmma.Products(n)
        self.tensor = tensor_memory.Queue(n)

    def make_special(self, thread: np.ndarray) -> dict[str, np.ndarray]:
        launch = self.launch
        values = {name: np.zeros(self.n, np.int64) for name in SPECIAL}
        t, b = thread, self.block_number
        for axis, size, count in zip("xyz", launch.block_shape, launch.grid, strict=True):
            values[f"%tid.{axis}"], t = t % size, t // size
            values[f"%ctaid.{axis}"], b = b % count, b // count
            values[f"%ntid.{axis}"] = np.full(self.n, size)
            values[f"%nctaid.{axis}"] = np.full(self.n, count)
        lane = self.lane
        one = np.int64(1)
        values |= {"%laneid": lane, "%warpid": thread // 32, "%nwarpid": np.full(self.n, self.batch.warps_each)}
        values |= {
            "%lanemask_eq": one << lane,
            "%lanemask_lt": (one << lane) - 1,
            "%lanemask_le": (one << lane + 1) - 1,
        }
        values |= {"%lanemask_gt": (1 << 32) - (one << lane + 1), "%lanemask_ge": (1 << 32) - (one << lane)}
        values["%cluster_nctarank"] = np.ones(self.n, np.int64)
        workspace = launch.addresses.get("workspace", 0)
        values["%envreg1"], values["%envreg2"] = (np.full(self.n, workspace >> shift & 0xFFFFFFFF) for shift in (32, 0))
        values["%dynamic_smem_size"] = np.full(self.n, launch.shared_bytes - launch.program.shared)
        return values

    def offset(self, name: str) -> int:
        """Of a shared or local variable in its space; dynamic shared memory comes after what is fixed."""
        return self.program.offsets.get(name, -(-self.program.shared // 16) * 16)

    @property
    def finished(self) -> bool:
        return self.pc < 0 and bool((self.state == DONE).all())

    def ready(self) -> bool:
        return self.pc >= 0 or bool((self.state == RUN).any())

    def run(self, fuel: int) -> None:
        """Until no lane can go on, or for `fuel` steps."""
        while fuel > 0:
            fuel -= 1
            if self.pc >= 0:
                self.step_together()
            elif not self.step_apart():
                return

    def guarded(self, step: Step, m: np.ndarray | None) -> np.ndarray | None:
        if step.guard is None:
            return m
        p = self.R[step.guard[0]]
        p = ~p if step.guard[1] else p
        if m is not None:
            return p & m
        return None if p.all() else p

    def step_together(self) -> None:
        step = self.launch.steps[self.pc]
        m = self.guarded(step, None)
        if step.jump is not None:
            if m is None:
                self.launch.profile.issued[self.pc] += self.n // 32
                self.pc = step.jump
            elif not m.any():
                self.pc += 1
            else:
                self.part(step, m)
        elif step.ready and (m is None or m.any()) and not self.all_ready(step, m):
            self.pcs[:], self.pc = self.pc, -1
        elif step.stops or step.barrier or ((step.whole or step.mask) and m is not None):
            if step.barrier and m is None and self.n == len(self.batch.pcs) and step.execute.all_threads(self):
                self.launch.profile.issued[self.pc] += self.n // 32
                self.launch.profile.barriers += self.n // 32
                self.batch.clocks.barrier(slice(None), None)
                self.pc += 1
            else:
                self.pcs[:], self.pc = self.pc, -1
        else:
            if m is None or m.any():
                self.execute(step, m)
            self.pc += 1

    def part(self, step: Step, m: np.ndarray) -> None:
        assert step.jump is not None
        self.count(step, m)
        self.pcs[:] = np.where(m, step.jump, self.pc + 1)
        self.pc, self.stuck = -1, 0
        self.turn[:] = 0

    def step_apart(self) -> bool:
        """One instruction of the lanes that stand at the lowest; False if none can go on."""
        runnable = self.state == RUN
        if not runnable.any():
            return False
        self.stuck += 1
        if self.stuck // STUCK % 2 == 0:
            pc = int(self.pcs[runnable].min())
        else:
            pc = int(self.pcs[np.where(runnable, self.turn, self.stuck).argmin()])
        m = runnable & (self.pcs == pc)
        self.turn[m] = self.stuck
        step = self.launch.steps[pc]
        if m.all() and not (step.stops or step.barrier or step.ready or ((step.whole or step.mask) and step.guard)):
            self.pc = pc
            return True
        active = self.guarded(step, m)
        assert active is not None
        if step.jump is not None or not active.any():
            self.pcs[m] = pc + 1
            if step.jump is not None:
                self.pcs[active] = step.jump
            self.count(step, active)
        elif step.stops:
            self.count(step, active)
            self.pcs[m] = pc + 1
            self.state[active] = DONE
            waiting = (self.state == PARKED) & np.repeat(active.reshape(-1, 32).any(1), 32)
            self.state[waiting & self.by_mask[self.pcs]] = RUN  # fewer are needed now: look again
            for block in np.unique(self.block_in_batch[active]):
                self.batch.open(int(block))
        elif step.whole or step.mask:
            self.pcs[m & ~active] = pc + 1
            self.collective(step, active, pc)
        else:
            if step.ready:
                late = active & ~self.attempt(step, step.ready, active)
                if step.polls:
                    late &= ~self.excused
                    self.excused[active] = False
                self.state[late] = PARKED
                m, active = m & ~late, active & ~late
            if active.any():
                self.execute(step, active)
            self.pcs[m] = pc + 1
        return True

    def collective(self, step: Step, active: np.ndarray, pc: int) -> None:
        """Execute in the warps whose lanes are all here; the others wait."""
        here = active | ((self.state == PARKED) & (self.pcs == pc))
        need = self.needed(step, here)
        complete = ~(need & ~here).reshape(-1, 32).any(1)
        go = here & np.repeat(complete, 32)
        self.state[here & ~go] = PARKED
        if not go.any():
            return
        self.state[go] = RUN
        if step.barrier:
            self.count(step, go)
            self.launch.profile.barriers += int(go.reshape(-1, 32).any(1).sum())
            step.execute(self, go, step, pc)
        else:
            self.execute(step, None if go.all() else go)
            self.pcs[go] = pc + 1

    def needed(self, step: Step, here: np.ndarray) -> np.ndarray:
        """The lanes without which a collective instruction cannot go."""
        if step.mask is None:
            return self.state != DONE if step.barrier else np.repeat(here.reshape(-1, 32).any(1), 32)
        mask = np.where(here, np.broadcast_to(step.mask(self), self.n), 0).astype(np.uint32)
        mask = np.bitwise_or.reduce(mask.reshape(-1, 32), 1)
        return (np.repeat(mask, 32) >> self.lane.astype(np.uint32) & 1).astype(bool) & (self.state != DONE)

    def execute(self, step: Step, m: np.ndarray | None) -> None:
        self.count(step, m)
        self.attempt(step, step.execute, m)

    def all_ready(self, step: Step, m: np.ndarray | None) -> bool:
        ready = self.attempt(step, step.ready, m)
        return bool((ready if m is None else ready[m]).all())

    def attempt(self, step: Step, function: Any, m: np.ndarray | None):
        """Call a part of an instruction; its faults get their place."""
        clocks = self.batch.clocks
        before = clocks.doubt
        try:
            result = function(self, m)
        except Fault as fault:
            if before and fault.kind != "race":
                raise before[1] from None
            raise self.explain(fault, step) from None
        if clocks.doubt and not before:
            clocks.doubt = (clocks.doubt[0], self.explain(clocks.doubt[1], step))
        return result

    def explain(self, fault: Fault, step: Step) -> Fault:
        return Fault(fault.kind, f"{str(fault).partition(': ')[2]}\n  in {self.program.name}, {step.ins}")

    def count(self, step: Step, m: np.ndarray | None) -> None:
        profile = self.launch.profile
        warps = self.n // 32 if m is None else int(m.reshape(-1, 32).any(1).sum())
        profile.issued[step.ins.index] += warps
        if step.flops:
            profile.flops[step.flops[0]] += step.flops[1] * (self.n if m is None else int(m.sum()))
