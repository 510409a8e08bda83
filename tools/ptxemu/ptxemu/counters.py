"""Counters of a launch, per instruction and per tensor, as a profiler has them."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from ptxemu.parse import Instruction


@dataclass
class Traffic:
    """Accesses of one kind to one tensor.

    Attributes:
        requests: warps that made an access.
        sectors: 32-byte pieces of memory they touched, counted per request.
        bytes: what the lanes asked for.
    """

    requests: int = 0
    sectors: int = 0
    bytes: int = 0

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / max(self.requests, 1)

    @property
    def efficiency(self) -> float:
        """Bytes asked for over bytes moved: 1 is fully coalesced, more if lanes share bytes."""
        return self.bytes / max(32 * self.sectors, 1)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.requests + other.requests, self.sectors + other.sectors, self.bytes + other.bytes)


@dataclass
class SharedTraffic:
    """Accesses to shared memory.

    Attributes:
        requests: warps that made an access.
        wavefronts: passes they took.
        ideal: passes without bank conflicts.
    """

    requests: int = 0
    wavefronts: int = 0
    ideal: int = 0

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.ideal

    def __add__(self, other: "SharedTraffic") -> "SharedTraffic":
        return SharedTraffic(*(getattr(self, n) + getattr(other, n) for n in ("requests", "wavefronts", "ideal")))


@dataclass
class Profile:
    """What one launch did.

    Attributes:
        kernel: its name.
        grid: blocks in x, y, z.
        threads: of one block.
        shared_bytes: of one block, fixed and dynamic.
        tensors: names of the arguments that point to global memory.
        issued: instruction: warps that executed it.
        flops: operations by type, multiplications and additions counted apart: "bf16 mma", "f32".
        barriers: warps that arrived at a barrier.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    tensors: frozenset[str]
    code: list[Instruction] = field(repr=False)
    issued: np.ndarray = field(init=False, repr=False)
    flops: Counter = field(default_factory=Counter)
    barriers: int = 0
    traffic: dict[tuple[int, str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic), repr=False)
    wavefronts: dict[tuple[int, str], SharedTraffic] = field(
        default_factory=lambda: defaultdict(SharedTraffic), repr=False
    )
    patterns: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.issued = np.zeros(len(self.code), np.int64)

    # what tests ask for

    def loads(self, tensor: str | None = None) -> Traffic:
        return self.sum_traffic("read", tensor)

    def stores(self, tensor: str | None = None) -> Traffic:
        return self.sum_traffic("write", tensor)

    def atomics(self, tensor: str | None = None) -> Traffic:
        return self.sum_traffic("atomic", tensor)

    def sum_traffic(self, kind: str, tensor: str | None) -> Traffic:
        if tensor is not None and tensor not in self.tensors:
            raise ValueError(f"tensor must be one of {sorted(self.tensors)}, got {tensor}")
        kept = (t for (_, k, name), t in self.traffic.items() if k == kind and tensor in (None, *name.split("/")))
        return sum(kept, Traffic())

    def shared(self, kind: str | None = None) -> SharedTraffic:
        """Shared memory, "read", "write" or "atomic", or all."""
        return sum((t for (_, k), t in self.wavefronts.items() if kind in (None, k)), SharedTraffic())

    def executed(self, name: str) -> int:
        """Warps that executed an instruction: `executed("mma")`, `executed("cp.async")`."""
        return int(
            sum(
                n
                for ins, n in zip(self.code, self.issued, strict=True)
                if f"{ins.name}.{'.'.join(ins.mods)}.".startswith(name + ".")
            )
        )

    @property
    def instructions(self) -> int:
        """Instructions of all warps."""
        return int(self.issued.sum())

    @property
    def warps(self) -> int:
        return int(np.prod(self.grid)) * -(-self.threads // 32)

    # what the machine reports

    def count_global(self, ins, memory, offset: np.ndarray, size: int, m, kind: str) -> None:
        active = offset if m is None else offset[m]
        key = (size, int(active[0]) & 31, (active - active[0]).tobytes(), None if m is None else m.tobytes())
        if key not in self.patterns:
            sector = offset >> 5 if m is None else np.where(m, offset >> 5, -1)
            sector = np.sort(sector.reshape(-1, 32), 1)
            distinct = (sector[:, 1:] != sector[:, :-1]).sum() + len(sector) - (sector[:, 0] < 0).sum()
            self.patterns[key] = (int((sector[:, -1] >= 0).sum()), int(distinct), active.size * size)
        requests, sectors, asked = self.patterns[key]
        total = self.traffic[ins.index, kind, memory.name(int(active[0]))]
        total.requests += requests
        total.sectors += sectors
        total.bytes += asked

    def count_shared(self, ins, addr: np.ndarray, size: int, m, kind: str) -> None:
        """Four bytes: 32 lanes in a pass; eight: two half warps; sixteen: four quarters; lanes of one word share it."""
        first = addr[0] if m is None else addr[m][0]
        key = ("shared", size, (addr - (first & ~127)).tobytes(), None if m is None else m.tobytes())
        if key not in self.patterns:
            words, rows = max(size // 4, 1), max(size // 4, 1)
            word = (addr >> 2)[:, None] + np.arange(words)
            if m is not None:
                word = np.where(m[:, None], word, -1)
            passes = wavefronts(word.reshape(-1, 32))
            active = np.ones(len(addr), bool) if m is None else m
            self.patterns[key] = (int(active.reshape(-1, 32).any(1).sum()), int(passes.sum()), int((passes > 0).sum()))
            assert rows * len(addr) // 32 == len(passes)
        self.add_shared(ins, kind, *self.patterns[key])

    def count_rows(self, ins, addr: np.ndarray, kind: str) -> None:
        """Rows of 16 bytes, [warps, 8·matrices]: a matrix is one pass if its rows lie in different banks."""
        key = ("rows", (addr - (addr[0, 0] & ~127)).tobytes(), addr.shape)
        if key not in self.patterns:
            word = ((addr >> 2)[..., None] + np.arange(4)).reshape(-1, 32)
            self.patterns[key] = (len(addr), int(wavefronts(word).sum()), len(word))
        self.add_shared(ins, kind, *self.patterns[key])

    def add_shared(self, ins, kind: str, requests: int, passes: int, ideal: int) -> None:
        total = self.wavefronts[ins.index, kind]
        total.requests += requests
        total.wavefronts += passes
        total.ideal += ideal

    def __str__(self) -> str:
        each = f"{self.instructions / self.warps:.0f} a warp"
        lines = [
            f"{self.kernel}  grid {self.grid}, blocks of {self.threads} threads and {self.shared_bytes} shared bytes",
            f"  {self.instructions} warp instructions ({each}), {self.barriers} barrier arrivals",
            "  operations: " + (", ".join(f"{n} {name}" for name, n in sorted(self.flops.items())) or "none"),
        ]
        rows = defaultdict(Traffic)
        for (_, kind, name), t in self.traffic.items():
            rows[name, kind] = rows[name, kind] + t
        if rows:
            lines.append(
                f"  {'global':16} {'':6} {'requests':>9} {'sectors':>9} {'sec/req':>8} {'bytes':>10} {'efficiency':>10}"
            )
        for (name, kind), t in sorted(rows.items()):
            counts = f"{t.requests:9} {t.sectors:9} {t.sectors_per_request:8.2f} {t.bytes:10} {t.efficiency:10.1%}"
            lines.append(f"  {name:16} {kind:6} {counts}")
        if self.wavefronts:
            lines.append(f"  {'shared':16} {'':6} {'requests':>9} {'passes':>9} {'conflicts':>9}")
        for kind in ("read", "write", "atomic"):
            if (t := self.shared(kind)).requests:
                lines.append(f"  {'':16} {kind:6} {t.requests:9} {t.wavefronts:9} {t.conflicts:9}")
        return "\n".join(lines)

    def hot(self, count: int = 10) -> str:
        """The instructions that moved most sectors and made most bank conflicts, with their lines."""
        cost = Counter()
        for (index, _, _), t in self.traffic.items():
            cost[index] += t.sectors
        for (index, _), t in self.wavefronts.items():
            cost[index] += t.wavefronts
        return "\n".join(f"{n:9}  {self.code[index]}" for index, n in cost.most_common(count))


def wavefronts(word: np.ndarray) -> np.ndarray:
    """[passes, 32] word addresses (-1: none) to the most different words of one bank, per pass."""
    word = np.sort(word, 1)
    new = np.ones(word.shape, bool)
    new[:, 1:] = word[:, 1:] != word[:, :-1]
    new &= word >= 0
    row = np.arange(len(word))[:, None]
    bank = np.bincount((row * 32 + (word & 31))[new], minlength=32 * len(word))
    return bank.reshape(-1, 32).max(1)
