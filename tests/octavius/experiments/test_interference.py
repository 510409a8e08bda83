"""The interference benchmark: its data, its arms, one real small run of each kind, and its table."""

from dataclasses import replace
from pathlib import Path

import moe_lora
import numpy as np
import pytest
import torch

from octavius.data.loading import Stores
from octavius.data.mini_lamm.cutouts import CATEGORIES
from octavius.data.records import Record
from octavius.experiments import interference as module
from octavius.experiments.ablate import append_result, run_table
from octavius.experiments.interference import (
    ARMS,
    BUDGETS,
    OURS,
    PHRASES,
    SINGLE,
    TOTAL,
    Budget,
    Interference,
    PooledTower,
    best_rates,
    mixture,
)
from octavius.experiments.interference_table import interval, write_interference
from octavius.vision.features import FeatureStore
from octavius.vision.towers import load_tower
from tests.support import tiny

LABELS = ("bird", "fish", "tool", "sign", "fruit")
TINY = Budget(8, (5, 5, 5), None, 2, 6, (2, 1), ("alone", "1:1", "1:4", "all"), (1e-3, 1e-2))


def pool(folder: Path) -> list[Record]:
    records = []
    for index, label in enumerate(LABELS):
        image = folder / f"{index}.png"
        records.append(
            Record(f"c{index}", image, [("?", label)], "normal", {"benchmark": "classification", "label": label})
        )
        for task, text in (("caption", f"A {label}."), ("hair", "red"), ("smile", "no")):
            records.append(Record(f"{task}{index}", image, [("?", text)], "normal", {"benchmark": task}))
    return records


