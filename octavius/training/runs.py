"""A run's folder: what it was started with, its newest whole checkpoint, whether it is finished."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lora import storage
from rich.console import Console

from octavius.config import Config

DONE = "train.json"  # what a finished run leaves beside its model
CHECKPOINT = "checkpoint"
KEEP = 2  # checkpoints
# Settings that a resumed run may change: they say how long it trains and how it goes about it, not what it computes.
FREE = {f"train.{name}" for name in ("output", "steps", "epochs", "save_steps", "log_steps", "workers")}
FREE |= {f"train.{name}" for name in ("compile", "gradient_checkpointing", "batch_size", "gradient_accumulation")}
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Start:
    """Where a run begins: with the report of a finished run, from a checkpoint, or afresh with neither."""

    report: dict[str, Any] | None = None
    checkpoint: Path | None = None
    notes: dict[str, Any] | None = None


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def find_start(config: Config, world_size: int) -> Start:
    """Look into the output folder of a run that is to be resumed.

    Raises:
        ValueError: what lies there was started with other settings, or is longer than what is asked for.
        DamagedError: there are checkpoints, and none is whole.
    """
    output = Path(config.train.output)
    finished = _finished(output)
    checkpoint, passed = storage.newest(output, CHECKPOINT)
    for reason in passed:
        console.print(f"passed over: {reason}")
    if finished:
        place, notes = finished
        check_same(notes, config, world_size, output)
        report = json.loads((place / DONE).read_text(encoding="utf-8"))
        before, now = (notes["config"]["train"][name] for name in ("steps", "epochs")), config.train
        steps, epochs = before
        if (now.steps, now.epochs) == (steps, epochs) or now.steps == report["steps"]:
            return Start(report)
        if now.steps > 0 and now.steps < report["steps"]:
            raise ValueError(
                f"{output} is finished with {report['steps']} steps, so --resume cannot make it {now.steps}; "
                "give another train.output"
            )
        if checkpoint is None:
            raise ValueError(f"{output} is finished and has no checkpoint to go on from; give another train.output")
    if checkpoint is None:
        return Start()
    notes = storage.read_manifest(checkpoint).notes
    check_same(notes, config, world_size, output)
    return Start(checkpoint=checkpoint, notes=notes)


def notes_of(config: Config, world_size: int, samples: int) -> dict[str, Any]:
    """What a checkpoint says about its run."""
    return {"config": plain(config), "world_size": world_size, "samples": samples}


def check_same(notes: dict[str, Any], config: Config, world_size: int, output: Path) -> None:
    """Raise ValueError if a run was started with other settings than the ones it is to go on with."""
    old, new = _flat(notes["config"]), _flat(plain(config))
    changed = [name for name in sorted(old.keys() | new.keys()) if name not in FREE and old.get(name) != new.get(name)]
    if changed:
        told = ", ".join(f"{name} = {old.get(name)!r} instead of {new.get(name)!r}" for name in changed[:5])
        raise ValueError(
            f"{output} was started with {told}; --resume goes on with the same settings: "
            "restore them or give another train.output"
        )
    sizes = [
        settings["train.batch_size"] * settings["train.gradient_accumulation"] * ranks
        for settings, ranks in ((old, notes["world_size"]), (new, world_size))
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{output} was started with {sizes[0]} samples a step, got {sizes[1]}: on {world_size} processes set "
            "train.batch_size and train.gradient_accumulation so that their product with it is the same"
        )


def drop_old_checkpoints(output: Path, step: int) -> None:
    """Keep the newest ones up to this step."""
    numbered = {
        int(number): path
        for path in output.glob(f"{CHECKPOINT}-*")
        if (number := path.name.removeprefix(f"{CHECKPOINT}-")).isdecimal() and int(number) <= step
    }
    for number in sorted(numbered)[:-KEEP]:
        storage.discard(numbered[number])


def _finished(output: Path) -> tuple[Path, dict[str, Any]] | None:
    if not (storage.whole(output) / DONE).is_file():
        return None
    try:
        place = storage.check(output)
    except storage.DamagedError as error:
        console.print(f"passed over: {error}")
        return None
    return place, storage.read_manifest(place).notes


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat
