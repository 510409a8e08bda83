"""Kills short training runs at random moments and crash points, resumes them, and compares the end with a whole run's.

    python -m tests.support.killed_runs FOLDER KILLS SEED

Prints one JSON line: {"kills", "runs", "different", "refused"}.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from moe_lora import MoELoRAConfig, storage

from octavius.config import Config, TrainConfig
from octavius.training.train import train
from tests.support import tiny

FILES = ("adapter_model.safetensors", "octavius.safetensors")


class CrashPoint:
    """Ends this process, as a kill does, before or half-way of the n-th write, fsync, rename or link of `storage`."""

    def __init__(self, point: int):
        self.left = point
        for name in ("fsync", "rename", "replace", "link"):
            setattr(storage.os, name, self._around(getattr(os, name)))
        save = torch.save

        def save_half(value, path, *arguments, **options):
            self._step()
            save(value, path, *arguments, **options)
            if self.left == 0:
                os.truncate(path, os.path.getsize(path) // 2)
            self._step()

        torch.save = save_half

    def _step(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def _around(self, function):
        def call(*arguments, **options):
            self._step()
            return function(*arguments, **options)

        return call


def child(config: Config, point: int | None) -> int:
    """Start a process that trains, resuming what is there."""
    if pid := os.fork():
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if point is not None:
        CrashPoint(point)
    try:
        train(config, resume=True)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def bits(folder: Path) -> str:
    """Digest of what a run trained."""
    place = storage.check(folder)
    return sha256(b"".join((place / name).read_bytes() for name in FILES)).hexdigest()


def main(root: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill until there were `kills` kills; each run goes on until it ends."""
    rng = random.Random(seed)
    parts = tiny.save_parts(root / "parts")
    lora = MoELoRAConfig(num_experts=4, top_k=2, rank=3, alpha=6, dropout=0.2, target_modules=("q_proj", "v_proj"))
    settings = TrainConfig(str(root / "whole"), steps=8, batch_size=3, learning_rate=1e-2, save_steps=2, workers=0)
    config = Config(tiny.model_config(parts, lora=lora), tiny.data_config(parts), settings)
    start = time.monotonic()
    assert os.waitpid(child(config, None), 0)[1] == 0
    seconds, whole = time.monotonic() - start, bits(root / "whole")
    result = {"kills": 0, "runs": 0, "different": 0, "refused": 0}
    while result["kills"] < kills:
        folder = root / f"run-{result['runs']}"
        config = replace(config, train=replace(config.train, output=str(folder)))
        status = 9
        while status == 9:  # as long as it is killed
            point = rng.randrange(150) if rng.random() < 0.5 and result["kills"] < kills else None
            pid = child(config, point)
            if point is None and result["kills"] < kills:
                time.sleep(rng.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            result["kills"] += status == 9
        result["refused"] += status != 0
        result["different"] += status == 0 and bits(folder) != whole
        result["runs"] += 1
        shutil.rmtree(folder)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
