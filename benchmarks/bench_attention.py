"""Attention of one layer of the embedded LLM, milliseconds: grouped (ours), eager and sdpa of transformers.

Run: OMP_NUM_THREADS=1 python benchmarks/bench_attention.py
"""

import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from octavius.language.attention import grouped_attention

HEADS, SHARED, WIDTH = 9, 3, 64  # SmolLM2-135M
FORMS = {"grouped": grouped_attention, "eager": eager_attention_forward, "sdpa": sdpa_attention_forward}


class Layer(nn.Module):
    """What the attention functions ask of a layer."""

    num_key_value_groups, is_causal = HEADS // SHARED, True


def inputs(N: int, T: int, L: int, learn: bool) -> list[torch.Tensor]:
    """Query, key, value as a layer makes them, and the causal mask."""
    q, k, v = (
        torch.randn(N, rows, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2).requires_grad_(learn)
        for rows, heads in ((T, HEADS), (L, SHARED), (L, SHARED))
    )
    hidden = torch.ones(T, L, dtype=torch.bool).triu(L - T + 1)
    mask = torch.zeros(N, 1, T, L, dtype=torch.bfloat16).masked_fill(hidden, torch.finfo(torch.bfloat16).min)
    return [q, k, v, mask]


def run(form: Callable, tensors: list[torch.Tensor], learn: bool) -> None:
    with torch.set_grad_enabled(learn):
        y = form(LAYER, *tensors, scaling=WIDTH**-0.5)[0]
        if learn:
            torch.autograd.grad(y, tensors[:3], torch.ones_like(y))


LAYER = Layer()


def main(rounds: int = 40) -> None:
    table = Table("regime", *FORMS, title=f"p20 ms of {rounds} rounds, bfloat16, {torch.get_num_threads()} threads")
    for name, N, T, L, learn in (
        ("train 8 x 80", 8, 80, 80, True),
        ("train 8 x 110", 8, 110, 110, True),
        ("train 8 x 170", 8, 170, 170, True),
        ("train 8 x 256", 8, 256, 256, True),
        ("generate 1 x 1 of 100", 1, 1, 100, False),
        ("generate 32 x 1 of 64", 32, 1, 64, False),
        ("generate 32 x 1 of 130", 32, 1, 130, False),
    ):
        tensors, times = inputs(N, T, L, learn), {form: [] for form in FORMS}
        for _ in range(rounds):
            for label, form in FORMS.items():
                start = time.perf_counter()
                run(form, tensors, learn)
                times[label].append(time.perf_counter() - start)
        table.add_row(name, *(f"{sorted(times[form])[rounds // 5] * 1e3:.2f}" for form in FORMS))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
