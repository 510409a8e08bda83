"""The cost model of `roofline.py` on this CPU, where clocks can answer: one thread, bf16, A and B too.

A pass over the frozen linear, and ours with the experts in it, take the longer of their operations and their bytes at
measured ceilings; every tensor is moved once a pass. The ceilings are measured on a shape of its own: operations a
second on 1024 rows and bytes a second on one row, of `F.linear` and of our kernels with one expert of rank 1. Where
both are taken to reach what `F.linear` does, as on GPUs, the prediction is called `alike`; the other takes each at its
own ceilings. Shapes and clocks, 20th percentiles of thread CPU time, are those of `bench_linear.py`.

Usage: python benchmarks/roofline_cpu.py [--seconds 2]
"""

import argparse

import torch
from bench_linear import TABLE, Shape, base, ours, processor, run
from roofline import Ceilings, microseconds

ROWS, D, F = 1024, 3072, 6144
PROVIDERS = {"base": base, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each shape")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"{processor()}, one thread, bf16 (A and B too)")
    frozen, own = ceilings(seconds)
    for name, reached in (("F.linear", frozen), ("ours", own)):
        print(f"{name:<8} reaches {reached.operations / 1e9:.0f} GFLOP/s, {reached.bandwidth / 1e9:.1f} GB/s")
    print(f"{'':<52} {'F.linear, ms':^13} {'ours, ms':^13} {'ratio to F.linear':^24}")
    print(f"{'predicted, measured':<52} {'':>13} {'':>13} {'measured':>8} {'own':>12} {'alike':>12}")
    for shape in TABLE:
        rows = run(shape, PROVIDERS, torch.bfloat16, seconds)
        whole, times = predict(shape, frozen)[1], (predict(shape, frozen)[0], predict(shape, own)[1])
        each = [f"{ms:>6.2f} {row['p20_ms']:>6.2f}" for ms, row in zip(times, rows, strict=True)]
        measured = rows[1]["ratio"]
        predicted = [f"{ms / times[0]:>5.2f} ({measured * times[0] / ms - 1:+4.0%})" for ms in (times[1], whole)]
        print(f"{shape!s:<52} {' '.join(each)} {measured:>8.2f} {' '.join(predicted)}", flush=True)


def ceilings(seconds: float) -> tuple[Ceilings, Ceilings]:
    """Times of F.linear and of ours."""
    many, one = (Shape("forward", 1, rows, D, F, E=1, K=1, R=1) for rows in (ROWS, 1))
    times = [[row["p20_ms"] / 1e3 for row in run(shape, PROVIDERS, torch.bfloat16, seconds)] for shape in (many, one)]
    frozen, own = (Ceilings(2 * ROWS * D * F / dense, 2 * D * F / few) for dense, few in zip(*times, strict=True))
    return frozen, own


def predict(shape: Shape, reached: Ceilings) -> tuple[float, float]:
    """Milliseconds of the frozen linear and of ours: a pass forward and, to train, one backward."""
    T, D, F, ranks, size = shape.N * shape.L, shape.D, shape.F, shape.K * shape.R, 2
    flops, moved = 2 * T * D * F, size * (T * D + D * F + T * F)
    experts = size * min(shape.E, shape.N * shape.K) * shape.R * (D + F)
    low, h = 2 * T * ranks * (D + F), size * T * ranks
    frozen, whole = [(flops, moved)], [(flops + low, moved + experts + h)]
    if shape.mode == "train":  # the low-rank part's backward is dx's and that of A and B, which are written; x is read
        frozen.append((flops, moved))
        whole.append((flops + 2 * low, moved + 2 * experts + h + size * T * D))
    frozen_us, whole_us = (sum(microseconds(*each, reached) for each in passes) for passes in (frozen, whole))
    return frozen_us / 1e3, whole_us / 1e3


if __name__ == "__main__":
    main()
