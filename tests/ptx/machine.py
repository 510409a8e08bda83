"""Executes a program: lanes in step as arrays, warps that diverge and meet again, barriers, schedules.

Lanes that stand at the same instruction execute it together; of several, the lowest instruction goes first, so that
lanes that parted meet again. Instructions that need their whole warp wait for it. Without a seed all warps of many
blocks go in step, which is fast; with one, each warp goes alone, in an order drawn from the seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptx import arithmetic, bitwise, control, convert, copies, loads, tensor_core  # noqa: F401 (they fill the table)
from ptx.bulk import BulkQueue, TensorMap
from ptx.counters import Profile
from ptx.fault import Fault, Unknown
from ptx.formats import U
from ptx.mbarrier import COLUMNS, Mbarrier, Wait
from ptx.memory import Buffer, GlobalMemory
from ptx.operands import SPECIAL, reader
from ptx.parse import Instruction, Program, bits
from ptx.races import Clocks, GlobalShadow, SharedShadow
from ptx.table import TABLE

RUN, PARKED, BARRIER, DONE = 0, 1, 2, 3
LANES = 4096  # that run in step
PATIENCE = 100  # rounds of all warps that a fault may wait for a better explanation
STUCK = 256  # steps of diverged lanes after which those that waited longest get as many
WHOLE_WARP = {"bar", "barrier", "mma", "ldmatrix", "stmatrix", "wgmma", "elect"}  # wait for all lanes of the warp
BY_MASK = {"shfl": -1, "vote": -1, "match": -1, "redux": -1}  # wait for the lanes named by this operand


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
                self.execute = TABLE[ins.name](ins, program)
            except Unknown as e:
                raise Unknown(f"{e}, {ins}") from None
        self.ready = self.execute.ready if isinstance(self.execute, Wait) and self.execute.suspends else None
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


def triple(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


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
        elif ins.name in ("ldmatrix", "stmatrix", "wgmma") and space == "shared":
            sizes.append(1 if {"e4m3", "e5m2", "s8"} & set(ins.mods) else 2)
    return min(sizes)


@dataclass(frozen=True)
class Settings:
    """How a launch runs.

    Args:
        races: look for races and uninitialised shared memory.
        seed: None for all warps in step; a number for warps alone, in an order drawn from it.
        schedules: how many; each after the first has another seed, and all must give the same bytes.
    """

    races: bool = True
    seed: int | None = None
    schedules: int = 1


def run(program: Program, steps: list[Step], settings: Settings, *launch) -> Profile:
    """Run a kernel in one or more schedules and write the results to its buffers; `launch` as for `Launch`.

    Raises:
        Fault: the kernel made a mistake, or two schedules differ.
    """
    first = Launch(program, settings, *launch)
    profile = first.run(steps)
    for i in range(1, settings.schedules):
        seed = i if settings.seed is None else settings.seed + i
        other = Launch(program, replace(settings, seed=seed), *launch)
        other.run(steps)
        differ = np.flatnonzero(first.memory.bytes != other.memory.bytes)
        if len(differ):
            name = first.memory.name(int(differ[0]))
            raise Fault(
                "schedule",
                f"{program.name}: {len(differ)} bytes differ between two orders of execution, first in {name}",
            )
    first.memory.copy_back()
    return profile


class Launch:
    """One run of a kernel over its grid.

    Args:
        program: from `parse`.
        grid, block: sizes in x, y, z.
        args: of the kernel, in order: `Buffer` or a number.
        shared: bytes of dynamic shared memory.
    """

    def __init__(self, program: Program, settings: Settings, grid, block, args, shared: int = 0):
        self.program, self.races, self.seed = program, settings.races, settings.seed
        self.grid, self.block_shape = triple(grid), triple(block)
        self.threads = int(np.prod(self.block_shape))
        if program.threads is not None and self.threads != program.threads:
            raise ValueError(f"{program.name} is compiled for blocks of {program.threads} threads, got {self.threads}")
        self.shared_bytes = -(-(-(-program.shared // 16) * 16 + shared) // 16) * 16
        if len(args) > len(program.params):
            raise ValueError(f"{program.name} takes {len(program.params)} arguments, got {len(args)}")
        variables = {n: v for n, v in program.variables.items() if v.space in ("const", "global")}
        module = [Buffer(n, np.frombuffer(v.data.ljust(v.size, b"\0"), np.uint8)) for n, v in variables.items()]
        if any("%envreg1" in ins.operands for ins in program.code):  # the barrier of a cooperative launch
            module.append(Buffer("workspace", np.zeros(64, np.uint8)))
        buffers = [a.buffer if isinstance(a, TensorMap) else a for a in args if isinstance(a, Buffer | TensorMap)]
        self.memory = GlobalMemory(buffers + module)
        names = frozenset(b.name for b in buffers + module)
        self.profile = Profile(program.name, self.grid, self.threads, program.shared + shared, names, program.code)
        self.addresses = {b.name: self.memory.address(b) for b in module}
        self.params = bytearray(sum(8 + size for _, size, _ in program.params.values()))
        for (offset, size, _), arg in zip(program.params.values(), args, strict=False):
            self.params[offset : offset + size] = self.encode(arg, size)
        blocks = int(np.prod(self.grid))
        self.shadow = GlobalShadow(blocks, len(self.memory.bytes), granule(program, "global")) if self.races else None

    def encode(self, arg, size: int) -> bytes:
        if isinstance(arg, Buffer):
            return self.memory.address(arg).to_bytes(size, "little")
        if isinstance(arg, TensorMap):
            arg = arg.encode(self.memory.address(arg.buffer))
        if isinstance(arg, bytes):
            assert len(arg) == size, f"argument of {size} bytes, got {len(arg)}"
            return arg
        if isinstance(arg, float | np.floating):
            return np.asarray(arg, f"f{size}").tobytes()
        return (int(arg) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def run(self, steps: list[Step]) -> Profile:
        self.steps = steps
        order = list(range(int(np.prod(self.grid))))
        rng = random.Random(self.seed)
        if self.seed is not None:
            rng.shuffle(order)
        padded = -(-self.threads // 32) * 32
        # blocks of a cooperative launch wait for each other
        at_once = len(order) if "workspace" in self.addresses else max(LANES // padded, 1)
        with np.errstate(all="ignore"):
            for i in range(0, len(order), at_once):
                Batch(self, np.array(order[i : i + at_once]), rng).run()
        self.profile.patterns.clear()
        return self.profile


class Batch:
    """Blocks that run together, each with its shared memory."""

    def __init__(self, launch: Launch, blocks: np.ndarray, rng: random.Random):
        self.launch, self.blocks, self.rng = launch, blocks, rng
        self.warps_each = -(-launch.threads // 32)
        self.lanes_each = 32 * self.warps_each
        n = self.lanes_each * len(blocks)
        self.pcs, self.state = np.zeros(n, np.int32), np.zeros(n, np.int8)
        self.state[np.arange(n) % self.lanes_each >= launch.threads] = DONE
        self.barrier_id, self.barrier_count = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.arrived = {}  # (block, barrier): threads that arrived without waiting
        self.mbarriers: dict[int, Mbarrier] = {}  # by place in the flat shared memory
        self.columns: dict[int, int] = {}  # of what warps know of bulk copies, by address of the mbarrier
        self.tickets = 0  # of bulk copies
        self.shared_bytes = launch.shared_bytes
        self.shared = np.full(self.shared_bytes * len(blocks), 0xFF, np.uint8)
        self.clocks = Clocks(
            len(blocks), self.warps_each, COLUMNS if any(i.name == "mbarrier" for i in launch.program.code) else 0
        )
        self.shadow = None
        if launch.races:
            self.shadow = SharedShadow(
                self.clocks, self.shared, granule(launch.program, "shared"), launch.seed is not None
            )
        size = n if launch.seed is None else 32
        self.groups = [Warps(self, first, size) for first in range(0, n, size)]

    def run(self) -> None:
        alone, waited = self.launch.seed is not None, 0
        while any(not g.finished for g in self.groups):
            ready = [g for g in self.groups if g.ready()]
            if not ready:
                if self.shadow:
                    self.shadow.settle()
                raise self.deadlock()
            if alone:
                self.rng.shuffle(ready)
            for g in ready:
                g.run(self.rng.choice((40, 1000)) if alone else 1 << 60)
            waited = waited + 1 if self.shadow and self.shadow.doubt else 0
            if self.shadow and waited > PATIENCE:
                self.shadow.settle()
        if self.shadow:
            self.shadow.settle()

    def arrive(
        self, s: "Warps", step: Step, lanes: np.ndarray, number: np.ndarray, count: np.ndarray, wait: bool
    ) -> None:
        """Lanes (of the batch) come to a barrier; it opens when `count` threads (0: all that live) are there."""
        for block in np.unique(lanes // self.lanes_each):
            mine = lanes[lanes // self.lanes_each == block]
            key = (int(block), int(number[0]))
            if wait:
                self.state[mine], self.barrier_id[mine], self.barrier_count[mine] = BARRIER, number[0], count[0]
            else:
                warps = np.unique(mine % self.lanes_each // 32)
                self.arrived.setdefault(key, []).append((len(mine), warps))
                self.pcs[mine] += 1
            self.open(int(block))

    def open(self, block: int) -> None:
        """Open each barrier of a block that has all its threads."""
        part = slice(block * self.lanes_each, (block + 1) * self.lanes_each)
        state, number, count, pcs = self.state[part], self.barrier_id[part], self.barrier_count[part], self.pcs[part]
        for k in np.unique(number[state == BARRIER]):
            here = (state == BARRIER) & (number == k)
            need = int(count[here][0]) or int((state != DONE).sum())
            early = self.arrived.get((block, int(k)), [])
            if int(here.sum()) + sum(n for n, _ in early) < need:
                continue
            if not count[here][0] and len(np.unique(pcs[here])) > 1:
                lines = ", ".join(str(self.launch.program.code[pc].line) for pc in np.unique(pcs[here]))
                raise Fault("barrier", f"warps of one block wait at different barriers, lines {lines}")
            self.arrived.pop((block, int(k)), None)
            if self.shadow:
                self.shadow.settle(block)
            state[here] = RUN
            pcs[here] += 1
            warps = np.unique(np.flatnonzero(here) // 32)
            self.clocks.barrier(block, np.unique(np.concatenate([warps, *(w for _, w in early)])))

    def wake(self) -> None:
        """A phase of an mbarrier has ended: who waits for one looks again."""
        waits = np.array([step.ready is not None for step in self.launch.steps] + [False])
        self.state[(self.state == PARKED) & waits[self.pcs]] = RUN

    def deadlock(self) -> Fault:
        code, lines = self.launch.program.code, []
        kinds = set()
        for pc in np.unique(self.pcs[(self.state == PARKED) | (self.state == BARRIER)]):
            here = (self.pcs == pc) & (self.state != DONE)
            warps = sorted({(int(i) // self.lanes_each, int(i) % self.lanes_each // 32) for i in np.flatnonzero(here)})
            text = ", ".join(f"{b}:{w}" for b, w in warps[:6])
            lines.append(f"{int(here.sum())} lanes of warps (block:warp) {text} wait at {code[pc]}")
            kinds.add(
                "shuffle"
                if code[pc].name in BY_MASK
                else "barrier"
                if code[pc].name in ("bar", "barrier")
                else "deadlock"
            )
        done = int((self.state == DONE).sum())
        kind = next((k for k in ("shuffle", "barrier") if k in kinds), "deadlock")
        return Fault(kind, "; ".join(lines) + f"; {done} lanes have ended: no lane can go on")


class Warps:
    """Warps that run in step: the state that instructions read and write (`s` in their closures)."""

    def __init__(self, batch: Batch, first: int, n: int):
        self.batch, self.launch, self.program, self.n = batch, batch.launch, batch.launch.program, n
        index = np.arange(first, first + n)
        self.first, self.index = first, index
        self.pcs, self.state = batch.pcs[first : first + n], batch.state[first : first + n]
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
        self.products = tensor_core.Products(n)

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
        shadow = self.batch.shadow
        before = shadow and shadow.doubt
        try:
            result = function(self, m)
        except Fault as fault:
            if before and fault.kind != "race":
                raise before[1] from None
            raise self.explain(fault, step) from None
        if shadow and shadow.doubt and not before:
            shadow.doubt = (shadow.doubt[0], self.explain(shadow.doubt[1], step))
        return result

    def explain(self, fault: Fault, step: Step) -> Fault:
        return Fault(fault.kind, f"{str(fault).partition(': ')[2]}\n  in {self.program.name}, {step.ins}")

    def count(self, step: Step, m: np.ndarray | None) -> None:
        profile = self.launch.profile
        warps = self.n // 32 if m is None else int(m.reshape(-1, 32).any(1).sum())
        profile.issued[step.ins.index] += warps
        if step.flops:
            profile.flops[step.flops[0]] += step.flops[1] * (self.n if m is None else int(m.sum()))
