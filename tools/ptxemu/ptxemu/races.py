"""Who may see what: logical clocks, and a shadow of every shared and global word.

Each warp has a clock, and for each other warp of its block the last clock value it has heard of, through a barrier.
An access is a race if an earlier access to the same word, one of the two a write, was made by another warp at a time
this one has not heard of. That holds in every order of execution: no luck of the schedule is needed. Blocks are treated
alike for global memory; they hear of each other through atomics of a single lane.
"""

import numpy as np

from ptxemu.fault import Fault


class Clocks:
    """`now[i]` of warp i (block · warps + warp) and `seen[i, w]`, what it knows of warp w of its block.

    Columns of `seen` after those of the warps: the block's tensor core, then bulk copies; they know moments by tickets.
    """

    def __init__(self, blocks: int, warps: int, columns: int = 0, tensor: bool = False):
        self.blocks, self.warps = blocks, warps
        self.readers = warps + tensor  # columns of those who read memory
        self.doubt: tuple[int, Fault] | None = None  # a block, and what it did unless another fault explains it
        self.now = np.ones(blocks * warps, np.int32)
        self.seen = np.zeros((blocks * warps, warps + columns), np.int32)
        self.fenced = np.zeros_like(self.seen)  # what `fence.proxy.async` has made visible
        self.tick(slice(None))

    def tick(self, who) -> None:
        self.seen[np.arange(len(self.now))[who], np.arange(len(self.now))[who] % self.warps] = self.now[who]

    def barrier(self, block: int | slice, warps) -> None:
        """The given warps of a block (or all of some blocks) have met."""
        seen = self.seen.reshape(self.blocks, self.warps, -1)
        if isinstance(block, slice):
            seen[block] = seen[block].max(1, keepdims=True)
            self.now.reshape(self.blocks, self.warps)[block] += 1
            self.tick(slice(None))
        else:
            seen[block, warps] = seen[block, warps].max(0)
            who = block * self.warps + np.asarray(warps)
            self.now[who] += 1
            self.tick(who)

    def fence(self, who: np.ndarray) -> None:
        """Writes so far, own and heard of, are visible to asynchronous readers; later own ones are not."""
        self.fenced[who] = self.seen[who]
        self.now[who] += 1
        self.tick(who)

    def settle(self, block: int | None = None) -> None:
        """A block has met at a barrier, or all has ended: nobody came to explain the fault in doubt."""
        if self.doubt and block in (None, self.doubt[0]):
            raise self.doubt[1]


