"""The interference table: what is complete, what mixing costs, what experts keep, with paired bootstrap intervals."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octavius.experiments.ablate import read_results
from octavius.experiments.interference import ARMS, BUDGETS, MIXES, OURS, SINGLE

ORACLE = ARMS[2]
Hits = dict[tuple[str, str], dict[int, np.ndarray]]  # arm, mix → seed → [questions] of 0 and 1


def write_interference(results: Path, output: Path, budget: str) -> str:
    """Write the table of the finished runs as Markdown.

    Args:
        results: the file of finished runs.
        output: the Markdown file.
        budget: which budget's runs count.
    Returns:
        What was written.
    """
    lines = [line for line in read_results(results) if line["table"] == "interference" and line["budget"] == budget]
    hits = collect(lines)
    parts = [
        "# Interference: one LoRA against experts when tasks are mixed",
        f"Written by `octavius ablate --table interference --budget {budget}` from `{results.name}`. Share of right "
        "answers to the watched task (name the class of the object) on test images, in a phrasing that training never "
        "showed; mean over seeds (number of seeds). The mix says how many samples of other tasks come to one of it.",
        _scores(hits, budget),
        "## Differences",
        "Paired bootstrap over seeds and test questions, 95 %.",
        _differences(hits) or "No pair of arms has a finished run in common yet.",
        "## Complete and missing",
        _complete(lines, hits, budget),
    ]
    text = "\n\n".join(parts) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return text


def collect(lines: Sequence[dict[str, Any]]) -> Hits:
    """Hits of the main runs."""
    hits: Hits = defaultdict(dict)
    for line in lines:
        if line["stage"] == "main":
            hits[line["arm"], line["mix"]][line["seed"]] = np.array([int(value) for value in line["hits"]])
    return hits


def paired(one: dict[int, np.ndarray], other: dict[int, np.ndarray], rounds: int = 2000, seed: int = 0) -> np.ndarray:
    """Bootstrap means [rounds, 2] of two arms over the seeds that both have and over the questions, drawn alike."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        raise ValueError("two arms must have a seed in common to be compared, got none")
    stacks = np.stack([np.stack([arm[s] for s in seeds]) for arm in (one, other)])  # [2, seeds, questions]
    rng = np.random.default_rng(seed)
    rows = rng.integers(stacks.shape[1], size=(rounds, stacks.shape[1], 1))
    columns = rng.integers(stacks.shape[2], size=(rounds, 1, stacks.shape[2]))
    return stacks[:, rows, columns].mean((2, 3)).T


def interval(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of two arms, one minus other, and its 95 % interval."""
    seeds = sorted(one.keys() & other.keys())
    means = paired(one, other)
    low, high = np.percentile(means[:, 0] - means[:, 1], (2.5, 97.5))
    mean = np.mean([one[s].mean() for s in seeds]) - np.mean([other[s].mean() for s in seeds])
    return float(mean), float(low), float(high)


def _scores(hits: Hits, budget: str) -> str:
    mixes = [mix for mix in MIXES if mix in BUDGETS[budget].mixes]
    rows = ["| arm | " + " | ".join(mixes) + " |", "|---" * (len(mixes) + 1) + "|"]
    for arm in ARMS:
        cells = []
        for mix in mixes:
            runs = hits.get((arm, mix), {})
            score = np.mean([run.mean() for run in runs.values()]) if runs else None
            cells.append("missing" if score is None else f"{100 * score:.1f} ({len(runs)})")
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _differences(hits: Hits) -> str:
    rows = []
    for mix in MIXES:
        pairs = (
            (f"one LoRA, {mix} minus alone", (SINGLE, mix), (SINGLE, "alone")),
            (f"ours minus one LoRA, {mix}", (OURS, mix), (SINGLE, mix)),
            (f"ours minus oracle, {mix}", (OURS, mix), (ORACLE, mix)),
        )
        for name, one, other in pairs:
            if one != other and hits.get(one, {}).keys() & hits.get(other, {}).keys():
                mean, low, high = interval(hits[one], hits[other])
                rows.append(f"| {name} | {100 * mean:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} |")
    return "\n".join(["| difference | points | interval |", "|---|---|---|", *rows]) if rows else ""


def _complete(lines: Sequence[dict[str, Any]], hits: Hits, budget: str) -> str:
    sizes, rows = (
        BUDGETS[budget],
        ["| arm | rates searched | best rate | main runs | I(task; expert) |", "|---|---|---|---|---|"],
    )
    for arm in ARMS:
        own = [line for line in lines if line["arm"] == arm]
        search = {line["rate"]: line["score"] for line in own if line["stage"] == "search"}
        best = f"{max(search, key=lambda rate: (search[rate], -rate)):g}" if len(search) >= len(sizes.rates) else "open"
        known = [line["information"] for line in own if line["information"] is not None]
        mains = sum(len(runs) for (name, _), runs in hits.items() if name == arm)
        information = f"{np.mean(known):.2f}" if known else ""
        rows.append(f"| {arm} | {len(search)} of {len(sizes.rates)} | {best} | {mains} | {information} |")
    seconds = sum(line["cpu_seconds"] for line in lines)
    return "\n".join(rows) + f"\n\n{len(lines)} runs are finished, {seconds / 60:.0f} minutes of one core."
