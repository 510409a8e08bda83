"""What the emulator runs and how fast: `python -m ptxemu.examples` [--speed] [--only NAME].

A table of the examples with their errors against numpy in float64, over the greatest value; or seconds of a matmul.
"""

import argparse
import platform
import statistics
import sys
import time

import numpy as np

from ptxemu import launch
from ptxemu.examples import EXAMPLES
from ptxemu.examples.example import Example
from ptxemu.examples.matmul import matmul, matmul_kernel, matmul_meta

TARGETS = (80, 90, 100)
KINDS = {  # words of the names of examples
    "add": ["add"],
    "softmax": ["softmax"],
    "matmul": ["matmul", "low rank"],
    "grouped matmul": ["grouped", "routed"],
    "attention": ["attention"],
    "layer norm": ["layer norm", "variance"],
    "scan": ["scan", "recurrence"],
    "sort": ["sort", "top k"],
    "histogram": ["histogram"],
    "atomics": ["atomics", "split k", "with a lock"],
    "persistent": ["persistent"],
}


def kinds(name: str) -> str:
    return ", ".join(kind for kind, words in KINDS.items() if any(word in name for word in words)) or "other"


def table(only: str | None) -> bool:
    print(f"{'kernel':24} {'kinds':28} {'tolerance':>9} " + " ".join(f"{f'sm_{t}':>8}" for t in TARGETS))
    chosen = [example for example in EXAMPLES if not only or only in example.name]
    right = True
    for example in chosen:
        cells = []
        for target in TARGETS:
            if target not in example.targets:
                cells.append(f"{'-':>8}")
                continue
            worst = max(example.run(launch, target)[0].values())
            right &= worst <= example.tolerance
            cells.append(f"{worst:8.1e}")
        print(f"{example.name:24} {kinds(example.name):28} {example.tolerance:9.0e} " + " ".join(cells), flush=True)
    print(f"{len(chosen)} kernels, {'all within' if right else 'some beyond'} their tolerance")
    return right


def speed(rounds: int = 7) -> None:
    """Processor seconds of one matmul of 128³ in bf16 by 4 warps, compiled before, with race detection and without."""
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, one thread")
    print(f"{'128x128x128 bf16, 4 warps':28} {'stages':>6} {'races off':>10} {'races on':>10} {'ratio':>6}")
    for block, stages in ((128, 1), (128, 3), (64, 3)):
        example = Example(
            "", matmul_kernel, matmul(128, 128, 128, BM=block, BN=block), 0, matmul_meta(block, block, 32, stages)
        )
        for target in TARGETS:
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for races, seconds in times.items():
                    start = time.process_time()
                    errors, _ = example.run(launch, target, emulator={"races": races})
                    seconds.append(time.process_time() - start)
                    assert errors[2] < 2e-6
            off, on = (statistics.median(seconds[1:]) for seconds in times.values())
            name = f"sm_{target}, tiles of {block}x{block}x32"
            print(f"{name:28} {stages:6} {off:9.3f}s {on:9.3f}s {on / off:6.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", help="examples whose names contain this")
    options = parser.parse_args()
    if options.speed:
        speed()
    else:
        sys.exit(not table(options.only))
