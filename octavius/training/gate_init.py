"""Start of the gate: its input standardised by the training questions, its experts set to groups of them.

    z_i = (m_i - mean) / (deviation · sqrt(D))         m_i the mean embedding of question i
    w_gating = τ · (weights of a logistic regression from z to the question's group)

with τ such that the heavier gate is about HEAVIER on average over the questions. A gate that starts at random sends
tasks that share most of their wording to the same experts, and what training strengthens stays so; groups as they are
give every group of tasks a heavier expert of its own at the first step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from moe_lora import InstanceGate
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression

from octavius.model.octavius import Octavius

HEAVIER = 0.7  # what the heavier gate starts at, on average
QUESTIONS = 6000  # that the statistics and groups come from, at most


@torch.no_grad()
def mean_questions(model: Octavius, samples: Sequence[dict]) -> torch.Tensor:
    """Mean embeddings [n, D] of what the gate reads of each sample of an `InstructionData`."""
    table = model.llm.get_input_embeddings()
    means = []
    for sample in samples:
        ids = torch.tensor([i for i, read in zip(sample["input_ids"], sample["gate_mask"], strict=True) if read])
        means.append(model.gate.mean(table(ids.to(model.device))[None]))
    return torch.cat(means)


def init_gate(model: Octavius, samples: Any, seed: int = 0) -> None:
    """Set the model's gate as `gate.kind` of its configuration says; the paper's and a single expert's stay.

    Args:
        model: its gate is changed.
        samples: a data set (`len` and `[]`) of training samples with `input_ids`, `gate_mask` and `task`; of many,
            every n-th is read.
        seed: of the clustering.
    """
    kind, gate = model.settings.gate.kind, model.gate
    if kind == "paper" or gate.num_experts == 1:
        return
    step = max(1, len(samples) // QUESTIONS)
    chosen = [samples[index] for index in range(0, len(samples), step)]
    questions = mean_questions(model, chosen)
    if len(questions) < 2:
        raise ValueError(f"gate.kind {kind} needs at least two training questions, got {len(questions)}; use paper")
    gate.standardise(questions)
    if kind != "random" and gate.mode != "token":
        tasks = [sample["task"] for sample in chosen] if kind == "tasks" else [0] * len(chosen)
        start_from_groups(gate, questions, tasks, seed)


@torch.no_grad()
def start_from_groups(gate: InstanceGate, questions: torch.Tensor, tasks: Sequence[int], seed: int = 0) -> None:
    """Set `w_gating` so that each routed expert is the heavier one for a group of questions.

    Args:
        gate: standardised by `questions`.
        questions: [n, D] mean embeddings.
        tasks: [n], the number of the task of each. More tasks than experts are merged by k-means of their centres;
            fewer are split by k-means of their questions.
        seed: of the clustering.
    """
    first = int(gate.universal)
    z = ((questions - gate.center) * gate.scale).double().cpu().numpy()
    groups = group_questions(z, np.asarray(tasks), gate.num_experts - first, seed)
    weights = np.zeros((gate.dim, gate.num_experts))
    present = np.unique(groups)  # fewer where there are fewer distinct questions than experts
    if len(present) < 2:
        return  # all questions are the same: the random draw stays
    # z has a norm of about 1, so that the default penalty would leave the classes undivided.
    model = LogisticRegression(C=100.0, fit_intercept=False, max_iter=200).fit(z, groups)
    coefficients = model.coef_ if len(present) > 2 else np.concatenate((-model.coef_, model.coef_)) / 2
    weights[:, first + present] = coefficients.T
    gate.w_gating.copy_(torch.from_numpy(weights))
    _scale_to_heavier(gate, torch.from_numpy(z))


def group_questions(z: np.ndarray, tasks: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """[n], the group 0..number-1 of each question: its task, merged or split until there are `number`."""
    names, group = np.unique(tasks, return_inverse=True)
    if len(names) > number:
        centres = np.stack([z[group == index].mean(0) for index in range(len(names))])
        return _clusters(centres, number, seed)[group]
    if len(names) == 1 and len(np.unique(z, axis=0)) >= number:
        return _clusters(z, number, seed)
    total = len(names)
    while total < number:
        spread = [((z[group == index] - z[group == index].mean(0)) ** 2).sum() for index in range(total)]
        widest = int(np.argmax(spread))
        rows = np.flatnonzero(group == widest)
        if spread[widest] < 1e-12:  # all questions of each group are the same
            break
        halves = _clusters(z[rows], 2, seed)
        group[rows[halves == 1]] = total
        total += 1
    return group


def _scale_to_heavier(gate: InstanceGate, z: torch.Tensor) -> None:
    """Multiply `w_gating` so that the largest chosen gate is HEAVIER on average over z [n, D]."""
    w = gate.w_gating.double().cpu()[:, int(gate.universal) :]
    routed = 1 if gate.universal else min(2, gate.top_k)
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        top = (middle * z @ w).softmax(-1).topk(routed, dim=-1).values
        heavier = top[:, 0] if gate.universal else top[:, 0] / top.sum(-1)
        low, high = (middle, high) if heavier.mean() < HEAVIER else (low, middle)
    gate.w_gating.mul_(low)


def _clusters(z: np.ndarray, number: int, seed: int) -> np.ndarray:
    """[n], the k-means cluster of each row of z [n, D], the best of ten starts."""
    return KMeans(number, n_init=10, random_state=seed).fit_predict(z)  # type: ignore[arg-type]
