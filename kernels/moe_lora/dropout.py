"""Dropout whose mask is a function of (seed, element), so that it is regenerated and never stored.

The one definition, which every backend repeats bit for bit. For the element at row t and column d of x [T, D]:

    c = t·D + d,  j = c >> 1,  half = c & 1                        64-bit counter; two elements share one 32-bit word
    mix(z): z ^= z >> 16; z *= 0x7feb352d; z ^= z >> 15; z *= 0x846ca68b; z ^= z >> 16
    a = lo(seed) ^ mix(hi(seed) + 0x9e3779b9);  b = hi(seed) ^ mix(a + 0x85ebca6b);  a = a ^ mix(b + 0xc2b2ae35)
    b = b ^ mix(hi(j) + 0x27d4eb2f)
    z = lo(j) + a; z ^= z >> 16; z *= 0x7feb352d; z ^= z >> 15; z += b; z *= 0x846ca68b; z ^= z >> 16
    kept  iff  int16(z >> 16·half) >= threshold - 32768,           threshold = min(round(p · 65536), 65535)

All words are unsigned 32-bit and wrap; lo and hi are the halves of a 64-bit number; int16 takes the low 16 bits as
signed. (a, b) is a bijection of the seed, so that different seeds are different keys. Source of the constants of mix:
C. Wellons, "Prospecting for hash functions" (lowbias32).
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLY = (0x7FEB352D, 0x846CA68B)
_CPU_BLOCK = 1 << 16  # words; both buffers stay in L2


def threshold(p: float) -> int:
    """Dropped elements out of 65536."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (share kept), exact for the threshold in use."""
    return 65536 / (65536 - threshold(p))


def as_seed(seed: int | Tensor | None, device: torch.device | None = None) -> Tensor:
    """The seed as a 0-dim int64 tensor; None draws one from the device's default generator, and leaves it there.

    That generator is what gradient checkpointing restores, so that a recomputed forward draws the same mask; and what a
    captured CUDA graph advances, so that each replay draws another.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype != torch.int64:
            raise ValueError(f"seed must be a 0-dim int64 tensor, got {tuple(seed.shape)} {seed.dtype}")
        if seed.is_meta:
            raise ValueError("seed must have a value, got one on the meta device; give it on the CPU")
        return seed
    if not isinstance(seed, int):
        raise TypeError(f"seed must be None, an integer or a 0-dim int64 tensor, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")
    return torch.tensor(seed, dtype=torch.int64)


def keep_mask(seed: Tensor, x: Tensor, p: float) -> Tensor:
    """[T, D] ones and zeros in x's dtype: which elements of x [T, D] are kept."""
    pairs = (x.numel() + 1) // 2
    halves = _random_words(int(seed.item()), pairs, x.device).view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(halves, threshold(p) - 32768, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _random_words(seed: int, count: int, device: torch.device, first: int = 0) -> Tensor:
    """Word z of the pairs first, ..., first + count - 1, as int32 [count]."""
    block = _CPU_BLOCK if device.type == "cpu" else 1 << 30
    words = torch.empty(count, dtype=torch.int32, device=device)
    shifted = torch.empty(min(block, count), dtype=torch.int32, device=device)
    start = 0
    while start < count:
        j = first + start
        stop = min(start + block, count, start + (1 << 32) - (j & _WORD))  # hi(j) is one number within a block
        a, b = _keys(seed, j >> 32)
        z, s = words[start:stop], shifted[: stop - start]
        torch.arange(stop - start, out=z)
        z += _signed((j & _WORD) + a)
        _xor_shift(z, s, 16)
        z *= _signed(_MULTIPLY[0])
        _xor_shift(z, s, 15)
        z += _signed(b)
        z *= _signed(_MULTIPLY[1])
        _xor_shift(z, s, 16)
        start = stop
    return words


def _keys(seed: int, high: int) -> tuple[int, int]:
    a, b = seed & _WORD, (seed >> 32) & _WORD
    a ^= _mix(b + 0x9E3779B9)
    b ^= _mix(a + 0x85EBCA6B)
    a ^= _mix(b + 0xC2B2AE35)
    return a, b ^ _mix(high + 0x27D4EB2F)


def _mix(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 16)) * _MULTIPLY[0]) & _WORD
    z = ((z ^ (z >> 15)) * _MULTIPLY[1]) & _WORD
    return z ^ (z >> 16)


def _xor_shift(z: Tensor, s: Tensor, bits: int) -> None:
    """z ^= z >> bits as unsigned: int32 shifts in the sign, the mask takes it out."""
    torch.bitwise_right_shift(z, bits, out=s)
    s &= _WORD >> bits
    z ^= s


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word
