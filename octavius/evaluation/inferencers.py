"""Ways to get an answer out of the model, by ChEF's names.

Direct  the model's greedy answer.
PPL     of the choices that a question offers the likeliest: the one with the lowest mean loss per token.
CoT     the model reasons first; its answer follows from its reasoning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavius.data.batches import Collator
from octavius.data.records import Record
from octavius.evaluation.scoring import metric_of
from octavius.language.llm import answer_logits
from octavius.language.prompts import IGNORE
from octavius.model.octavius import Octavius

CONCLUSION = "\nThe answer is"  # what follows the reasoning
SHORT = 24  # tokens of the answer that follows the reasoning


@dataclass(frozen=True)
class Questions:
    """One batch: the records, their prompts as token ids (`InstructionData` without answers), and what collates them.

    collate pads on the left.
    """

    records: list[Record]
    samples: list[dict[str, Any]]
    collate: Collator


Infer = Callable[[Octavius, Questions, int], tuple[list[str], Tensor]]  # → answers, the experts' weights [N, E]


def direct(model: Octavius, questions: Questions, max_new_tokens: int) -> tuple[list[str], Tensor]:
    """The model's greedy answer."""
    batch = questions.collate(questions.samples)
    batch.pop("labels")
    return model.generate(**_moved(batch, model), max_new_tokens=max_new_tokens)


def reasoned(model: Octavius, questions: Questions, max_new_tokens: int) -> tuple[list[str], Tensor]:
    """The model's reasoning and the answer that it draws from it, "... The answer is ..."."""
    thoughts, weights = direct(model, questions, max_new_tokens)
    samples = [
        _extended(sample, model.conversation.tokens(f" {thought}{CONCLUSION}"))
        for sample, thought in zip(questions.samples, thoughts, strict=True)
    ]
    answers, _ = direct(model, Questions(questions.records, samples, questions.collate), SHORT)
    return [f"{thought}{CONCLUSION} {text}" for thought, text in zip(thoughts, answers, strict=True)], weights


def likeliest(model: Octavius, questions: Questions, max_new_tokens: int) -> tuple[list[str], Tensor]:
    """The choice with the lowest mean loss per token, the end of the answer included.

    Raises:
        ValueError: a question offers no choices.
    """
    choices = [_choices(record) for record in questions.records]
    losses, weights = choice_losses(model, questions, choices)
    best, texts, start = [], [], 0
    for options in choices:
        row = start + int(losses[start : start + len(options)].argmin())
        best.append(row)
        texts.append(options[row - start])
        start += len(options)
    return texts, weights[best]


@torch.no_grad()
def choice_losses(model: Octavius, questions: Questions, choices: list[list[str]]) -> tuple[Tensor, Tensor]:
    """Mean loss per token of every choice of every question, one after the other, and the experts' weights.

    Args:
        choices: answers for each question.
    Returns:
        losses [M] and weights [M, E], M choices in all.
    """
    rows = [
        _extended(sample, [*model.conversation.tokens(f" {text.strip()}"), model.conversation.eos], learn=True)
        for sample, options in zip(questions.samples, choices, strict=True)
        for text in options
    ]
    collate = Collator(questions.collate.pad, questions.collate.features, False, questions.collate.objects)
    size = max(1, len(questions.records))
    parts = [_losses(model, collate(rows[start : start + size])) for start in range(0, len(rows), size)]
    return torch.cat([losses for losses, _ in parts]).cpu(), torch.cat([gates for _, gates in parts]).cpu()


INFERENCERS: dict[str, Infer] = {"Direct": direct, "PPL": likeliest, "CoT": reasoned}


def inferencer(name: str) -> Infer:
    """The inferencer of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in INFERENCERS:
        raise ValueError(f"inferencer must be one of {', '.join(INFERENCERS)}, got {name!r}")
    return INFERENCERS[name]


def _choices(record: Record) -> list[str]:
    choices = metric_of(record.truth).choices
    if choices is None:
        raise ValueError(
            f"record {record.id!r}: inferencer PPL needs choices, and {record.truth['benchmark']} has none"
        )
    return choices(record.truth)


def _extended(sample: dict[str, Any], tokens: list[int], learn: bool = False) -> dict[str, Any]:
    """A prompt with further tokens, which the gate does not read."""
    return sample | {
        "input_ids": sample["input_ids"] + tokens,
        "labels": sample["labels"] + (tokens if learn else [IGNORE] * len(tokens)),
        "gate_mask": sample["gate_mask"] + [0] * len(tokens),
    }


def _losses(model: Octavius, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss per answer token of every row, [N], and the experts' weights, [N, E]."""
    batch = _moved(batch, model)
    ids, labels = batch.pop("input_ids"), batch.pop("labels")
    gate_mask, attention_mask = batch.pop("gate_mask"), batch.pop("attention_mask")
    embeds = model.embed(ids, **batch)
    with model.routed(embeds, gate_mask, attention_mask) as routed:
        hidden = model.llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    logits = answer_logits(model.llm, hidden[rows, columns]).float()
    losses = torch.nn.functional.cross_entropy(logits, labels[rows, columns + 1], reduction="none")
    sums = torch.zeros(len(ids), device=losses.device).index_add(0, rows, losses)
    return sums / torch.bincount(rows, minlength=len(ids)).clamp(min=1), routed.weights(len(ids))


def _moved(batch: dict[str, Tensor], model: Octavius) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
