"""Routing: which experts an instance uses and with which weights; made once per batch, shared by all layers."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.export
from torch import Tensor

_assert_async = getattr(torch, "_assert_async")  # noqa: B009 (torch does not export it)


@dataclass(frozen=True, eq=False)
class Routing:
    """The chosen experts of N instances.

    Which rows of x [..., D] belong to which instance (T is the number of rows, in row-major order):

    * `offsets` given (packed): rows `offsets[i]:offsets[i+1]`, with 0 = offsets[0] <= ... <= offsets[N] = T; an
      instance may have no rows;
    * no offsets: N equal runs, instance i owns rows i·T/N to (i+1)·T/N. So x [N, L, D] is the padded batch, [N, D] one
      row each, and token routing is T instances for x [T, D] or [N, L, D]. A batch expanded for beams or
      num_return_sequences, [m·N, L, D] with the m copies of an instance adjacent, needs no new routing. The runs must
      not cut an entry of x's first dimension: N is the product of x's first dimensions, or divides the first.

    Args:
        experts: [N, K] integer, kept as int32. The same expert twice in one row adds up.
        gates: [N, K] floating point, differentiable.
        offsets: [N + 1] integer, kept as int32, or None.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree; values are looked at when the routing is first used.
    """

    experts: Tensor
    gates: Tensor
    offsets: Tensor | None = None
    _checked: set[tuple[int, int]] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self):
        experts, gates, offsets = self.experts, self.gates, self.offsets
        for name, tensor in (("experts", experts), ("gates", gates), ("offsets", offsets)):
            if not isinstance(tensor, Tensor) and not (name == "offsets" and tensor is None):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if experts.dim() != 2 or experts.shape[1] == 0:
            raise ValueError(f"experts must be [N, K] with K >= 1, got {tuple(experts.shape)}")
        if gates.shape != experts.shape:
            raise ValueError(f"gates must be [N, K] = {tuple(experts.shape)} like experts, got {tuple(gates.shape)}")
        if not gates.is_floating_point():
            raise TypeError(f"gates must be floating point, got {gates.dtype}")
        if gates.device != experts.device:
            raise ValueError(f"gates must be on {experts.device} like experts, got {gates.device}")
        object.__setattr__(self, "experts", _as_int32("experts", experts))
        if offsets is not None:
            if offsets.shape != (experts.shape[0] + 1,):
                raise ValueError(f"offsets must be [N + 1] = ({experts.shape[0] + 1},), got {tuple(offsets.shape)}")
            if offsets.device != experts.device:
                raise ValueError(f"offsets must be on {experts.device} like experts, got {offsets.device}")
            object.__setattr__(self, "offsets", _as_int32("offsets", offsets))

    def expand(self, factor: int) -> "Routing":
        """The routing of a batch whose every instance is repeated `factor` times in place, as for beams."""
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor must be an integer of at least 1, got {factor!r}")
        if factor == 1:
            return self
        if self.offsets is not None:
            raise ValueError("a packed routing (offsets given) cannot be expanded; repeat its instances before packing")
        return Routing(self.experts.repeat_interleave(factor, 0), self.gates.repeat_interleave(factor, 0))

    def to(self, device: torch.device) -> "Routing":
        """This routing on a device; what was checked stays checked."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        copy = Routing(self.experts.to(device), self.gates.to(device), offsets)
        object.__setattr__(copy, "_checked", self._checked)
        return copy

    def with_gates(self, gates: Tensor) -> "Routing":
        """The same choice of experts with other weights; what was checked stays checked."""
        other = replace(self, gates=gates)
        object.__setattr__(other, "_checked", self._checked)
        return other

    def check(self, shape: torch.Size, num_experts: int) -> None:
        """Raise ValueError unless this routing fits x of this shape and E experts.

        What needs values is looked at once per routing, and not at all while compiling; not by the host if they are on
        a GPU: there an assertion of the device stops it before the kernels that would use wrong ones.
        """
        N, K = self.experts.shape
        if num_experts < K:
            raise ValueError(f"experts must be [N, K] with K <= E = {num_experts}, got K = {K}")
        if self.offsets is None and not _splits(shape[:-1], N):
            raise ValueError(
                f"the routing's {N} instances must be x's first dimensions or divide the first, got x {tuple(shape)}; "
                "route this batch, or give offsets if it is packed"
            )
        if torch.compiler.is_compiling():
            return
        T = -1 if self.offsets is None else shape[:-1].numel()
        if (num_experts, T) not in self._checked:
            self._check_values(num_experts, T)
            self._checked.add((num_experts, T))

    def _check_values(self, num_experts: int, T: int) -> None:
        if self.experts.device.type != "cpu":
            right = ((self.experts >= 0) & (self.experts < num_experts)).all()
            _assert_async(right, f"experts must be in 0..{num_experts - 1}")
            if self.offsets is not None:
                right = (self.offsets[0] == 0) & (self.offsets[-1] == T) & (self.offsets.diff() >= 0).all()
                _assert_async(right, f"offsets must rise from 0 to x's {T} rows")
            return
        if self.experts.numel():
            low, high = (int(value) for value in self.experts.aminmax())
            if low < 0 or high >= num_experts:
                raise ValueError(f"experts must be in 0..{num_experts - 1}, got values from {low} to {high}")
        if self.offsets is not None:
            steps = self.offsets.diff()
            first, last = int(self.offsets[0]), int(self.offsets[-1])
            if first != 0 or last != T or bool((steps < 0).any()):
                raise ValueError(f"offsets must rise from 0 to x's {T} rows, got {self.offsets.tolist()}")


class Plan(NamedTuple):
    """What a backend needs to know besides tensors of the layer; the same fields as the op's schema.

    experts [N, K] int32, gates [N, K], offsets [N + 1] int32 or None (N equal runs of the T rows), scale s, dropout
    probability p and its seed (0-dim int64; None if p is 0).
    """

    experts: Tensor
    gates: Tensor
    offsets: Tensor | None
    scale: float
    dropout: float
    seed: Tensor | None


def _splits(lead: torch.Size, N: int) -> bool:
    """Whether N equal runs of rows never cut an entry of the first dimension, or are the first dimensions."""
    product = 1
    for size in lead:
        product *= size
        if product == N:
            return True
    return product == N or (N > 0 and len(lead) > 0 and lead[0] % N == 0)


def _as_int32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int32:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, got {tensor.dtype}")
    narrow = tensor.int()
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(narrow.to(tensor), tensor):
        raise ValueError(f"{name} must fit into int32, got {int(tensor[narrow != tensor][0])}")
    return narrow


torch.export.register_dataclass(Routing, serialized_type_name="moe_lora.Routing")
