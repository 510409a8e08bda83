"""A model that routes itself: `attach` puts experts and their gate into it, and it is used and trained as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_lora.calls import GATE_NAME, calls_of, check_gate, give_gate
from moe_lora.checkpoint import SavePretrained
from moe_lora.config import GateConfig, MoELoRAConfig
from moe_lora.context import enter
from moe_lora.inject import apply
from moe_lora.slot import BASE


def attach(model: nn.Module, config: MoELoRAConfig, gate: GateConfig | None = None) -> nn.Module:
    """Gives a model experts and the gate that chooses among them, in place; it then routes itself in every call.

    `model(...)` and `model.generate(...)` route by the question that is in what they are called with, once per call:
    the caller's `question_mask` [B, L], or the tokens before the first label, or those before `gate.answer_marker`, or
    in generation the prompt; if nothing says what the question is, the call raises. In a packed batch every document
    has its own routing. An explicit `moe_lora.route` round a call counts before the gate.

    Args:
        model: any model with `get_input_embeddings`, as those of transformers.
        config: how many experts of which rank, on which linears.
        gate: how it is gated; None means the defaults of `GateConfig`.
    Returns:
        The model; its gate is its child `moe_lora_gate`.
    Raises:
        ValueError, TypeError: as `apply`, or the model has no input embeddings.
    """
    gate = GateConfig() if gate is None else gate
    if not isinstance(gate, GateConfig):
        raise TypeError(f"gate must be a moe_lora.GateConfig, got {type(gate).__name__}")
    check_gate(model, gate)
    apply(model, config)
    give_gate(model, config, gate)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model)
    return model


def parameter_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What trains, as groups for an optimizer: the gate with its own rate and without decay.

    With an unmodified Trainer: `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-4)), None))`.

    Args:
        model: a model with experts, or one that holds it.
        lr: learning rate of all but the gate.
        gate_lr: of the gate; None means `GateConfig.lr`, or lr if that is None too.
        weight_decay: of all but the gate and vectors (biases, norms).
    Returns:
        Groups with params, lr, weight_decay and name ("experts", "vectors", "gate"); none is empty.
    Raises:
        ValueError: the model has no experts, or nothing trains.
    """
    inner, calls = calls_of(model)
    gate = getattr(inner, GATE_NAME, None)
    own = set() if gate is None else set(gate.parameters())
    if gate_lr is None:
        gate_lr = lr if calls.gate is None or calls.gate.lr is None else calls.gate.lr
    groups: dict[str, dict[str, Any]] = {
        "experts": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": lr, "weight_decay": 0.0},
        "gate": {"params": [], "lr": gate_lr, "weight_decay": 0.0},
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "gate" if parameter in own else "vectors" if parameter.dim() < 2 else "experts"
            groups[name]["params"].append(parameter)
    found = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not found:
        raise ValueError("model must have parameters that train, got none with requires_grad")
    return found


@contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, in this thread or task, the model computes what it did before it had experts.

    Args:
        model: a model with experts, or one that holds it.
    Yields:
        The model.
    Raises:
        ValueError: the model has no experts.
    """
    with enter(calls_of(model)[1].slot, BASE):
        yield model


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, in PEFT's words."""
    trains = sum(_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    total = sum(_numel(parameter) for parameter in model.parameters())
    share = 100 * trains / total if total else 0.0
    print(f"trainable params: {trains:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def _numel(parameter: torch.Tensor) -> int:
    return parameter.numel() or getattr(parameter, "ds_numel", 0)  # DeepSpeed empties what it shards
