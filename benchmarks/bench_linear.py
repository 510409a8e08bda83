"""`moe_lora.linear` on the CPU against the frozen base and the plain PyTorch ways, in turn in one process.

    base      F.linear alone
    peft      F.linear and one LoRA of rank K·R for all instances (what PEFT computes)
    loop      a loop over experts: index, two linears, index_add
    einsum    all experts on all rows, mixed by dense gates (the form of the Octavius paper's code)
    gather    each instance's A and B copied, bmm and baddbmm
    concat    all experts' A and B side by side, gates applied in rank space
    compiled  torch.compile of concat (with --compile)
    reference moe_lora.linear by its plain PyTorch backend
    ours      moe_lora.linear; `backend` in the CSV says which backend ran

Modes: forward, or train (forward and backward; x, A, B and gates require grad). Every provider is first compared with
the float64 oracle; one that is wrong is not timed. One thread is timed by its own CPU time, which neighbours on the
machine disturb less, more threads by the wall. Prints and writes the 20th, 50th and 80th percentile, the ratio of
the 20th percentiles to the base's, and the bytes that autograd keeps besides x and the parameters.

Usage: python benchmarks/bench_linear.py [--sweep] [--only TEXT] [--threads 1] [--seconds 6] [--dtype bfloat16]
       [--csv FILE]

A processor without bf16 dot products, or without AVX-512, is timed on one that has them by holding torch back too:
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/bench_linear.py --instructions avx512
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/bench_linear.py \
        --instructions avx2
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import moe_lora
import torch
import torch.nn.functional as F
from moe_lora.backend import cpu
from moe_lora.backend.reference import oracle
from moe_lora.routing import Plan, Routing
from torch import Tensor

native = cpu._C


class Shape(NamedTuple):
    """N instances of L tokens, D to F features; `routing`: who uses which experts."""

    mode: str
    N: int
    L: int
    D: int
    F: int
    E: int = 4
    K: int = 2
    R: int = 32
    routing: str = "uniform"

    def __str__(self) -> str:
        return f"{self.mode} {self.N}x{self.L} {self.D}->{self.F} E{self.E} K{self.K} R{self.R} {self.routing}"


TABLE = (
    Shape("train", 8, 256, 4096, 4096),
    Shape("train", 8, 256, 2048, 2048),
    Shape("forward", 8, 256, 4096, 4096),
    Shape("forward", 8, 256, 576, 576),
    Shape("forward", 1, 1, 4096, 4096),
    Shape("forward", 8, 1, 4096, 4096),
    Shape("forward", 32, 1, 4096, 4096),
)
SWEEP = (
    *(Shape(mode, 16, 91, D, F) for mode in ("forward", "train") for D, F in ((576, 576), (576, 192), (576, 1536))),
    Shape("train", 16, 91, 1536, 576),
    *(Shape("train", 8, 64, 1024, 1024, R=R) for R in (4, 16, 128)),
    *(Shape("train", 8, 64, 1024, 1024, E=E, K=2) for E in (2, 8, 32)),
    *(Shape("train", 8, 64, 1024, 1024, routing=routing) for routing in ("identical", "distinct", "skewed")),
    *(Shape("train", 512, 1, 1024, 1024, E=E) for E in (4, 32)),
    *(Shape("forward", N, 1, 576, 576) for N in (1, 4, 16, 33, 64, 128)),
    *(Shape("forward", N, 1, 4096, 1024) for N in (1, 4, 16, 64)),
    Shape("forward", 1, 512, 5120, 5120),
)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    routing: Routing


def base(x, weight, lora_a, lora_b, routing):
    return F.linear(x, weight)


def peft(x, weight, lora_a, lora_b, routing):
    K = routing.experts.shape[1]
    a, b = lora_a[:K].transpose(1, 2).flatten(0, 1), lora_b[:K].flatten(0, 1).t()
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * 1.0


def loop(x, weight, lora_a, lora_b, routing):
    y = F.linear(x, weight)
    for e in range(lora_a.shape[0]):
        n, k = (routing.experts == e).nonzero(as_tuple=True)
        if len(n):
            gates = routing.gates[n, k].to(x.dtype)[:, None, None]
            y = y.index_add(0, n, x[n] @ lora_a[e] @ lora_b[e] * gates)
    return y


def einsum(x, weight, lora_a, lora_b, routing):
    h = torch.einsum("nld,edr->nler", x, lora_a)
    out = torch.einsum("nler,erf->nlef", h, lora_b)
    return F.linear(x, weight) + torch.einsum("nlef,ne->nlf", out, _dense(x, lora_a, routing))


def gather(x, weight, lora_a, lora_b, routing):
    experts = routing.experts.long()
    a = lora_a[experts].transpose(1, 2).flatten(2)  # [N, D, K·R]
    b = (lora_b[experts] * routing.gates.to(x.dtype)[..., None, None]).flatten(1, 2)
    return torch.baddbmm(F.linear(x, weight), torch.bmm(x, a), b)


def concat(x, weight, lora_a, lora_b, routing):
    E, D, R = lora_a.shape
    gates = _dense(x, lora_a, routing).repeat_interleave(R, 1)[:, None]
    h = x @ lora_a.transpose(0, 1).reshape(D, E * R) * gates
    return torch.addmm(F.linear(x, weight).flatten(0, 1), h.flatten(0, 1), lora_b.flatten(0, 1)).view(*x.shape[:-1], -1)


def ours(x, weight, lora_a, lora_b, routing):
    return moe_lora.linear(x, weight, None, lora_a, lora_b, routing)


def reference(x, weight, lora_a, lora_b, routing):
    return moe_lora.linear(x, weight, None, lora_a, lora_b, routing, backend="reference")


def _dense(x, lora_a, routing):
    empty = x.new_zeros(x.shape[0], lora_a.shape[0])
    return empty.scatter_add(1, routing.experts.long(), routing.gates.to(x.dtype))


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (base, peft, loop, einsum, gather, concat, reference, ours)
}


def make(shape: Shape, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    mode, N, L, D, Fo, E, K, R, routing = shape
    scores = torch.rand(N, E)
    if routing == "skewed":
        scores[:, 0] += 1
        scores[: N * 3 // 4, 1] += 1
    elif routing == "identical":
        scores = scores[:1].expand(N, E)
    elif routing == "distinct":
        scores = torch.stack([torch.arange(E).roll(K * n).lt(K).float() for n in range(N)])
    inputs = Inputs(
        torch.randn(N, L, D).to(dtype),
        (torch.randn(Fo, D) / D**0.5).to(dtype),
        (torch.randn(E, D, R) / D**0.5).to(dtype),
        (torch.randn(E, R, Fo) / R**0.5).to(dtype),
        Routing(scores.topk(K).indices, torch.rand(N, K)),
    )
    if mode == "train":
        for tensor in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.routing.gates):
            tensor.requires_grad_()
    return inputs


def wrong(name: str, function: Callable[..., Tensor], inputs: Inputs) -> bool:
    """Whether the first rows of four instances are off by more than rounding; base and peft compute something else."""
    if name in ("base", "peft"):
        return False
    with torch.no_grad():
        y = function(*inputs)
        few = inputs.x[:4, :2]
        plan = Plan(inputs.routing.experts[:4], inputs.routing.gates[:4], None, 1.0, 0.0, None)
        truth = oracle(few, inputs.weight, None, inputs.lora_a, inputs.lora_b, plan)
    return bool((y[:4, :2].double() - truth).abs().max() > 4e-2 * truth.abs().max())


def kept(function: Callable[..., Tensor], inputs: Inputs) -> int:
    """Bytes that autograd saves besides x, the weight and the experts."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs[:4]}
    return sum(size for pointer, size in saved.items() if pointer not in own)


