"""Time of reading one scene: proposals, crops and the point encoder; 100,000 points, 32 objects.

    python benchmarks/bench_points.py --preset small --threads 2

Prints seconds (median of the rounds) of every part, for float32 and bfloat16, the share of grouping, the floor (the
encoder's floating-point operations at the rate of its largest layer), and the growth of the process's memory for 8 and
for 32 objects at once. The encoder's weights are random: they do not matter for time.
"""

import argparse
import resource
import statistics
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from octavius.points.cloud import PointCloud
from octavius.points.pointbert import PRESETS, PointBert, PointBertConfig, encode, group, normalise, prepare
from octavius.points.proposals import Boxes, crop, propose


def scene(points: int, objects: int, seed: int = 0) -> tuple[PointCloud, Boxes]:
    """A floor, two walls, and ellipsoids on a grid, each in its box."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(objects**0.5))
    each, rest = points // (2 * objects), points - objects * (points // (2 * objects))
    parts, boxes = [], []
    for index in range(objects):
        size = rng.uniform(0.4, 0.9, 3)
        low = np.array([1.2 * (index % side), 1.2 * (index // side), 0.02]) + 0.3
        ball = rng.normal(size=(each, 3))
        parts.append(low + size * (0.5 + 0.5 * ball / np.linalg.norm(ball, axis=1, keepdims=True)))
        boxes.append(np.concatenate((low, low + size)))
    length = 1.2 * side + 0.6
    for axis, count in ((2, rest // 3), (0, rest // 3), (1, rest - 2 * (rest // 3))):
        plane = rng.uniform(0, (length, length, 2.5), (count, 3))
        plane[:, axis] = 0
        parts.append(plane)
    xyz = np.concatenate(parts).astype(np.float32)
    rgb = rng.random(xyz.shape).astype(np.float32)
    return PointCloud(xyz, rgb), Boxes(np.stack(boxes).astype(np.float32), [""] * objects)


def median(call, rounds: int) -> float:
    """Seconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def rate(config: PointBertConfig, dtype: torch.dtype, objects: int = 8) -> float:
    """Floating-point operations per second of the transformer's largest layer, on the tokens of a few objects."""
    x = torch.randn(objects * (config.groups + 1), config.width, dtype=dtype)
    weight = torch.randn(4 * config.width, config.width, dtype=dtype)
    return 2 * len(x) * weight.numel() / median(lambda: torch.nn.functional.linear(x, weight), 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cloud, boxes = scene(args.points, args.objects)
    objects = crop(cloud, boxes.boxes)
    config = PRESETS[args.preset]
    model = PointBert(config).eval()
    print(f"{len(cloud)} points, {len(objects)} objects, {args.preset}: {config}, {args.threads} threads")
    print(f"proposals {median(lambda: propose(cloud), args.rounds):.2f} s, {len(propose(cloud))} found")
    print(f"crops     {median(lambda: crop(cloud, boxes.boxes), args.rounds):.3f} s")
    drawn = prepare(objects, config, np.random.default_rng(0))
    with torch.inference_mode():
        seconds = median(lambda: group(normalise(drawn)[0], config.groups, config.group_size), args.rounds)
        with FlopCounterMode(display=False) as counter:
            model(drawn[:1])
    work = counter.get_total_flops() * len(objects)
    print(f"grouping  {seconds:.3f} s of")
    print(f"work      {work / 1e9:.1f} GFLOP, {work / len(objects) / 1e9:.2f} an object")
    for dtype in (torch.bfloat16, torch.float32):
        seconds = median(lambda dtype=dtype: encode(model, objects, dtype=dtype), args.rounds)
        name = str(dtype).removeprefix("torch.")
        print(f"encoder   {seconds:.3f} s in {name}, crops to features; floor {work / rate(config, dtype):.3f} s")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for chunk in (8, len(objects)):
        encode(model, objects, batch_size=chunk)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"memory    +{grown:.0f} MB at {chunk} objects at once")


if __name__ == "__main__":
    main()
