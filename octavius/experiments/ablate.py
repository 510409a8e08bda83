"""Runs of a table one by one: resumable, safe beside other processes, each finished run one line of a file.

A run is finished when its line is in the results file. Before a process starts a run it takes the run's lock, and reads
the results again: so two processes never do the same run, and a killed one leaves no trace but its unfinished run.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

console = Console(stderr=True)


@dataclass(frozen=True)
class Run:
    """One training and its scores; its fields name it.

    stage: `search` for the learning rate, scored on the validation split, or `main`, scored on the test split.
    arm: which adapter and gate; mix: which data; rate: the learning rate; seed: of the draws and the order.
    """

    table: str
    budget: str
    stage: str
    arm: str
    mix: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        return "-".join(str(value).replace(":", "to") for value in asdict(self).values())


class Table(Protocol):
    """What the runner needs of a table."""

    def runs(self, finished: Sequence[dict[str, Any]]) -> list[Run]:
        """The runs that can be done, given the lines of those that are finished, in the order they matter."""
        ...

    def execute(self, run: Run) -> dict[str, Any]:
        """Do one run; what it returns is written beside the run's fields."""
        ...


def run_table(
    table: Table, results: Path, locks: Path, deadline: float | None = None, say: Callable[[str], None] | None = None
) -> int:
    """Do the runs of a table that are not finished, until none is left that no other process is at.

    Args:
        table: what to run.
        results: the file of finished runs, one JSON line each; made if it is not there.
        locks: a folder for the locks, the same for all processes.
        deadline: seconds since the epoch after which no run starts; None for none.
        say: receives a line about each run; None prints it.
    Returns:
        How many runs this process finished.
    """
    say = say or (lambda line: console.print(line, markup=False, highlight=False))
    done = 0
    while deadline is None or time.time() < deadline:
        run = _run_one(table, results, locks, say)
        if run is None:
            break
        done += 1
    return done


def _run_one(table: Table, results: Path, locks: Path, say: Callable[[str], None]) -> Run | None:
    """Do the first run that is neither finished nor another process's; None if there is none."""
    for run in table.runs(read_results(results)):
        with _lock(locks / f"{run.key}.lock") as free:
            # Another process may have finished it, and let go of the lock, since the results were read.
            if not free or run.key in {line["key"] for line in read_results(results)}:
                continue
            say(f"start {run.key}")
            start, cpu = time.time(), time.process_time()
            line = {"key": run.key, **asdict(run), **table.execute(run)}
            line |= {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.time() - start, 1)}
            append_result(results, line)
            say(f"finished {run.key} in {line['cpu_seconds']:.0f} s of one core")
            return run
    return None


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of finished runs; a last line that a killed process left unfinished is passed over.

    Raises:
        ValueError: another line is damaged.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    lines, whole = text.split("\n"), text.endswith("\n")
    results = []
    for number, line in enumerate(lines, 1):
        if not line or (number == len(lines) and not whole):
            continue
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {number} must be JSON, got {line!r:.60}; remove it") from error
    return results


def append_result(file: Path, line: dict[str, Any]) -> None:
    """Write one line to the end of the file, whole and on the disk; a torn line before it is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        text = handle.read()
        handle.truncate(text.rfind(b"\n") + 1)
        handle.write(json.dumps(line).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock while the block runs; the kernel frees it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
