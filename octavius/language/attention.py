"""Attention for short sequences on a CPU, known to transformers as `grouped`.

    y = softmax(s q kᵀ + mask) v        G query heads share a key head: [N·Hₖ, G·T, d] times [N·Hₖ, d, L]

The queries of one key head are the rows of one product, so that keys and values are not repeated per query head.
At the length of an instruction with an image, about 100 tokens, and for the single queries of generation this
is faster than `eager`, which copies them, and `sdpa`, whose backward is slow here: see `benchmarks/bench_attention.py`.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "grouped"
BEYOND = ("softcap", "s_aux", "position_bias")  # of other families' attention, which this one does not compute


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query [N, H, T, d], key and value [N, Hₖ, L, d], additive mask [N, 1, T, L] → [N, T, H, d] and [N, H, T, L].

    Raises:
        ValueError: the model's attention has a term that is not in the formula.
    """
    if other := [name for name in BEYOND if options.get(name) is not None]:
        raise ValueError(f"attn_implementation grouped must get no {' or '.join(other)}: use eager for this model")
    N, H, T, d = query.shape
    shared, L = key.shape[1:3]
    rows = (query * scaling).reshape(N * shared, -1, d)
    scores = torch.bmm(rows, key.reshape(N * shared, L, d).transpose(1, 2)).view(N, H, T, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    mixed = torch.bmm(weights.view(N * shared, -1, L), value.reshape(N * shared, L, -1))
    return mixed.view(N, H, T, -1).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)
