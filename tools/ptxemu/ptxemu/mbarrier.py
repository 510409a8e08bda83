"""Barriers in shared memory: threads arrive, bulk copies report their bytes, threads wait for the phase to end."""

import numpy as np

from ptxemu.fault import Fault, Unknown
from ptxemu.memory import chosen
from ptxemu.operands import reader, shared_address, writer
from ptxemu.parse import Instruction, Program
from ptxemu.table import instruction

COLUMNS = 8  # of a warp's knowledge that are for bulk copies; more barriers than that share them


class Mbarrier:
    """One barrier.

    Attributes:
        phase: how many have ended.
        pending: threads that have not arrived in this one; `bytes`: of copies that have not.
        gathering, published: what those who arrive know of others, in this phase and in all before.
    """

    def __init__(self, count: int, column: int, width: int):
        self.count, self.column, self.pending, self.bytes, self.phase = count, column, count, 0, 0
        self.gathering, self.published = np.zeros(width, np.int32), np.zeros(width, np.int32)

    def ended(self) -> bool:
        """If all have arrived, the next phase begins."""
        if self.pending < 0:
            raise Fault("operand", f"more arrivals at an mbarrier than the {self.count} of its phase")
        if self.pending or self.bytes:
            return False
        self.phase, self.pending = self.phase + 1, self.count
        np.maximum(self.published, self.gathering, out=self.published)
        return True


def places(s, addr: np.ndarray, m) -> np.ndarray:
    """Where in the flat shared memory the barriers of the active lanes lie."""
    at = chosen(np.broadcast_to(addr, s.n), m)
    if (at & 7).any():
        raise Fault("misaligned", "an mbarrier is not aligned to 8 bytes")
    if (at < 0).any() or (at + 8 > s.batch.shared_bytes).any():
        raise Fault("out of bounds", f"shared memory has {s.batch.shared_bytes} bytes, mbarrier at {int(at.max())}")
    return at + chosen(s.shared_base, m)


def of(s, place: int) -> Mbarrier:
    if place not in s.batch.mbarriers:
        raise Fault("uninitialised", f"there is no mbarrier at shared byte {place % s.batch.shared_bytes}")
    return s.batch.mbarriers[place]


def touch(s, at: np.ndarray, m, atomic: bool = True) -> None:
    if s.batch.shadow is not None:
        s.batch.shadow.write(chosen(s.warp, m), at, 8, None, atomic)


def advance(s, barrier: Mbarrier) -> None:
    if barrier.ended():
        s.batch.wake()


@instruction("mbarrier")
def mbarrier(ins: Instruction, program: Program):
    kind = ins.mods[0]
    if kind in ("init", "inval"):
        return change(ins, program)
    if kind in ("arrive", "expect_tx", "complete_tx"):
        return arrive(ins, program)
    if kind in ("test_wait", "try_wait"):
        return Wait(ins, program)
    raise Unknown("mbarrier")


def change(ins: Instruction, program: Program):
    where = shared_address(ins, program, ins.operands[0])
    count = reader(program, ins.operands[1], "u32") if ins.mods[0] == "init" else None

    def execute(s, m):
        at, known = places(s, where(s), m), s.batch.mbarriers
        touch(s, at, m, atomic=False)
        for i, place in enumerate(at):
            if count is None:
                of(s, int(place))
                del known[int(place)]
            else:
                column = s.batch.columns.setdefault(int(place) % s.batch.shared_bytes, len(s.batch.columns)) % COLUMNS
                n = int(chosen(np.broadcast_to(count(s), s.n), m)[i])
                known[int(place)] = Mbarrier(n, s.batch.clocks.warps + 1 + column, s.batch.clocks.seen.shape[1])

    return execute


def arrive(ins: Instruction, program: Program):
    """arrive{.expect_tx} state, [barrier]{, count or bytes}; expect_tx and complete_tx [barrier], bytes."""
    arrives, expects = ins.mods[0] == "arrive", "expect_tx" in ins.mods
    if "noComplete" in ins.mods:
        raise Unknown("mbarrier.arrive.noComplete")
    write = writer(program, ins.operands[0], "b64") if arrives else None
    operands = ins.operands[1:] if arrives else ins.operands
    where = shared_address(ins, program, operands[0])
    number = reader(program, operands[1] if operands[1:] else "1", "u32")

    def execute(s, m):
        at, clocks = places(s, where(s), m), s.batch.clocks
        touch(s, at, m)
        warp, n = chosen(s.warp, m), chosen(np.broadcast_to(number(s), s.n), m).astype(np.int64)
        phases = np.zeros(s.n, np.uint64)
        if write is not None:
            phases[slice(None) if m is None else m] = [of(s, int(place)).phase for place in at]
            write(s, phases, m)
        for place in np.unique(at):
            here, barrier = at == place, of(s, int(place))
            if expects or not arrives:
                barrier.bytes += int(n[here].sum()) * (1 if expects else -1)
            if arrives:
                barrier.pending -= int(here.sum()) if expects else int(n[here].sum())
                np.maximum(barrier.gathering, clocks.seen[np.unique(warp[here])].max(0), out=barrier.gathering)
            advance(s, barrier)
        clocks.now[np.unique(warp)] += 1
        clocks.tick(np.unique(warp))

    return execute


class Wait:
    """test_wait and try_wait: p, [barrier], state, or the parity of the phase that must have ended.

    try_wait may suspend a thread: here it does so until the phase ends, so that nobody spins. A thread that asks with
    test_wait is not told "not yet" as long as others can go on.
    """

    def __init__(self, ins: Instruction, program: Program):
        self.write = writer(program, ins.operands[0], "pred")
        self.where = shared_address(ins, program, ins.operands[1])
        self.parity, self.polls = "parity" in ins.mods, ins.mods[0] == "test_wait"
        self.state = reader(program, ins.operands[2], "u32" if self.parity else "b64")

    def ready(self, s, m) -> np.ndarray:
        """Of all lanes, those whose phase has ended."""
        at, state = places(s, self.where(s), m), chosen(np.broadcast_to(self.state(s), s.n), m).astype(np.int64)
        phase = np.zeros(len(at), np.int64)
        for place in np.unique(at):
            here, shadow = at == place, s.batch.shadow
            if shadow is not None and place not in s.batch.mbarriers:
                shadow.read(chosen(s.warp, m)[here], at[here], 8)  # too early: shows who begins it unordered
                phase[here] = state[here]
            else:
                phase[here] = of(s, int(place)).phase
        out = np.zeros(s.n, bool)
        out[slice(None) if m is None else m] = phase & 1 != state & 1 if self.parity else phase > state
        return out

    def __call__(self, s, m) -> None:
        at, done, seen = places(s, self.where(s), m), self.ready(s, m), s.batch.clocks.seen
        touch(s, at, m)
        warp = chosen(s.warp, m)
        for place in np.unique(at[chosen(done, m)]):
            for w in np.unique(warp[(at == place) & chosen(done, m)]):
                np.maximum(seen[w], of(s, int(place)).published, out=seen[w])
        self.write(s, done, m)
