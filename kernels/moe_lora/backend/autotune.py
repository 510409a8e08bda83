"""What was measured on this machine: the times of a call's candidates, by bucket of shapes, kept on disk.

The file, `moe_lora/choices.json` in the user's cache folder, has for each device and set of versions the times in
milliseconds of each bucket's candidates, or the reason why one cannot run it. It may be copied to other machines of the
same kind. Timing a bucket costs, once, three runs of every candidate, and five more of those within 1.5 times of the
fastest: its first call takes about as long as ten to twenty later ones. On a GPU the table has each bucket twice: as
the host launches it, and replayed from a CUDA graph, which is what a call takes while a graph is captured. Nothing is
timed during a capture.

Of several ranks each chooses by the table that they have agreed on, and by rule what that table does not have, so that
all choose alike; `share_choices` is where they agree. What a rank meets and the table lacks it times for itself, for
the next `share_choices`. No layer's call waits for another rank. `export_choices` and `import_choices` carry a run's
choices to its continuation, on whatever machine.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lora.routing import Plan

_WARM_UP, _ROUNDS, _CLOSE = 2, 5, 1.5
_REPLAYED = "-replayed"
_REASON_LENGTH = 200
Times = dict[str, float | str]  # milliseconds of each candidate, or why it cannot run
Tables = dict[str, dict[str, Times]]  # by machine and bucket


@dataclass
class State:
    """What this process knows; `agreed` counts where there are several ranks."""

    measured: Tables = field(default_factory=dict)
    agreed: Tables = field(default_factory=dict)
    failed: Tables = field(default_factory=dict)  # of this process, whether or not anything is timed
    fixed: dict[str, str] = field(default_factory=dict)  # bucket -> candidate, of `import_choices`
    used: dict[str, str] = field(default_factory=dict)  # bucket -> candidate, of this process
    read: bool = False
    changes: int = 0


_state = State()


def bucket(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan, needs: Sequence[bool] | None = None
) -> str:
    """Name of the calls that share a choice: rows and rows an instance rounded up to powers of two, all else equal.

    `needs`, for a backward, says which gradients are wanted: of x, the gates, each A, each B.
    """
    (E, D, _), (N, K) = lora_as[0].shape, plan.experts.shape
    T = x.shape[:-1].numel()
    phase = "forward" if needs is None else "backward-" + "".join(str(int(need)) for need in needs)
    rows = f"T{_power_of_2(T)}-L{_power_of_2(T // max(N, 1))}{'-packed' if plan.offsets is not None else ''}"
    widths = "+".join(str(weight.shape[0]) for weight in weights)
    ranks = "+".join(dict.fromkeys(str(lora_a.shape[2]) for lora_a in lora_as))
    dtypes = "-".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x, weights[0], lora_as[0]))
    extra = f"{'-dropout' if plan.dropout else ''}{'' if weights[0].stride(1) == 1 else '-transposed'}"
    return f"{phase}-{rows}-D{D}-F{widths}-E{E}-K{K}-R{ranks}-{dtypes}{extra}"


def applies(device: torch.device) -> bool:
    """Whether the choice for this device goes by time."""
    return device.type in ("cuda", "cpu")


def may_time(device: torch.device) -> bool:
    """Whether calls may be timed here and now."""
    return applies(device) and not capturing(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def generation(device: torch.device) -> object:
    """Changes whenever the answers of this module for a device may."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return id(_state), _state.changes, capturing(device), threads


