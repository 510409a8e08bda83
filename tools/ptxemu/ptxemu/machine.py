"""Executes a program: a launch, its batches of blocks, their barriers, the order in which warps run.

Without a seed all warps of many blocks go in step, which is fast; with one, each warp goes alone, in an order drawn
from the seed, and so do the blocks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ptxemu.bulk import TensorMap
from ptxemu.counters import Profile
from ptxemu.fault import Fault
from ptxemu.mbarrier import COLUMNS, Mbarrier
from ptxemu.memory import Buffer, GlobalMemory
from ptxemu.parse import Program
from ptxemu.races import Clocks, GlobalShadow, SharedShadow
from ptxemu.step import BY_MASK, Step, granule
from ptxemu.tensor_memory import TensorMemory
from ptxemu.warps import BARRIER, DONE, PARKED, RUN, Warps

LANES = 4096  # that run in step
POLLS = 200  # vain questions for the end of a phase, of all who can still ask, after which nobody will go on
PATIENCE = 100  # rounds of all warps that a fault may wait for a better explanation


def triple(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


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
        together: a cooperative launch, whose blocks may wait for each other.
    """

    def __init__(
        self, program: Program, settings: Settings, grid, block, args, shared: int = 0, together: bool = False
    ):
        self.program, self.together, self.races, self.seed = program, together, settings.races, settings.seed
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
            self.together = True
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
        at_once = len(order) if self.together else max(LANES // padded, 1)
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
        self.excused, self.idle = np.zeros(n, bool), 0
        self.barrier_id, self.barrier_count = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.arrived = {}  # (block, barrier): threads that arrived without waiting
        self.mbarriers: dict[int, Mbarrier] = {}  # by place in the flat shared memory
        self.columns: dict[int, int] = {}  # of what warps know of bulk copies, by address of the mbarrier
        self.tickets = 0  # of bulk copies
        self.shared_bytes = launch.shared_bytes
        self.shared = np.full(self.shared_bytes * len(blocks), 0xFF, np.uint8)
        names = {ins.name for ins in launch.program.code}
        columns = COLUMNS + 1 if "mbarrier" in names else 0
        self.clocks = Clocks(len(blocks), self.warps_each, columns, "tcgen05" in names)
        self.shadow = None
        if launch.races:
            self.shadow = SharedShadow(
                self.clocks, self.shared, granule(launch.program, "shared"), launch.seed is not None
            )
        self.tensor = TensorMemory(self) if "tcgen05" in names else None
        size = n if launch.seed is None else 32
        self.groups = [Warps(self, first, size) for first in range(0, n, size)]

    def run(self) -> None:
        alone, waited = self.launch.seed is not None, 0
        while any(not g.finished for g in self.groups):
            ready = [g for g in self.groups if g.ready()]
            if not ready:
                self.clocks.settle()
                self.excuse()
                continue
            if alone:
                self.rng.shuffle(ready)
            for g in ready:
                g.run(self.rng.choice((40, 1000)) if alone else 1 << 60)
            waited = waited + 1 if self.clocks.doubt else 0
            if waited > PATIENCE:
                self.clocks.settle()
        self.clocks.settle()
        if self.tensor:
            self.tensor.end()

    def arrive(
        self, s: Warps, step: Step, lanes: np.ndarray, number: np.ndarray, count: np.ndarray, wait: bool
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
            self.clocks.settle(block)
            state[here] = RUN
            pcs[here] += 1
            warps = np.unique(np.flatnonzero(here) // 32)
            self.clocks.barrier(block, np.unique(np.concatenate([warps, *(w for _, w in early)])))

    def excuse(self) -> None:
        """Nobody can go on: those who only ask for the end of a phase are told that it has not come."""
        polls = np.array([step.polls for step in self.launch.steps] + [False])
        here = (self.state == PARKED) & polls[self.pcs]
        self.idle += 1
        if self.idle > POLLS or not here.any():
            raise self.deadlock()
        self.state[here], self.excused[here] = RUN, True

    def wake(self) -> None:
        """A phase of an mbarrier has ended: who waits for one looks again."""
        self.idle = 0
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
