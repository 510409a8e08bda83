"""Linears of one x together on the CPU: `linear_group` against one `linear` each and the frozen ones, in turn.

    base      F.linear of each
    apart     moe_lora.linear of each
    together  moe_lora.linear_group

Modes: forward, or train (forward and backward; x, A, B and gates require grad; the base's backward is dx alone, which
autograd adds up). Dropout is off. Outputs are first compared with the float64 oracle; wrong ones are not timed. Prints
and writes the 20th, 50th and 80th percentile and the ratio of the 20th percentiles to the base's.

Usage: python benchmarks/bench_group.py [--threads 1] [--seconds 6] [--dtype bfloat16] [--csv FILE]
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import moe_lora
import torch
import torch.nn.functional as F
from bench_linear import processor
from moe_lora.backend.reference import oracle
from moe_lora.routing import Plan, Routing
from torch import Tensor

E, K, R = 4, 2, 32


class Shape(NamedTuple):
    """N instances of L tokens, D features to each of the widths."""

    mode: str
    N: int
    L: int
    D: int
    widths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mode} {self.N}x{self.L} {self.D}->{'+'.join(map(str, self.widths))}"


SHAPES = (  # q, k, v and gate, up of SmolLM2-135M, then of Llama-3.1-8B
    *(Shape(mode, 8, 256, 576, widths) for mode in ("forward", "train") for widths in ((576, 192, 192), (1536, 1536))),
    *(Shape("forward", N, 1, 576, widths) for N in (1, 8, 32) for widths in ((576, 192, 192), (1536, 1536))),
    Shape("train", 8, 64, 4096, (4096, 1024, 1024)),
    *(Shape("forward", N, 1, 4096, (4096, 1024, 1024)) for N in (1, 8, 32)),
)


class Inputs(NamedTuple):
    x: Tensor
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    routing: Routing


def base(inputs: Inputs) -> list[Tensor]:
    return [F.linear(inputs.x, weight) for weight in inputs.weights]


def apart(inputs: Inputs) -> list[Tensor]:
    members = zip(inputs.weights, inputs.lora_as, inputs.lora_bs, strict=True)
    return [moe_lora.linear(inputs.x, weight, None, a, b, inputs.routing) for weight, a, b in members]


def together(inputs: Inputs) -> list[Tensor]:
    x, weights, lora_as, lora_bs, routing = inputs
    return list(moe_lora.linear_group(x, weights, [None] * len(weights), lora_as, lora_bs, routing))


PROVIDERS: dict[str, Callable[[Inputs], list[Tensor]]] = {each.__name__: each for each in (base, apart, together)}


def make(shape: Shape, dtype: torch.dtype) -> Inputs:
    """A and B in float32 over a half-precision base, as in training."""
    torch.manual_seed(0)
    mode, N, L, D, widths = shape
    inputs = Inputs(
        torch.randn(N, L, D).to(dtype),
        [(torch.randn(width, D) / D**0.5).to(dtype) for width in widths],
        [torch.randn(E, D, R) / D**0.5 for _ in widths],
        [torch.randn(E, R, width) / R**0.5 for width in widths],
        Routing(torch.rand(N, E).topk(K).indices, torch.rand(N, K)),
    )
    if mode == "train":
        for tensor in leaves(inputs):
            tensor.requires_grad_()
    return inputs


def leaves(inputs: Inputs) -> list[Tensor]:
    return [inputs.x, inputs.routing.gates, *inputs.lora_as, *inputs.lora_bs]


def wrong(provider: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> bool:
    """Whether the first rows of four instances are off by more than rounding."""
    with torch.no_grad():
        ys, few = provider(inputs), inputs.x[:4, :2]
        plan = Plan(inputs.routing.experts[:4], inputs.routing.gates[:4], None, 1.0, 0.0, None)
        for y, weight, a, b in zip(ys, inputs.weights, inputs.lora_as, inputs.lora_bs, strict=True):
            truth = oracle(few, weight, None, a, b, plan)
            if (y[:4, :2].double() - truth).abs().max() > 4e-2 * truth.abs().max():
                return True
    return False


def once(provider: Callable[[Inputs], list[Tensor]], inputs: Inputs, dys: list[Tensor] | None) -> float:
    start = time.perf_counter()
    if dys is None:
        with torch.no_grad():
            provider(inputs)
    else:
        torch.autograd.backward(provider(inputs), dys)
    took = time.perf_counter() - start
    for tensor in leaves(inputs):
        tensor.grad = None
    return took


def run(shape: Shape, dtype: torch.dtype, seconds: float) -> list[dict]:
    """One row per provider that is right; rounds over all of them until the time is over, at least five."""
    inputs = make(shape, dtype)
    dys = None
    if shape.mode == "train":
        dys = [torch.randn(shape.N, shape.L, width).to(dtype) for width in shape.widths]
    providers = {name: each for name, each in PROVIDERS.items() if name == "base" or not wrong(each, inputs)}
    for name in PROVIDERS.keys() - providers.keys():
        print(f"{shape}: {name} is WRONG, not timed")
    times: dict[str, list[float]] = {name: [] for name in providers}
    for provider in providers.values():
        once(provider, inputs, dys)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["base"]) < 5:
        for name, provider in providers.items():
            times[name].append(once(provider, inputs, dys))
    cuts = {name: statistics.quantiles(values, n=10) for name, values in times.items()}
    rows = []
    for name, cut in cuts.items():
        row = {**shape._asdict(), "widths": "+".join(map(str, shape.widths)), "provider": name}
        row |= {"p20_ms": cut[1] * 1e3, "median_ms": cut[4] * 1e3, "p80_ms": cut[7] * 1e3, "rounds": len(times[name])}
        rows.append(row | {"ratio": cut[1] / cuts["base"][1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each shape")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="the shapes whose line contains this")
    parser.add_argument("--csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}; {options.dtype}, {options.threads} threads, E {E} K {K} R {R}; 20th percentiles")
    machine = {"machine": processor(), "threads": options.threads, "dtype": options.dtype}
    rows = []
    for shape in SHAPES:
        if options.only not in str(shape):
            continue
        found = run(shape, getattr(torch, options.dtype), options.seconds)
        rows += [machine | row for row in found]
        cells = "  ".join(f"{row['provider']} {row['p20_ms']:9.3f} ms ({row['ratio']:.2f})" for row in found)
        print(f"{shape!s:<44} {cells}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
