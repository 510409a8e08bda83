"""What a base model is known by, cheaply: a hash of its parameters' names and shapes, and one value of some of them."""

import hashlib
import math
from typing import Any

from torch import Tensor, nn

_SAMPLES = 64
_PLACE = 0.618  # of a parameter's elements, the one that is looked at
_RELATIVE, _ABSOLUTE = 0.01, 1e-6  # what rounding to bfloat16 or float16 may change


def take(parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """The fingerprint of a base.

    Args:
        parameters: of the base by name, without experts and gate. Values of those that train are not looked at.
    Returns:
        What JSON can hold: structure, a hash; values, by name.
    """
    matrices = [name for name in sorted(parameters) if _readable(parameters[name])]
    step = max(1, math.ceil(len(matrices) / _SAMPLES))
    return {
        "structure": _structure(parameters),
        "values": {name: _value(parameters[name]) for name in matrices[::step]},
    }


def difference(fingerprint: dict[str, Any], parameters: dict[str, nn.Parameter]) -> str | None:
    """What tells a base from the one with this fingerprint; None if nothing does."""
    if _structure(parameters) != fingerprint["structure"]:
        return "parameters of other names or shapes"
    for name, value in fingerprint["values"].items():
        parameter = parameters[name]
        if parameter.is_floating_point() and _plain(parameter):
            own = _value(parameter)
            if not math.isclose(own, value, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
                return f"other weights: {name} holds {own:g} where it held {value:g}"
    return None


def _structure(parameters: dict[str, nn.Parameter]) -> str:
    lines = [f"{name} {_shape(parameter)}" for name, parameter in sorted(parameters.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shape(parameter: Any) -> list[int]:
    return list(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed empties what it shards


def _plain(tensor: Tensor) -> bool:
    """Whether its elements are here: not on the meta device, not sharded."""
    return tensor.numel() > 0 and not tensor.is_meta and not hasattr(tensor, "full_tensor")


def _readable(parameter: nn.Parameter) -> bool:
    frozen = not parameter.requires_grad
    return frozen and parameter.dim() > 1 and parameter.is_floating_point() and _plain(parameter)


def _value(parameter: Tensor) -> float:
    place = [int(size * _PLACE) for size in parameter.shape]
    return float(parameter.detach()[tuple(place)].float())
