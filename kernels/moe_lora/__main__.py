"""`python -m moe_lora`: every backend that can run here, in each of its forms, against the float64 oracle.

The exit code is 1 if one is wrong. One that cannot compile or run is named, and "auto" goes on without it.

On a GPU then a table of times, each backend beside the frozen linear alone: forward and backward, or for instances of
one row (decode) the forward.
"""

import statistics
import sys
from collections.abc import Iterator

import torch
from torch.nn import functional

from moe_lora.backend import autotune
from moe_lora.backend.dispatch import backends, explain, forms_of
from moe_lora.ops import linear
from moe_lora.routing import Plan, Routing
from moe_lora.verify import CASES, Case, errors, make

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDE = Case((700, 1, 579), 256, 4224, 4, 2, 32, dropout=0.1, packed=True)  # the largest tiles
_ONE = _WIDE._replace(dropout=0.0)  # in one launch, where there is one
_TRAIN = ((8, 1024, 4096, 4096), (8, 1024, 4096, 11008), (16, 110, 2048, 2048))
_DECODE = ((64, 1, 4096, 4096), (8, 1, 4096, 4096), (1, 1, 4096, 4096))


def main() -> int:
    verdicts = {"right": 0, "wrong": 0, "left out": 0, "refused": 0}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(f"{'backend':<13} {'device':<6} {'dtype':<9} {'case':<40} {'largest error':>13} {'allowed':>9}  of")
    for name, reason in backends().items():
        if reason is not None:
            print(f"{name:<13} cannot run here: {reason}")
            continue
        for device in devices:
            for dtype in _DTYPES:
                for case in CASES if device == "cpu" else (*CASES, _WIDE, _ONE):
                    for verdict in _report(name, device, dtype, case):
                        verdicts[verdict] += 1
    if "cuda" in devices:
        print_speed(torch.device("cuda"), torch.bfloat16)
    if verdicts["left out"]:
        print(f"{verdicts['left out']} cannot run on this device: auto goes on without them")
    print("all right" if not verdicts["wrong"] else f"{verdicts['wrong']} WRONG")
    return int(verdicts["wrong"] > 0)


def _report(backend: str, device: str, dtype: torch.dtype, case: Case) -> Iterator[str]:
    """One line for each form of the backend, and what became of it: right, wrong, left out or refused."""
    inputs = make(case, dtype, device=device)
    routing, suffix = inputs.routing, f"{device:<6} {str(dtype).removeprefix('torch.'):<9} {case!s:<40}"
    try:
        explain(inputs.x, inputs.weight, inputs.lora_a, routing, backend)
    except ValueError as refusal:
        print(f"{backend:<13} {suffix} not run: {refusal}")
        yield "refused"
        return
    plan = Plan(routing.experts, routing.gates, routing.offsets, 1.0, case.dropout, inputs.seed)
    for form in forms_of(backend, inputs.x, inputs.weight, inputs.lora_a, plan):
        prefix = f"{form:<13} {suffix}"
        try:
            found = errors(case, inputs, form)
        except Exception as error:  # whatever a compiler, a driver or a kernel says
            print(f"{prefix} LEFT OUT: {autotune.reason_of(error)}")
            yield "left out"
            continue
        what, (error, allowed) = max(found.items(), key=lambda item: _share(*item[1]))
        right = all(error <= allowed for error, allowed in found.values())
        print(f"{prefix} {error:>13.2e} {allowed:>9.2e}  {what}{'' if right else '  WRONG'}")
        yield "right" if right else "wrong"


def print_speed(device: torch.device, dtype: torch.dtype, shapes=(*_TRAIN, *_DECODE), rounds: int = 30) -> None:
    """Median milliseconds, E = 4, K = 2, R = 32, and the ratio to the frozen linear.

    Forward and backward over x, A, B and gates with A and B in float32; of one row an instance the forward alone, with
    A and B in `dtype`.
    """
    able = [name for name, reason in backends().items() if reason is None]
    print(
        f"\n{'instances x rows, D -> F':<26} {'linear alone':>14}" + "".join(f"{name:>22}" for name in (*able, "auto"))
    )
    for N, L, D, F in shapes:
        randn = torch.randn
        x, dy = randn(N, L, D, dtype=dtype, device=device), randn(N, L, F, dtype=dtype, device=device)
        weight, x = randn(F, D, dtype=dtype, device=device) / D**0.5, x.requires_grad_()
        lora = {"dtype": dtype if L == 1 else torch.float32, "device": device}
        lora_a, lora_b = randn(4, D, 32, **lora) / D**0.5, randn(4, 32, F, **lora)
        gates = torch.rand(N, 2, device=device)
        routing = Routing(torch.stack([torch.randperm(4)[:2] for _ in range(N)]).to(device), gates.requires_grad_())
        leaves = (x, lora_a.requires_grad_(), lora_b.requires_grad_(), gates)

        def step(name, x=x, dy=dy, weight=weight, lora_a=lora_a, lora_b=lora_b, routing=routing, leaves=leaves):
            if x.shape[1] == 1:
                with torch.no_grad():
                    if name is None:
                        functional.linear(x, weight)
                    else:
                        linear(x, weight, None, lora_a, lora_b, routing, backend=name)
            elif name is None:
                torch.autograd.grad(functional.linear(x, weight), x, dy)
            else:
                y = linear(x, weight, None, lora_a, lora_b, routing, dropout=0.1, seed=1, backend=name)
                torch.autograd.grad(y, leaves, dy)

        names = []
        for name in (None, *able, "auto"):
            try:
                step(name)
                names.append(name)
            except Exception as error:  # this backend does not run this call
                print(f"{name} left out of {N}x{L}, {D} -> {F}: {autotune.reason_of(error)}")
        times = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                times[name].append(autotune.milliseconds(lambda name=name: step(name), device))
        found = {name: statistics.median(each) for name, each in times.items()}
        cells = [
            f"{found[name]:>13.3f} ({found[name] / found[None]:.2f}x)" if name in found else "-"
            for name in (*able, "auto")
        ]
        print(f"{f'{N}x{L}, {D} -> {F}':<26} {found[None]:>14.3f}" + "".join(f"{cell:>22}" for cell in cells))


def _share(error: float, allowed: float) -> float:
    """How much of what is allowed; a NaN is the worst."""
    return float("inf") if error != error else error / allowed if allowed else error


if __name__ == "__main__":
    sys.exit(main())