class SharedShadow:
    """The last writer, the readers and the copies in flight of each granule (the narrowest access of the kernel).

    An `agent`, where given, is who accesses memory for a warp, asynchronously: its column of `Clocks.seen`, its ticket.
    """

    name = "shared memory"

    def __init__(self, clocks: Clocks, memory: np.ndarray, granule: int, patient: bool):
        n = len(memory) // granule
        self.clocks, self.memory, self.granule, self.patient = clocks, memory, granule, patient
        self.writer = np.full(n, -1, np.int16)  # column
        self.written = np.zeros(n, np.int32)  # its clock
        self.read_at = np.zeros((clocks.readers, n), np.int32)  # last clock at which each read
        self.store_writer, self.stored = self.writer.copy(), self.written.copy()  # of the last that is not atomic
        self.landing = np.zeros(n, bool)  # an asynchronous copy is in flight
        self.held = np.zeros(n, np.int32)  # asynchronous reads in flight (wgmma, bulk stores)

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        first = at // self.granule
        k = size // self.granule
        return first[..., None] + np.arange(k) if k > 1 else first[..., None]

    def read(self, warp: np.ndarray, at: np.ndarray, size: int, proxy: bool = False, agent=None) -> None:
        """Warps read bytes [at, at + size) of the flat memory; `proxy`: asynchronously, as wgmma does."""
        g, clocks = self.granules(at, size), self.clocks
        writer = self.writer[g]
        if (flying := self.landing[g]).any():
            text = f"{self.name} is read before the wait for the copy that fills it" + self.where(g, flying)
            own = (flying & (writer == (warp % clocks.warps)[:, None])).any()
            self.suspect(warp, Fault("asynchronous copy", text), bool(own))
        if (writer < 0).any():
            text = f"{self.name} is read that nobody wrote" + self.where(g, writer < 0)
            self.suspect(warp, Fault("uninitialised", text), False)
        bad = self.written[g] > clocks.seen[warp[:, None], writer]
        if agent:  # products of one tensor core go in order
            bad &= writer != agent[0]
        if (bulk := bad & (writer > clocks.warps)).any():
            text = "shared memory is read before the wait on the mbarrier of the copy that fills it"
            raise Fault("asynchronous copy", text + self.where(g, bulk))
        if bad.any():
            text = f"a warp reads {self.name} that another wrote, with no barrier between"
            raise Fault("race", text + self.who(g, np.asarray(bad), warp))
        if proxy:
            other = (warp // clocks.warps * clocks.warps)[:, None] + np.minimum(writer, clocks.warps - 1)
            bad = self.written[g] > np.maximum(clocks.fenced[other, writer], clocks.fenced[warp[:, None], writer])
            bad &= writer < clocks.warps
            if bad.any():
                text = "an asynchronous read follows a write with no fence.proxy.async between"
                raise Fault("race", text + self.who(g, np.asarray(bad), warp))
        column, now = agent or ((warp % clocks.warps)[:, None], clocks.now[warp][:, None])
        self.read_at[column, g] = now

    def write(
        self, warp: np.ndarray, at: np.ndarray, size: int, values=None, atomic=False, landing=False, agent=None
    ) -> None:
        """Warps write; `values()` are the bytes of each lane: warps may write one value to one place."""
        g, clocks = self.granules(at, size), self.clocks
        if (flying := self.landing[g]).any():
            text = f"{self.name} is written while a copy into it is in flight"
            raise Fault("asynchronous copy", text + self.where(g, flying))
        if (held := self.held[g] > 0).any():
            text = f"{self.name} is written while an asynchronous instruction reads it"
            raise Fault("race", text + self.where(g, held))
        seen, writer = clocks.seen[warp], self.writer[g]
        if atomic:
            if (writer < 0).any():
                text = f"an atomic meets {self.name} that nobody wrote" + self.where(g, writer < 0)
                self.suspect(warp, Fault("uninitialised", text), False)
            bad = self.stored[g] > seen[np.arange(len(warp))[:, None], self.store_writer[g]]
        else:
            bad = self.written[g] > seen[np.arange(len(warp))[:, None], writer]
        in_order = agent[0] if agent and agent[0] < clocks.readers else None  # the tensor core
        if in_order is not None:
            bad &= writer != in_order
        if bad.any() and self.changes(at, size, values, np.asarray(bad.any(1))):
            text = f"two warps write one place of {self.name}, with no barrier between"
            raise Fault("race", text + self.who(g, np.asarray(bad), warp))
        late = self.read_at[:, g] > seen.T[: clocks.readers, :, None]
        if in_order is not None:
            late[in_order] = False
        if (bad := late.any(0)).any():
            text = f"a warp writes {self.name} that another read, with no barrier between"
            raise Fault("race", text + self.who(g, np.asarray(bad), warp))
        mine = np.broadcast_to((warp % clocks.warps)[:, None], g.shape)
        self.writer[g] = mine
        if not atomic and (bad := self.writer[g] != mine).any() and self.disagree(at, size, values):
            text = f"two warps write one place of {self.name} in one instruction"
            raise Fault("race", text + self.where(g, bad))
        self.written[g] = clocks.now[warp][:, None]
        if agent:
            self.writer[g], self.written[g] = agent
        if not atomic:
            self.store_writer[g], self.stored[g] = self.writer[g], self.written[g]
        self.landing[g] = landing

    def suspect(self, warp: np.ndarray, fault: Fault, certain: bool) -> None:
        """A warp came too early, for whichever reason: if another still writes there unordered, that is a race.

        With warps in step all that comes before has been done, and the fault is certain.
        """
        if certain or not self.patient:
            raise fault
        self.clocks.doubt = self.clocks.doubt or (int(warp[0]) // self.clocks.warps, fault)

    def changes(self, at: np.ndarray, size: int, values, lanes: np.ndarray) -> bool:
        if values is None:
            return True
        return bool((self.memory[at[lanes][:, None] + np.arange(size)] != values()[lanes]).any())

    def disagree(self, at: np.ndarray, size: int, values) -> bool:
        """Lanes that write one place have different values there."""
        if values is None:
            return True
        place, value = at[:, None] + np.arange(size), values()
        self.memory[place] = value
        return bool((self.memory[place] != value).any())

    def land(self, warp: np.ndarray, at: np.ndarray, size: int, agent=None) -> None:
        """An asynchronous copy has arrived, and its warp knows; or those will know who hear of the agent's ticket."""
        g = self.granules(at, size)
        early = (self.read_at[:, g] > self.clocks.seen[warp].T[: self.clocks.readers, :, None]).any(0)
        if self.clocks.doubt and early.any():
            text = "a warp reads what another copies, with no barrier after the wait of the other"
            raise Fault("race", text + self.who(g, np.asarray(early), warp))
        self.landing[g] = False
        self.written[g] = self.stored[g] = agent[1] if agent else self.clocks.now[warp][:, None]
        if agent:
            self.writer[g] = self.store_writer[g] = agent[0]

    def hold(self, places: np.ndarray) -> None:
        """An asynchronous instruction of one warp begins to read granules."""
        self.held[places] += 1

    def release(self, warp: int, places: np.ndarray) -> None:
        """It has read them, and its warp knows: others must hear of it before they write."""
        self.held[places] -= 1
        self.read_at[warp % self.clocks.warps, places] = self.clocks.now[warp]

    def where(self, g: np.ndarray, bad: np.ndarray) -> str:
        size = len(self.writer) * self.granule // self.clocks.blocks
        return f" (shared byte {int(g[bad][0]) * self.granule % size})"

    def who(self, g: np.ndarray, bad: np.ndarray, warp: np.ndarray) -> str:
        w = np.broadcast_to((warp % self.clocks.warps)[:, None], g.shape)[bad][0]
        return self.where(g, bad) + f": warp {int(w)}; last written by {self.writer_name(int(self.writer[g][bad][0]))}"

    def writer_name(self, writer: int) -> str:
        if writer < self.clocks.warps:
            return f"warp {writer}"
        return "the tensor core" if writer == self.clocks.warps else "a bulk copy"


class GlobalShadow:
    """The last block that wrote, and that read, each granule of global memory, and what blocks know of each other."""

    def __init__(self, blocks: int, size: int, granule: int):
        n = size // granule + 1
        self.granule, self.blocks = granule, blocks
        self.writer, self.written = np.zeros(n, np.int32), np.zeros(n, np.int32)  # block + 1, its clock; 0: nobody
        self.reader, self.read_at = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.shared = np.zeros(n, bool)  # more than one block has read it
        self.store_writer, self.stored = self.writer.copy(), self.written.copy()  # of the last that is not atomic
        self.now = np.ones(blocks, np.int32)
        self.seen: dict[int, np.ndarray] = {}  # block: what it knows of all others
        self.signals: dict[int, np.ndarray] = {}  # address of an atomic: what its last releases knew

    def synchronise(self, block: int, address: int) -> None:
        """A single-lane atomic: the block hears of all who came before it here, and tells all who come after."""
        mine = self.seen.setdefault(block, np.zeros(self.blocks, np.int32))
        mine[block] = self.now[block]
        if address in self.signals:
            np.maximum(mine, self.signals[address], out=mine)
        self.signals[address] = mine.copy()
        self.now[block] += 1

    def unknown(self, block: np.ndarray, other: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Accesses by `other` (block + 1, 0 for none) at their clock `at` that `block` has not heard of."""
        bad = (other != 0) & (other != block + 1)
        if self.seen and bad.any():
            for i in zip(*np.nonzero(bad), strict=True):
                known = self.seen.get(int(np.broadcast_to(block, bad.shape)[i]))
                bad[i] = known is None or at[i] > known[other[i] - 1]
        return bad

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        return (at // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def read(self, block: np.ndarray, at: np.ndarray, size: int) -> None:
        g, block = self.granules(at, size), block[:, None]
        bad = self.unknown(block, self.writer[g], self.written[g])
        if bad.any():
            raise Fault(
                "blocks",
                self.who(
                    "a block reads what another wrote, with nothing between to order them", g, bad, block, self.writer
                ),
            )
        self.shared[g] |= (self.reader[g] != 0) & (self.reader[g] != block + 1)
        self.reader[g] = block + 1
        self.read_at[g] = self.now[block]

    def write(self, block: np.ndarray, at: np.ndarray, size: int, atomic: bool = False) -> None:
        g, block = self.granules(at, size), block[:, None]
        writer, written = (self.store_writer, self.stored) if atomic else (self.writer, self.written)
        bad = self.unknown(block, writer[g], written[g])
        if bad.any():
            raise Fault("blocks", self.who("two blocks write one address", g, bad, block, self.writer))
        bad = self.unknown(block, self.reader[g], self.read_at[g])
        if not self.seen:
            bad |= self.shared[g]
        if bad.any():
            raise Fault(
                "blocks",
                self.who(
                    "a block writes what another read, with nothing between to order them", g, bad, block, self.reader
                ),
            )
        mine = np.broadcast_to(block + 1, g.shape)
        self.writer[g] = mine
        if not atomic and (bad := self.writer[g] != mine).any():
            raise Fault("blocks", self.who("two blocks write one address", g, bad, block, self.writer))
        self.written[g] = self.now[block]
        if not atomic:
            self.store_writer[g], self.stored[g] = self.writer[g], self.written[g]

    def who(self, text: str, g: np.ndarray, bad: np.ndarray, block: np.ndarray, other: np.ndarray) -> str:
        mine = int(np.broadcast_to(block, g.shape)[bad][0])
        return f"{text} (block {mine}, after block {int(other[g][bad][0]) - 1})@{int(g[bad][0]) * self.granule}"
