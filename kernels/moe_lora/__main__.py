"""`python -m moe_lora`: every backend that can run here against the float64 oracle; exit code 1 if one is wrong."""

import sys

import torch

from moe_lora.check import CASES, Case, errors, make
from moe_lora.dispatch import backends, explain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> int:
    wrong = 0
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(f"{'backend':<10} {'device':<6} {'dtype':<9} {'case':<40} {'largest error':>13} {'allowed':>9}  of")
    for name, reason in backends().items():
        if reason is not None:
            print(f"{name:<10} cannot run here: {reason}")
            continue
        for device in devices:
            for dtype in _DTYPES:
                for case in CASES:
                    wrong += not _report(name, device, dtype, case)
    print("all right" if not wrong else f"{wrong} WRONG")
    return int(wrong > 0)


def _report(backend: str, device: str, dtype: torch.dtype, case: Case) -> bool:
    prefix = f"{backend:<10} {device:<6} {str(dtype).removeprefix('torch.'):<9} {case!s:<40}"
    inputs = make(case, dtype, device=device)
    try:
        explain(inputs.x, inputs.weight, inputs.lora_a, inputs.routing, backend)
    except ValueError as refusal:
        print(f"{prefix} not run: {refusal}")
        return True
    found = errors(case, inputs, backend)
    what, (error, allowed) = max(found.items(), key=lambda item: _share(*item[1]))
    right = all(error <= allowed for error, allowed in found.values())
    print(f"{prefix} {error:>13.2e} {allowed:>9.2e}  {what}{'' if right else '  WRONG'}")
    return right


def _share(error: float, allowed: float) -> float:
    """How much of what is allowed; a NaN is the worst."""
    return float("inf") if error != error else error / allowed if allowed else error


if __name__ == "__main__":
    sys.exit(main())
