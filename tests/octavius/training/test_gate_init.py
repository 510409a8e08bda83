"""The gate's start: groups of questions have experts of their own."""

import numpy as np
import pytest
import torch
from moe_lora import InstanceGate, mutual_information

from octavius.data.batches import InstructionData
from octavius.training.gate_init import HEAVIER, group_questions, init_gate, mean_questions, start_from_groups
from tests.support import tiny


def questions(tasks, per_task=30, D=48):
    """Mean embeddings of `tasks` tasks behind a common part ten times as large, and the task of each."""
    torch.manual_seed(0)
    task = torch.arange(tasks * per_task) % tasks
    return 10 * torch.randn(D) + torch.randn(tasks, D)[task] + 0.3 * torch.randn(len(task), D), task


def started(tasks, experts, known=True, universal=False):
    m, task = questions(tasks)
    gate = InstanceGate(48, experts, universal=universal)
    gate.standardise(m)
    start_from_groups(gate, m, task.tolist() if known else [0] * len(m))
    return gate, m, task


def information(gate, m, task):
    heavier = gate(m[:, None])[1].argmax(1) if gate.universal else torch.zeros(len(m), dtype=torch.long)
    chosen = gate(m[:, None])[0].long().gather(1, heavier[:, None])[:, 0]
    table = torch.zeros(int(task.max()) + 1, gate.num_experts)
    table.index_put_((task, chosen), torch.ones(len(m)), accumulate=True)
    return mutual_information(table), table


@pytest.mark.parametrize("known", [True, False], ids=["tasks", "clusters"])
@pytest.mark.parametrize(("tasks", "experts"), [(4, 4), (4, 6), (9, 6)])
def test_tasks_have_heavier_experts_of_their_own(tasks, experts, known):
    gate, m, task = started(tasks, experts, known)
    told, table = information(gate, m, task)
    assert told > (0.95 if tasks <= experts else 0.75), table
    assert (table.sum(0) > 0).sum() == min(experts, len(table.unique(dim=1).T) if known else experts)
    gates = gate(m[:, None])[1]
    assert gates[:, 0].mean().item() == pytest.approx(HEAVIER, abs=0.01)
    drawn = InstanceGate(48, experts)
    assert information(drawn, m, task)[0] < 0.3


def test_routed_experts_of_a_universal_one_are_the_tasks():
    gate, m, task = started(4, 5, universal=True)
    experts, gates, _ = gate(m[:, None])
    table = torch.zeros(4, 5).index_put_((task, experts[:, 1].long()), torch.ones(len(m)), accumulate=True)
    assert mutual_information(table) > 0.95 and gates[:, 1].mean().item() == pytest.approx(HEAVIER, abs=0.01)


def test_groups_are_merged_split_and_bounded_by_what_differs():
    z = np.array([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
    tasks = np.array([7, 7, 8, 8, 9, 9])
    assert len(set(group_questions(z, tasks, 2).tolist())) == 2
    assert group_questions(z, tasks, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(group_questions(z, tasks, 5).tolist())) == 5
    assert len(set(group_questions(np.zeros((4, 2)), np.array([0, 0, 1, 1]), 5).tolist())) == 2


@pytest.mark.parametrize("kind", ["paper", "random", "clusters", "tasks"])
def test_kind_says_how_a_models_gate_starts(parts, kind):
    model = tiny.make(parts, gate=tiny.gate(kind=kind))
    data = InstructionData(tiny.records(parts), model.conversation, model.image_tokens, 0)
    samples = [data[index] for index in range(len(data))]
    before = model.gate.w_gating.detach().clone()
    init_gate(model, samples)
    assert torch.equal(model.gate.w_gating, before) == (kind == "paper")
    assert bool((model.gate.scale == 1).all()) == (kind == "paper")
    batch = tiny.batch(model, tiny.records(parts))
    torch.testing.assert_close(
        mean_questions(model, samples),
        model.gate.mean(model.embed(batch["input_ids"], batch["features"]), batch["gate_mask"]),
    )
    weights = model(**batch)["gates"]
    if kind == "tasks":
        tasks = torch.tensor([sample["task"] for sample in samples])
        heavier = weights.argmax(1)
        assert all(len(heavier[tasks == task].unique()) == 1 for task in tasks.unique())
        assert len(heavier.unique()) == 4


def test_gate_of_equal_questions_keeps_its_draw():
    gate = InstanceGate(8, 4)
    m = torch.ones(5, 8)
    gate.standardise(m)
    before = gate.w_gating.detach().clone()
    start_from_groups(gate, m, [0, 0, 1, 1, 1])
    assert gate.w_gating.isfinite().all() and gate(m[:, None])[1].isfinite().all() and before.isfinite().all()
