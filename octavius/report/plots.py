"""Plots of a run: loss, scores and routing, with the run's conditions written under each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from octavius.report.tables import SHOWN, Row, column_name, facts, score_rows, score_text, titles


def plots(
    folder: str | Path,
    metrics: Mapping[str, Any],
    loss: Mapping[str, Sequence[Mapping[str, float]]],
    routing: Mapping[str, Any],
) -> None:
    """Draws loss.png, scores.png and routing.png, with the run's conditions written under each; skips what is empty.

    Args:
        folder: is made.
        metrics: as for `write_report`.
        loss: one training curve per column name.
        routing: as for `write_report`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    under = "  ·  ".join(f"{name} {value}" for name, value in facts(metrics.get("run") or {}))
    columns, rows = score_rows(metrics)
    if any(loss.values()):
        _plot_loss(loss, folder / "loss.png", under)
    if rows:
        _plot_scores(columns, [row for row in rows if row.main or row.metric in SHOWN], folder / "scores.png", under)
    if routing.get("weights"):
        _plot_routing(routing, titles(metrics), folder / "routing.png", under)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fortieth of the curve."""
    window = np.ones(2 * (len(values) // 80) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def points(loss: Sequence[Mapping[str, float]]) -> np.ndarray:
    pairs = [(point["step"], point["loss"]) for point in loss if math.isfinite(point["loss"])]
    return np.array(pairs, dtype=float).reshape(-1, 2)  # [n, 2]


def _save(figure: Figure, path: Path, under: str) -> None:
    figure.text(0.5, -0.01, under, ha="center", va="top", fontsize=7, color="0.35", wrap=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def _plot_loss(loss: Mapping[str, Sequence[Mapping[str, float]]], path: Path, under: str) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(loss.items()):
        steps, values = points(curve).T
        axes.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=f"C{index}", linewidth=1.6, label=column_name(name))
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, under)


def _plot_scores(columns: Sequence[str], rows: Sequence[Row], path: Path, under: str) -> None:
    figure = Figure(figsize=(7, 0.5 + 0.28 * len(rows) * max(len(columns), 2)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(columns)
    for index, name in enumerate(columns):
        y = np.arange(len(rows)) + index * height
        values = np.array([row.values[index] or 0.0 for row in rows])
        axes.barh(y, values, height=height, color="0.78" if name == "blind" else f"C{index}", label=column_name(name))
        for place, row in zip(y, rows, strict=True):
            text, right = score_text(row.values[index]), row.values[index] or 0.0
            if index == 0 and row.interval:
                axes.plot(row.interval, [place, place], color="black", linewidth=1)
                right = max(right, row.interval[1])
            axes.text(right + 1, place, text, va="center", fontsize=7)
    axes.set_yticks(np.arange(len(rows)) + (len(columns) - 1) * height / 2)
    axes.set_yticklabels([f"{row.title}\n{row.metric} (n = {row.n})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("score \u00d7 100; line: 95 % interval of the main metric")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, under)


def _plot_routing(routing: Mapping[str, Any], names: Mapping[str, str], path: Path, under: str) -> None:
    weights = np.array(routing["weights"], dtype=float)  # [tasks, E]
    figure = Figure(figsize=(1.8 + 0.7 * min(weights.shape[1], 16), 0.9 + 0.38 * len(weights)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(weights, cmap="Blues", vmin=0, aspect="auto")
    for (row, expert), weight in np.ndenumerate(weights):
        if weights.shape[1] <= 16:
            color = "white" if weight > 0.62 * weights.max() else "black"
            axes.text(expert, row, f"{weight:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(weights)), [names.get(name, name) for name in routing["benchmarks"]], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    figure.colorbar(shown, label="mean gate")
    _save(figure, path, under)
