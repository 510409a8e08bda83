"""Copies that go on while the warp computes: cp.async and its waits."""

from typing import NamedTuple

import numpy as np

from ptxemu.bulk import bulk
from ptxemu.fault import Fault, Unknown
from ptxemu.mbarrier import advance, of, places
from ptxemu.memory import chosen, reach
from ptxemu.operands import address, reader, shared_address
from ptxemu.parse import Instruction, Program
from ptxemu.table import instruction


class Flight(NamedTuple):
    """Copies of `size` bytes by some lanes; `agent`: column and ticket of the mbarrier that tells of them."""

    lanes: np.ndarray
    group: np.ndarray
    at: np.ndarray
    size: int
    agent: tuple[int, int] | None


class Queue:
    """The cp.async of some lanes that are in flight, by lane and group."""

    def __init__(self, n: int):
        self.group = np.zeros(n, np.int64)  # that each lane fills now
        self.flying: list[Flight] = []

    def start(self, lanes: np.ndarray, at: np.ndarray, size: int) -> None:
        self.flying.append(Flight(lanes, self.group[lanes], at, size, None))

    def wait(self, s, m, left: int, committed: bool = True) -> None:
        """All but the last `left` groups of the lanes have landed."""
        here = np.ones(s.n, bool) if m is None else m
        last = self.group - left if committed else self.group + 1
        for flight in self.take(lambda lanes, group: here[lanes] & (group < last[lanes])):
            warp, seen = s.warp[flight.lanes], s.batch.clocks.seen
            if flight.agent:
                column, ticket = flight.agent
                seen[warp, column] = np.maximum(seen[warp, column], ticket)
            elif s.batch.shadow is not None:
                s.batch.shadow.land(warp, flight.at, flight.size)

    def hand_over(self, s, who: np.ndarray, agent: tuple[int, int]) -> None:
        """An mbarrier tells of all copies that some lanes have begun."""
        for flight in self.take(lambda lanes, group: np.isin(lanes, who)):
            if not flight.agent:
                flight = flight._replace(agent=agent)
                if s.batch.shadow is not None:
                    s.batch.shadow.land(s.warp[flight.lanes], flight.at, flight.size, agent)
            self.flying.append(flight)

    def take(self, which) -> list[Flight]:
        """Remove those of the lanes and groups that a function chooses."""
        taken, flying = [], self.flying
        self.flying = []
        for flight in flying:
            done = which(flight.lanes, flight.group)
            for some, to in ((done, taken), (~done, self.flying)):
                if some.any():
                    to.append(flight._replace(lanes=flight.lanes[some], group=flight.group[some], at=flight.at[some]))
        return taken


@instruction("cp")
def copy(ins: Instruction, program: Program):
    kind = ins.mods[1]
    if ins.mods[0] != "async":
        raise Unknown("copy")
    if kind == "bulk":
        return bulk(ins, program)
    if kind in ("ca", "cg"):
        return copy_async(ins, program)
    if kind == "commit_group":

        def commit(s, m):
            s.copies.group[slice(None) if m is None else m] += 1

        return commit
    if kind in ("wait_group", "wait_all"):
        left = int(ins.operands[0]) if kind == "wait_group" else 0
        return lambda s, m: s.copies.wait(s, m, left, kind == "wait_group")
    if kind == "mbarrier":
        return arrive(ins, program)
    raise Unknown("copy")


def arrive(ins: Instruction, program: Program):
    """cp.async.mbarrier.arrive: who waits for the phase knows of the copies that these lanes have begun.

    Without `.noinc` the arrival counts beyond those that the mbarrier expects.
    """
    where, counted = shared_address(ins, program, ins.operands[0]), "noinc" in ins.mods

    def execute(s, m):
        at, lanes = places(s, where(s), m), chosen(np.arange(s.n), m)
        for place in np.unique(at):
            barrier, who = of(s, int(place)), lanes[at == place]
            s.batch.tickets += 1
            s.copies.hand_over(s, who, (barrier.column, s.batch.tickets))
            barrier.gathering[barrier.column] = s.batch.tickets
            barrier.pending -= len(who) if counted else 0
            advance(s, barrier)

    return execute


def copy_async(ins: Instruction, program: Program):
    """The bytes are moved at once and marked as in flight until the wait; those beyond the source size are zero."""
    to, source = address(program, ins.operands[0]), address(program, ins.operands[1])
    size = int(ins.operands[2], 0)
    extra = [text for text in ins.operands[3:] if text != ""]
    given = reader(program, extra[0], "u32") if extra and "cache_hint" not in "".join(ins.mods[-1:]) else None

    def execute(s, m):
        count = np.full(s.n, size) if given is None else np.broadcast_to(given(s), s.n).astype(np.int64)
        if (chosen(count, m) > size).any():
            raise Fault("operand", f"cp.async reads more than the {size} bytes it writes")
        data = np.zeros((s.n, size), np.uint8)
        some = (count > 0) & (True if m is None else m)
        if some.any():
            if (full := chosen(count, some) == size).all():
                raw, at = reach(s, ins, "global", source(s), size, some, "read")
                data[some] = raw[at[:, None] + np.arange(size)]
            else:
                copy_parts(s, ins, source(s), count, some, data)
            del full
        lanes = np.arange(s.n) if m is None else np.flatnonzero(m)
        shadow, s.batch.shadow = s.batch.shadow, None
        try:
            raw, at = reach(s, ins, "shared", to(s), size, m, "write")
        finally:
            s.batch.shadow = shadow
        if shadow is not None:
            shadow.write(s.warp[lanes], at, size, lambda: data[lanes], landing=True)
        raw[at[:, None] + np.arange(size)] = data[lanes]
        s.copies.start(lanes, at, size)

    return execute


def copy_parts(s, ins, source, count, some, data) -> None:
    """Lanes with fewer source bytes, by the byte."""
    for i in range(data.shape[1]):
        m = some & (count > i)
        if m.any():
            raw, at = reach(s, ins, "global", source + i, 1, m, "read")
            data[m, i] = raw[at]
