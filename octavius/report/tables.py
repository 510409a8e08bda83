"""The scores of a run as rows, and as tables for the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

COLUMNS = {"moe": "LoRA-MoE", "lora": "LoRA", "blind": "Blind"}
PARTS = {"scores": "Scores", "zeroshot": "Scores on classes never trained on"}
NOT_VALUES = ("title", "n", "unparsable", "main", "intervals")  # of a benchmark's entry; the others are its values
SHOWN = ("precision@0.5",)  # beside each main metric; the others come under "all metrics"


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark: its value × 100 in every column."""

    benchmark: str
    title: str
    metric: str
    main: bool
    n: int
    values: list[float | None]
    interval: tuple[float, float] | None
    difference: float | None

    @property
    def clear(self) -> bool:
        """The compared column's value lies outside the first column's interval."""
        if self.interval is None or self.difference is None or self.values[0] is None:
            return False
        return not self.interval[0] <= self.values[0] - self.difference <= self.interval[1]

    @property
    def full(self) -> float:
        """Right end of the row's scale: 100, or more where a CIDEr passes it."""
        top = max([value for value in self.values if value is not None] + [self.interval[1] if self.interval else 0])
        return max(100.0, math.ceil(top / 100) * 100.0)


def score_table(metrics: Mapping[str, Any], part: str = "scores") -> Table:
    """The scores × 100, or those of another part of `metrics`, as a table for the terminal; main metrics in bold."""
    columns, rows = score_rows(metrics, part)
    table = Table(title=f"{PARTS[part]} \u00d7 100", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for index, name in enumerate(columns):
        table.add_column(column_name(name), justify="right")
        if index == 0:
            table.add_column("95 % interval", justify="right")
    if other := against(columns):
        table.add_column(f"difference to {other}", justify="right")
    for row in rows:
        interval = f"{score_text(row.interval[0])} \u2013 {score_text(row.interval[1])}" if row.interval else ""
        values = [score_text(value) for value in row.values]
        cells = [row.title, row.metric, str(row.n), *values[:1], interval, *values[1:]]
        if other:
            cells.append(signed(row.difference))
        table.add_row(*cells, style="bold" if row.main else "dim")
    return table


def pretrain_table(report: Mapping[str, Any]) -> Table:
    """Scores of the point encoder on held-out models, × 100, each beside what chance or raw geometry gives."""
    table = Table(
        "held out", "models", "metric", "score", "against", title="Point encoder \u00d7 100", title_justify="left"
    )
    names = {"test": "test models", "zeroshot": "catalogue never seen"}
    for split, name in names.items():
        s = report[split]
        rows = [("zero-shot Acc@1", s["zero_shot_acc"], "chance", s["zero_shot_chance"])]
        rows.append(("nearest neighbour", s["nearest_feature_acc"], "raw geometry", s["nearest_geometry_acc"]))
        for kind in ("text", "image"):
            for k in (1, 5):
                metric = f"{kind} recall@{k}"
                rows.append((metric, s[f"{kind}_recall@{k}"], "chance", s[f"{kind}_chance@{k}"]))
        for metric, score, against, other in rows:
            count = s["models" if "recall" in metric else "labelled"]
            table.add_row(name, str(count), metric, score_text(100 * score), f"{against} {score_text(100 * other)}")
    return table


def score_rows(metrics: Mapping[str, Any], part: str = "scores") -> tuple[list[str], list[Row]]:
    """Column names (LoRA-MoE first, blind last) and one row per benchmark and metric, in the scores' order."""
    scores = metrics.get(part) or {}
    columns = sorted(scores, key=lambda name: {"moe": -1, "blind": 1}.get(name, 0))
    rows = []
    for benchmark in dict.fromkeys(benchmark for name in columns for benchmark in scores[name]):
        entries = [scores[name].get(benchmark, {}) for name in columns]
        first = next(entry for entry in entries if entry)
        title = first.get("title", benchmark)
        for metric in (key for key in first if key not in NOT_VALUES):
            values = [_hundred(entry.get(metric)) for entry in entries]
            main = metric == first["main"]
            low_high = entries[0].get("intervals", {}).get(metric)
            interval = (100.0 * low_high[0], 100.0 * low_high[1]) if low_high else None
            mine, other = values[0], values[-1]
            difference = mine - other if len(columns) > 1 and mine is not None and other is not None else None
            rows.append(Row(benchmark, title, metric, main, first["n"], values, interval, difference))
    return columns, rows


def _hundred(value: float | None) -> float | None:
    return 100.0 * value if value is not None and math.isfinite(value) else None


def titles(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The title of every benchmark that occurs in the scores."""
    columns = [column for part in PARTS for column in (metrics.get(part) or {}).values()]
    return {name: entry.get("title", name) for column in columns for name, entry in column.items()}


def column_name(name: str) -> str:
    return COLUMNS.get(name, name)


def against(columns: Sequence[str]) -> str:
    return column_name(columns[-1]) if len(columns) > 1 else ""


def score_text(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:+.1f}".replace("-", "\u2212")


def short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions of the run that are known, as (name, value)."""
    names = ("model", "tower", "experts", "top_k", "rank", "batch_size", "shapes", "dtype", "processor", "threads")
    known = [name for name in (*names, "seed", "commit") if run.get(name) not in (None, "")]
    return [(name.replace("_", " "), str(run[name])) for name in known]