def once(function: Callable[..., Tensor], inputs: Inputs, dy: Tensor | None) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    if dy is None:
        with torch.no_grad():
            function(*inputs)
    else:
        function(*inputs).backward(dy)
    took = clock() - start
    for tensor in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.routing.gates):
        tensor.grad = None
    return took


def run(shape: Shape, providers: dict[str, Callable[..., Tensor]], dtype: torch.dtype, seconds: float) -> list[dict]:
    """One row per provider that is right; rounds over all of them until the time is over, at least five."""
    inputs = make(shape, dtype)
    dy = torch.randn(shape.N, shape.L, shape.F).to(dtype) if shape.mode == "train" else None
    for name in [name for name, function in providers.items() if wrong(name, function, inputs)]:
        print(f"{shape}: {name} is WRONG, not timed")
        providers = {key: value for key, value in providers.items() if key != name}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for function in providers.values():
        once(function, inputs, dy)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["base"]) < 5:
        for name, function in providers.items():
            times[name].append(once(function, inputs, dy))
    backend = moe_lora.explain(inputs.x, inputs.weight, inputs.lora_a, inputs.routing)
    cuts = {name: statistics.quantiles(values, n=10) for name, values in times.items()}
    rows = []
    for name, cut in cuts.items():
        row = {**shape._asdict(), "provider": name, "backend": f"{backend.backend}/{backend.kernel}" * (name == "ours")}
        row |= {"p20_ms": cut[1] * 1e3, "median_ms": cut[4] * 1e3, "p80_ms": cut[7] * 1e3, "rounds": len(times[name])}
        row |= {
            "ratio": cut[1] / cuts["base"][1],
            "kept_bytes": kept(providers[name], inputs) if dy is not None else "",
        }
        rows.append(row)
    return rows


def processor() -> str:
    """The processor's name and the native instruction set in use."""
    name = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {native.instructions() if native else 'no native kernels'}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", help="many shapes instead of the table's seven")
    parser.add_argument("--only", default="", help="the shapes whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each shape")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--instructions", choices=native.all_instructions() if native else [], help="of the native kernels"
    )
    parser.add_argument("--csv")
    options = parser.parse_args()
    if options.instructions:
        native.use_instructions(options.instructions)
    torch.set_num_threads(options.threads)
    providers = {name: PROVIDERS[name] for name in dict.fromkeys(["base", *options.providers])}
    if options.compile:
        providers["compiled"] = torch.compile(concat)
    print(f"{options.dtype}, {options.threads} threads, ratio of 20th percentiles to F.linear; ours in ms too")
    machine = {"machine": processor(), "threads": options.threads, "dtype": options.dtype}
    rows = []
    for shape in SWEEP if options.sweep else TABLE:
        if options.only not in str(shape):
            continue
        found = run(shape, providers, getattr(torch, options.dtype), options.seconds)
        rows += [machine | row for row in found]
        ratios = "  ".join(f"{row['provider']} {row['ratio']:.2f}" for row in found if row["provider"] != "base")
        print(f"{shape!s:<52} base {found[0]['p20_ms']:9.3f} ms  {ratios}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
