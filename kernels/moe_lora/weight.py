"""A frozen weight in few bits: int8 per output channel, or int8 and int4 per group of in features.

    W[f, d] = scales[f, d // group] · q[f, d]      q in -128..127 (int8) or -8..7 (int4)

int4 lies two to a byte along a row, the lower half of the byte first, each plus 8. `scales` has one column if a channel
is one group. GGUF's Q8_0 and Q4_0 (llama.cpp) are groups of 32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen weight [F, D] that `moe_lora.linear` takes as `weight`.

    Args:
        data: int8 [F, D], or uint8 [F, D / 2] with two 4-bit numbers a byte.
        scales: floating point [F, groups]; D must be a multiple of groups.
    Raises:
        TypeError, ValueError: dtypes or shapes disagree.
    """

    data: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.data.dtype not in (torch.int8, torch.uint8) or self.data.dim() != 2:
            raise TypeError(
                f"data must be int8 [F, D] or uint8 [F, D / 2] (4 bits), got {self.data.dtype} {tuple(self.data.shape)}"
            )
        if not self.scales.is_floating_point():
            raise TypeError(f"scales must be floating point, got {self.scales.dtype}")
        F, D = self.shape
        if self.scales.dim() != 2 or self.scales.shape[0] != F or not self.scales.shape[1] or D % self.scales.shape[1]:
            raise ValueError(
                f"scales must be [F, groups] with F = {F} and groups that divide D = {D}, "
                f"got {tuple(self.scales.shape)}"
            )
        if self.scales.device != self.data.device:
            raise ValueError(f"scales must be on {self.data.device} like data, got {self.scales.device}")

    @property
    def bits(self) -> int:
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1] * (8 // self.bits)

    @property
    def group(self) -> int:
        """In features that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [F, D]: products in float32 at least, rounded once to dtype."""
        return dequantize(self.data, self.scales, dtype)

    @classmethod
    def quantize(cls, weight: Tensor, bits: int = 8, group: int | None = None) -> "QuantizedWeight":
        """Round a weight to the nearest numbers, each group scaled so that its largest fits.

        Args:
            weight: [F, D], floating point.
            bits: 8 or 4.
            group: in features that share a scale; None for a whole row.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be floating point [F, D], got {tuple(weight.shape)} {weight.dtype}")
        F, D = weight.shape
        group = D if group is None else group
        if bits not in (4, 8) or group < 1 or D % group or (bits == 4 and D % 2):
            raise ValueError(
                f"bits must be 8, or 4 with an even D, and group must divide D = {D}, got {bits} bits, group {group}"
            )
        most = 127 if bits == 8 else 7
        parts = weight.detach().float().view(F, D // group, group)
        scales = parts.abs().amax(-1) / most
        q = (parts / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round_().clamp_(-most, most)
        return cls(_pack(q.view(F, D).to(torch.int8), bits), scales)

    @classmethod
    def from_gguf(cls, blocks: Tensor, kind: str, shape: tuple[int, int]) -> "QuantizedWeight":
        """Read a GGUF tensor of blocks of 32 numbers, a float16 scale before each.

        Args:
            blocks: the tensor's bytes, uint8.
            kind: "Q8_0" or "Q4_0".
            shape: (F, D), D a multiple of 32.
        """
        F, D = shape
        size = {"Q8_0": 34, "Q4_0": 18}.get(kind)
        if size is None:
            raise ValueError(f"kind must be Q8_0 or Q4_0, got {kind!r}")
        if blocks.dtype != torch.uint8 or D % 32 or blocks.numel() != F * D // 32 * size:
            raise ValueError(
                f"blocks must be uint8 with {size} bytes for each 32 of {F} x {D} numbers, "
                f"got {blocks.numel()} of {blocks.dtype}"
            )
        blocks = blocks.reshape(F, D // 32, size)
        scales = blocks[..., :2].contiguous().view(torch.float16).view(F, D // 32).float()
        if kind == "Q8_0":
            return cls(blocks[..., 2:].contiguous().view(torch.int8).view(F, D), scales)
        halves = torch.cat((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1)  # element i, then element i + 16
        return cls(_pack(halves.view(F, D).to(torch.int8) - 8, 4), scales)


def dequantize(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`QuantizedWeight.dequantize` of its two tensors."""
    if data.dtype == torch.uint8:
        data = torch.stack((data & 15, data >> 4), -1).flatten(1).to(torch.int8) - 8
    wide = torch.promote_types(dtype, torch.float32)
    F, D = data.shape
    parts = data.view(F, scales.shape[1], -1).to(wide) * scales.to(wide)[..., None]
    return parts.view(F, D).to(dtype)


def _pack(q: Tensor, bits: int) -> Tensor:
    """Numbers [F, D] as they lie in `QuantizedWeight.data`."""
    if bits == 8:
        return q
    q = (q + 8).to(torch.uint8).view(q.shape[0], -1, 2)
    return q[..., 0] | q[..., 1] << 4
