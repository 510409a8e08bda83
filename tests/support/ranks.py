"""One of several gloo ranks whose files of times contradict each other; it writes down what it chose.

Usage: python -m tests.support.ranks RANK WORLD FOLDER
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import moe_lora
import torch
from moe_lora.backend import autotune, dispatch, reference
from moe_lora.ops import Plan

log: list[str] = []


def module(name: str) -> SimpleNamespace:
    def forward(*call):
        log.append(name)
        return reference.forward(*call[:6])

    able = {"unavailable": lambda: None, "refuses": reference.refuses}
    return SimpleNamespace(**able, forward=forward)


def call(T: int) -> str:
    """Runs one linear of so many rows; which backend made y."""
    routing = moe_lora.Routing(torch.tensor([[0, 1]]), torch.ones(1, 2))
    moe_lora.linear(torch.ones(1, T, 8), torch.ones(5, 8), None, torch.ones(3, 8, 4), torch.ones(3, 4, 5), routing)
    return log[-1]


def bucket(T: int) -> str:
    plan = Plan(torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2), None, 1.0, 0.0, None)
    return autotune.bucket(torch.ones(1, T, 8), [torch.ones(5, 8)], [torch.ones(3, 8, 4)], plan)


def main(rank: int, world: int, folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder / str(rank))
    dispatch._BACKENDS = {name: module(name) for name in ("first", "second", "third")}
    quick = ("second", "third")[rank % 2]  # what this rank's file, and its clock, say
    autotune.milliseconds = lambda run, device: run() and (0.1 if log[-1] == quick else 1.0)
    autotune._record(bucket(64), torch.device("cpu"), {one: 0.1 if one == quick else 1.0 for one in dispatch._BACKENDS})
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    chosen = {"before the first share": call(64)}
    autotune.share_choices()
    chosen["known to all"] = call(64)
    if rank == 1:  # a bucket that one rank alone meets: nobody waits for it
        chosen["met alone"] = call(512)
        assert len(log) > 10, "it was timed"
    autotune.share_choices()
    chosen["after the next share"] = call(512)
    chosen["known to all, again"] = call(64)
    (folder / f"{rank}.json").write_text(json.dumps(chosen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
