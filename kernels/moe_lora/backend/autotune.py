"""The fastest backend for a call on a GPU: timed at the first call of each bucket of shapes, then kept on disk.

The file, `moe_lora/choices.json` in the user's cache folder, has for each device and set of versions the choice and the
times in milliseconds of each bucket. It may be copied to other machines of the same kind. Nothing is timed while a CUDA
graph is captured. In a distributed run neither times nor the file count, since ranks could differ in both: every rank
takes the first backend that can run the call, in the order of `dispatch.py`.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from moe_lora.routing import Plan

_WARM_UP, _ROUNDS = 2, 7
_choices: dict[str, dict[str, dict[str, float]]] = {}  # of the file, once read, and of this process


def bucket(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan, needs: tuple[bool, ...] | None = None) -> str:
    """Calls of one name share a choice: rows and rows an instance rounded up to powers of two, all else equal.

    `needs`, for a backward, says which gradients are wanted.
    """
    (F, D), (E, _, R), (N, K) = weight.shape, lora_a.shape, plan.experts.shape
    T = x.shape[:-1].numel()
    what = "forward" if needs is None else "backward-" + "".join(str(int(need)) for need in needs)
    rows = f"T{_power_of_2(T)}-L{_power_of_2(T // max(N, 1))}{'-packed' if plan.offsets is not None else ''}"
    dtypes = f"{str(x.dtype).removeprefix('torch.')}-{str(lora_a.dtype).removeprefix('torch.')}"
    return f"{what}-{rows}-D{D}-F{F}-E{E}-K{K}-R{R}-{dtypes}{'-dropout' if plan.dropout else ''}"


def applies(device: torch.device) -> bool:
    """Whether the choice for this device goes by time: on one GPU, not where several ranks must choose alike."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return device.type == "cuda" and not (distributed and torch.distributed.get_world_size() > 1)


def known(name: str, device: torch.device, candidates: list[str]) -> dict[str, float] | None:
    """Milliseconds of each candidate, fastest first, if this bucket was timed with all of them."""
    times = _table(device).get(name)
    if times is None or not set(candidates) <= set(times):
        return None
    return dict(sorted(((each, times[each]) for each in candidates), key=lambda item: item[1]))


def may_time(device: torch.device) -> bool:
    """Whether calls may be timed here and now."""
    return applies(device) and not torch.cuda.is_current_stream_capturing()


def time_all(name: str, device: torch.device, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time the candidates in turns, keep the medians and write them down; fastest first."""
    for run in runs.values():
        for _ in range(_WARM_UP):
            run()
    found: dict[str, list[float]] = {each: [] for each in runs}
    for _ in range(_ROUNDS):
        for each, run in runs.items():
            found[each].append(milliseconds(run, device))
    times = _table(device).setdefault(name, {})
    times |= {each: round(statistics.median(all_times), 5) for each, all_times in found.items()}
    _write()
    return dict(sorted(times.items(), key=lambda item: item[1]))


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, by the GPU's clock where there is one."""
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


def path() -> Path:
    """Of the file."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_lora" / "choices.json"


def _table(device: torch.device) -> dict[str, dict[str, float]]:
    if not _choices:
        _choices.update(_read())
    return _choices.setdefault(_machine(device), {})


@cache
def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {_version('triton')}, moe_lora {_version('octavius-moe-lora')}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read() -> dict[str, dict[str, dict[str, float]]]:
    try:
        return json.loads(path().read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write() -> None:
    """All that the file has and all that is new, in one step, so that a reader never sees half a file."""
    merged = _read()
    for machine, table in _choices.items():
        merged.setdefault(machine, {}).update(table)
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path().parent, suffix=".tmp", delete=False) as file:
        json.dump(merged, file, indent=1, sort_keys=True)
    os.replace(file.name, path())


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