@pytest.fixture
def table(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(BUDGETS, "tiny", TINY)
    made = Interference("tiny", tmp_path / "runs", tiny.model_config(parts))
    records = pool(parts.data.parent)
    made.pools = {"train": records, "validation": records[::4], "test": records[::4]}
    made.stores = Stores(FeatureStore(PooledTower(load_tower(str(parts.tower)), 1)), None)
    return made


def test_mixtures_hold_the_same_watched_samples_and_no_unseen_phrasing(tmp_path):
    records = pool(tmp_path)

    def watched(mix, seed=3):
        return [r for r in mixture(records, mix, 8, seed) if r.task == "class"]

    alone = watched("alone")
    assert len(alone) == 8 and all(watched(mix) == alone for mix in ("1:1", "1:4", "1:16", "all"))
    assert watched("alone", 4) != alone
    sizes = {mix: len(mixture(records, mix, 8, 3)) for mix in ("alone", "1:1", "1:4", "1:16", "all")}
    assert sizes == {"alone": 8, "1:1": 16, "1:4": 40, "1:16": 136, "all": 48}
    for record in mixture(records, "all", 8, 3):
        assert record.turns[0][0] in PHRASES[record.task][:-1]
    labels = sorted(CATEGORIES)
    for record in mixture(records, "1:1", 8, 3):
        label, answer = record.source.stem, record.turns[0][1]
        named = LABELS[int(label)]
        assert answer == (named if record.task == "class" else labels[(labels.index(named) + 1) % len(labels)])


def test_arms_have_the_stated_ranks_and_equal_steps(table):
    sizes = {}
    for arm in ARMS:
        lora = table.arm(arm, "1:4").lora
        sizes[arm] = (lora.num_experts, lora.top_k, lora.rank)
        assert lora.alpha / lora.rank == lora.top_k  # gates sum to 1
    assert sizes[SINGLE] == (1, 1, 4) and sizes[TOTAL] == (1, 1, 12) and sizes[OURS] == (6, 2, 2)
    assert sizes["one LoRA a task (oracle)"] == (2, 1, 4) and table.arm(ARMS[2], "all").lora.num_experts == 6


def test_search_comes_before_the_main_runs_at_the_best_rate(table):
    first = table.runs([])
    assert {run.stage for run in first} == {"search"} and len(first) == 2 * len(ARMS)
    lines = [
        {"key": run.key, "stage": "search", "budget": "tiny", "arm": run.arm, "rate": run.rate, "score": run.rate}
        for run in first
        if run.arm == SINGLE
    ]
    assert best_rates(lines, "tiny", 2) == {SINGLE: 1e-2} and best_rates(lines[:1], "tiny", 2) == {}
    mains = [run for run in table.runs(lines) if run.stage == "main"]
    assert {(run.arm, run.rate) for run in mains} == {(SINGLE, 1e-2)}
    assert {(run.mix, run.seed) for run in mains} == {(mix, seed) for mix in TINY.mixes for seed in (0, 1)}


@pytest.mark.slow
def test_table_runs_to_the_end_and_is_written(table, tmp_path, monkeypatch):
    monkeypatch.setitem(BUDGETS, "tiny", replace(TINY, seeds=(1, 1), mixes=("alone", "1:4"), rates=(1e-2,)))
    table.budget = BUDGETS["tiny"]
    results = tmp_path / "interference.jsonl"
    done = run_table(table, results, tmp_path / "locks", say=lambda _: None)
    assert done == len(ARMS) + 3 * 2 + 4
    assert run_table(table, results, tmp_path / "locks") == 0
    text = write_interference(results, tmp_path / "interference.md", "tiny")
    assert f"{done} runs are finished" in text and "| ours minus one LoRA, 1:4 |" in text
    assert text.count("missing") == 4 + 1  # the arms without a mixing curve, and the heading


def test_run_scores_the_watched_task_and_trains_adapters_and_gate_only(table, monkeypatch):
    models = []
    fit = module.fit

    def watched(model, *arguments, **options):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = fit(model, *arguments, **options)
        models.append((before, model))
        return report

    monkeypatch.setattr(module, "fit", watched)
    run = replace(next(run for run in table.runs([]) if run.arm == OURS), mix="1:4")
    line = table.execute(run)
    assert line["split"] == "validation" and len(line["hits"]) == 5 and line["steps"] == 5
    assert line["score"] == line["hits"].count("1") / 5 and 0 <= line["information"] <= 1
    (before, model), still = models[0], ("projector.", "markers", "gate.center", "gate.scale")
    for name, value in model.state_dict().items():
        if "lora_b" in name or name == "gate.w_gating":
            assert not torch.equal(value, before[name]), name
        elif name.startswith(still):
            assert torch.equal(value, before[name]), name
    frozen = table.execute(replace(run, arm="random router"))
    assert frozen["steps"] == 5 and torch.equal(models[1][1].gate.w_gating, models[1][0]["gate.w_gating"])
    assert isinstance(models[1][1].gate, moe_lora.InstanceGate)


def test_table_tells_what_is_missing_and_intervals_are_paired(tmp_path, monkeypatch):
    monkeypatch.setitem(BUDGETS, "tiny", TINY)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:20]] = 1  # right wherever the other is, and on twenty more
    results = tmp_path / "interference.jsonl"
    for arm, hits in ((SINGLE, base), (OURS, better)):
        fields = {"table": "interference", "budget": "tiny", "stage": "main", "arm": arm, "mix": "1:4", "seed": 0}
        more = {"rate": 1e-3, "information": None, "cpu_seconds": 30.0, "score": float(hits.mean())}
        append_result(results, {"key": arm, **fields, **more, "hits": "".join(map(str, hits))})
    mean, low, high = interval({0: better}, {0: base})
    assert mean == pytest.approx(0.1) and 0.05 < low < 0.1 < high < 0.15  # unpaired it would reach below 0
    text = write_interference(results, tmp_path / "table.md", "tiny")
    assert "| ours minus one LoRA, 1:4 | +10.0 |" in text and "2 runs are finished, 1 minutes" in text
    assert f"| {SINGLE} | missing | missing | {100 * base.mean():.1f} (1) | missing |" in text
    assert f"| {TOTAL} | 0 of 2 | open | 0 |" in text
    with pytest.raises(ValueError, match="a seed in common"):
        interval({0: base}, {1: base})