def fixed(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate of an earlier run that this one continues, if it is among these."""
    candidate = _state.fixed.get(name)
    return candidate if candidate in candidates else None


def use(name: str, candidate: str) -> None:
    """Note what a bucket's calls run, for `export_choices`."""
    _state.used[name] = candidate


def export_choices() -> dict[str, str]:
    """The candidates that this process ran, by bucket of shapes, to be saved with a run."""
    return dict(_state.used)


def import_choices(choices: dict[str, str]) -> None:
    """Fix the candidates of a run that is continued, so that the same inputs give the same bits.

    Args:
        choices: what `export_choices` returned. A candidate that cannot run a call here is passed over.
    Raises:
        TypeError: choices is no dict of strings.
    """
    if not isinstance(choices, dict) or not all(isinstance(text, str) for item in choices.items() for text in item):
        raise TypeError(f"choices must be a dict of bucket -> candidate, got {choices!r:.80}")
    _state.fixed.update(choices)
    _state.changes += 1


def known(name: str, device: torch.device, candidates: Sequence[str]) -> dict[str, float] | None:
    """Milliseconds of each candidate that can run, fastest first, if this bucket was timed with all of them."""
    if not applies(device):
        return None
    table = _tables("agreed" if _ranks() > 1 else "measured").get(_machine(device), {})
    times = (table.get(name + _REPLAYED) if capturing(device) else None) or table.get(name)
    if times is None or not set(candidates) <= set(times):
        return None
    numbers = {one: value for one in candidates if isinstance(value := times[one], (int, float))}
    return dict(sorted(numbers.items(), key=lambda item: item[1])) or None


def timed(name: str, device: torch.device, candidates: Sequence[object]) -> bool:
    """Whether this process need not time the bucket: it has done so, or the ranks have agreed on it."""
    names, machine = {str(candidate) for candidate in candidates}, _machine(device)
    kinds = ("agreed", "measured") if _ranks() > 1 else ("measured",)
    return any(names <= set(_tables(kind).get(machine, {}).get(name, {})) for kind in kinds)


def time_all(
    name: str,
    device: torch.device,
    runs: dict[str, Callable[[], object]],
    wrong: Callable[[Any], str | None] = lambda _: None,
) -> None:
    """Time the candidates in turns, keep the medians and write them down; of one that cannot run, the reason.

    Args:
        name: the bucket.
        runs: run the call by a candidate.
        wrong: says what is wrong with what a run returned; None if nothing.
    """
    able = {}
    for one, run in runs.items():
        try:
            reason = [wrong(run()) for _ in range(_WARM_UP)][-1]
        except Exception as error:  # whatever a compiler, a driver or a kernel says
            reason = reason_of(error)
        if reason is None:
            able[one] = run
        else:
            drop(name, device, one, reason)
    _record(name, device, _medians(able, lambda run: milliseconds(run, device)))
    graphs = {one: graph for one, run in able.items() if (graph := captured(run, device)) is not None}
    if len(graphs) == len(able):
        _record(name + _REPLAYED, device, _medians(graphs, lambda replay: milliseconds(replay, device)))
    if _state.failed.get(_machine(device), {}).get(name):
        _record(name, device, _state.failed[_machine(device)][name])
        _record(name + _REPLAYED, device, _state.failed[_machine(device)][name])
    _write()


def _medians(runs: dict[str, Any], clock: Callable[[Any], float]) -> Times:
    """Medians over rounds in which the candidates take turns; of one that is far from the fastest, its one time."""
    samples = {candidate: [clock(run)] for candidate, run in runs.items()}
    limit = _CLOSE * min((first for (first,) in samples.values()), default=0.0)
    close = [candidate for candidate, (first,) in samples.items() if first <= limit]
    for _ in range(_ROUNDS if len(close) > 1 else 0):
        for candidate in close:
            samples[candidate].append(clock(runs[candidate]))
    return {candidate: round(statistics.median(times), 5) for candidate, times in samples.items()}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one run, by the GPU's clock where there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """Replays a run from a CUDA graph, without the host's time; None where that cannot be."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            run()
    except RuntimeError:  # a candidate that waits for the host
        return None
    graph.replay()
    return graph.replay


def drop(name: str, device: torch.device, candidate: str, reason: str) -> None:
    """Leave a candidate out of a bucket from now on."""
    _state.failed.setdefault(_machine(device), {}).setdefault(name, {})[candidate] = reason
    _state.changes += 1


def failures(name: str, device: torch.device) -> dict[str, str]:
    """Why candidates of a bucket cannot run here."""
    machine = _machine(device)
    kinds = (_state.failed, *((_tables("measured"), _state.agreed) if applies(device) else ()))
    entries = [item for table in kinds for item in table.get(machine, {}).get(name, {}).items()]
    return {one: value for one, value in entries if isinstance(value, str)}


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_REASON_LENGTH]}"


def share_choices() -> None:
    """Has all ranks choose kernels alike, by what was measured so far; a collective, so every rank must call it.

    Call it before the first step, and again between steps when new shapes have come up: rank 0's times
    count, then those of rank 1 for what rank 0 has not met, and so on. Without several ranks there is nothing to do.
    """
    if _ranks() == 1:
        return
    everyone: list[Any] = [None] * _ranks()
    torch.distributed.all_gather_object(everyone, _tables("measured"))
    agreed: Tables = {}
    for tables in reversed(everyone):
        for machine, table in tables.items():
            agreed.setdefault(machine, {}).update(table)
    _state.agreed = agreed
    _state.changes += 1


def path() -> Path:
    """Where the table is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_lora" / "choices.json"


def _ranks() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _tables(kind: str) -> Tables:
    if not _state.read:
        _state.read = True
        _state.measured = _read()
    return getattr(_state, kind)


def _record(name: str, device: torch.device, times: Times) -> None:
    _tables("measured").setdefault(_machine(device), {}).setdefault(name, {}).update(times)
    _state.changes += 1


def _machine(device: torch.device) -> str:
    return _machine_of(device, torch.get_num_threads() if device.type == "cpu" else 0)


@cache
def _machine_of(device: torch.device, threads: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {threads} threads"
    return f"{name}, torch {torch.__version__}, triton {_version('triton')}, moe_lora {_version('octavius-moe-lora')}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read() -> Tables:
    try:
        return json.loads(path().read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _write() -> None:
    """All that the file has and all that is new, in one step, so that a reader never sees half a file."""
    merged = _read()
    for machine, table in _tables("measured").items():
        merged.setdefault(machine, {}).update(table)
    with suppress(OSError):  # a full or read-only disk costs the timing at the next start, nothing else
        _replace(merged)


def _replace(merged: Tables) -> None:
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path().parent, suffix=".tmp", delete=False) as file:
        json.dump(merged, file, indent=1, sort_keys=True)
    os.replace(file.name, path())


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
