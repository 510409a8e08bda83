"""One HTML file that shows what a run was, what it scored, how it learnt, where it routed and what it answered.

`write_report` fills `report.html.jinja`: no script, no link, pictures inside, everything escaped (answers are a model's
output). `score_table` prints the same scores in a terminal; `plots` draws them for the documentation.
Scores are shown × 100, as papers print them. The inputs, of which any part may be missing or empty:

    metrics = {"run": {"model", "tower", "experts", "top_k", "rank", "batch_size", "shapes", "dtype", "processor",
                       "threads", "seed", "commit", "command", "steps", "train_seconds", "trainable_parameters",
                       "train_tokens_per_second", "generate_tokens_per_second"},
               "scores": {"moe": metrics.score(...), "blind": metrics.score(...), any other column},
               "zeroshot": the same for classes that were not trained on}
    samples = [{"id", "benchmark", "image", "question", "answer", "reference", "boxes": [{"label", "bbox"}],
                "reference_boxes": [...], "experts": [[expert, gate], ...]}]
    loss = [{"step", "loss"}]           routing = {"benchmarks": [names], "weights": [E mean gates per benchmark]}
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.table import Table

TASKS = {
    "detection": "Detection",
    "vqa": "Visual QA",
    "caption": "Captioning",
    "classification": "Classification",
    "hair": "Face: hair",
    "smile": "Face: smile",
    "classification3d": "3D classification",
    "caption3d": "3D captioning",
    "vqa3d": "3D question answering",
}
COLUMNS = {"moe": "LoRA-MoE", "lora": "LoRA", "blind": "Blind"}
PARTS = {"scores": "Scores", "zeroshot": "Scores on classes never trained on"}
SHOWN = ("precision@0.5",)  # beside each main metric; the others come under "all metrics"
PICTURE_SIDE = 480
CURVE = (720, 240)  # of the loss curve's plane, in SVG units


@dataclass(frozen=True)
class Row:
    """One metric of one task: its value × 100 in every column."""

    task: str
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


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    loss: Sequence[Mapping[str, float]],
    routing: Mapping[str, Any],
) -> None:
    """Writes the report as one self-contained file.

    Args:
        path: of the HTML file; its folder is made.
        metrics: what was run and the scores, column by column; see the module's text for this and the others.
        samples: answered test pictures; `boxes` and `reference_boxes` in fractions of the picture's sides.
        loss: the training curve.
        routing: mean gate of each expert per task.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "signed": _signed, "task": _task}
    run = metrics.get("run") or {}
    parts = [_part(metrics, part) for part in PARTS if metrics.get(part)]
    html = environment.get_template("report.html.jinja").render(
        run=run,
        facts=_facts(run),
        tiles=_tiles(run, *score_rows(metrics)),
        parts=parts,
        curve=_curve(loss),
        routing=_heat(routing),
        samples=[_card(sample) for sample in samples],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")  # half surrogates do occur in generated text


def score_table(metrics: Mapping[str, Any], part: str = "scores") -> Table:
    """The scores × 100, or those of another part of `metrics`, as a table for the terminal; main metrics in bold."""
    columns, rows = score_rows(metrics, part)
    table = Table(title=f"{PARTS[part]} \u00d7 100", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for index, name in enumerate(columns):
        table.add_column(_column(name), justify="right")
        if index == 0:
            table.add_column("95 % interval", justify="right")
    if against := _against(columns):
        table.add_column(f"difference to {against}", justify="right")
    for row in rows:
        interval = f"{_score(row.interval[0])} \u2013 {_score(row.interval[1])}" if row.interval else ""
        values = [_score(value) for value in row.values]
        cells = [_task(row.task), row.metric, str(row.n), *values[:1], interval, *values[1:]]
        if against:
            cells.append(_signed(row.difference))
        table.add_row(*cells, style="bold" if row.main else "dim")
    return table


def pretrain_table(report: Mapping[str, Any]) -> Table:
    """Scores of the point encoder on held-out models, × 100, each beside what chance or raw geometry gives."""
    table = Table(
        "held out", "models", "metric", "score", "against", title="Point encoder \u00d7 100", title_justify="left"
    )
    names = {"test": "test models", "zeroshot": "catalogue never seen"}
    for side, name in names.items():
        s = report[side]
        rows = [("zero-shot Acc@1", s["zero_shot_acc"], "chance", s["zero_shot_chance"])]
        rows.append(("nearest neighbour", s["nearest_feature_acc"], "raw geometry", s["nearest_geometry_acc"]))
        for kind in ("text", "image"):
            for k in (1, 5):
                metric = f"{kind} recall@{k}"
                rows.append((metric, s[f"{kind}_recall@{k}"], "chance", s[f"{kind}_chance@{k}"]))
        for metric, score, against, other in rows:
            count = s["models" if "recall" in metric else "labelled"]
            table.add_row(name, str(count), metric, _score(100 * score), f"{against} {_score(100 * other)}")
    return table


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
    under = "  ·  ".join(f"{name} {value}" for name, value in _facts(metrics.get("run") or {}))
    columns, rows = score_rows(metrics)
    if any(loss.values()):
        _plot_loss(loss, folder / "loss.png", under)
    if rows:
        _plot_scores(columns, [row for row in rows if row.main or row.metric in SHOWN], folder / "scores.png", under)
    if routing.get("weights"):
        _plot_routing(routing, folder / "routing.png", under)


def score_rows(metrics: Mapping[str, Any], part: str = "scores") -> tuple[list[str], list[Row]]:
    """Column names (LoRA-MoE first, blind last) and one row per task and metric, in the paper's order of tasks."""
    scores = metrics.get(part) or {}
    columns = sorted(scores, key=lambda name: {"moe": -1, "blind": 1}.get(name, 0))
    tasks = dict.fromkeys(task for name in columns for task in scores[name])
    order = [task for task in TASKS if task in tasks] + [task for task in tasks if task not in TASKS]
    rows = []
    for task in order:
        entries = [scores[name].get(task, {}) for name in columns]
        first = next(entry for entry in entries if entry)
        for metric in (key for key in first if key not in ("n", "main", "interval")):
            values = [_hundred(entry.get(metric)) for entry in entries]
            main = metric == first["main"]
            low_high = entries[0].get("interval") if main else None
            interval = (100.0 * low_high[0], 100.0 * low_high[1]) if low_high else None
            mine, other = values[0], values[-1]
            difference = mine - other if len(columns) > 1 and mine is not None and other is not None else None
            rows.append(Row(task, metric, main, first["n"], values, interval, difference))
    return columns, rows


def _hundred(value: float | None) -> float | None:
    return 100.0 * value if value is not None and math.isfinite(value) else None


def _part(metrics: Mapping[str, Any], part: str) -> dict[str, Any]:
    columns, rows = score_rows(metrics, part)
    return {
        "title": PARTS[part],
        "columns": [_column(name) for name in columns],
        "blind": columns[-1] == "blind",
        "against": _against(columns),
        "rows": [row for row in rows if row.main or row.metric in SHOWN],
        "more": rows,
    }


def _task(name: str) -> str:
    return TASKS.get(name, name)


def _column(name: str) -> str:
    return COLUMNS.get(name, name)


def _against(columns: Sequence[str]) -> str:
    return _column(columns[-1]) if len(columns) > 1 else ""


def _score(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:+.1f}".replace("-", "\u2212")


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions of the run that are known, as (name, value)."""
    names = ("model", "tower", "experts", "top_k", "rank", "batch_size", "shapes", "dtype", "processor", "threads")
    known = [name for name in (*names, "seed", "commit") if run.get(name) not in (None, "")]
    return [(name.replace("_", " "), str(run[name])) for name in known]


def _tiles(run: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The headline's figures as (value, what it is)."""
    tiles = []
    compared = [row for row in rows if row.main and row.difference is not None]
    if compared:
        better = sum(row.clear and (row.difference or 0) > 0 for row in compared)
        what = f"tasks where {_against(columns)} lies below the 95 % interval of {_column(columns[0])}"
        tiles.append((f"{better} of {len(compared)}", what))
    for key, write, what in (
        ("steps", "{:,}".format, "training steps"),
        ("train_seconds", _time, "training time"),
        ("trainable_parameters", _short, "trained parameters; the rest is frozen"),
        ("train_tokens_per_second", _short, "tokens per second in training"),
        ("generate_tokens_per_second", _short, "tokens per second in generation"),
    ):
        if run.get(key) is not None:
            tiles.append((write(run[key]), what))
    return tiles


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fortieth of the curve."""
    window = np.ones(2 * (len(values) // 80) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _points(loss: Sequence[Mapping[str, float]]) -> np.ndarray:
    pairs = [(point["step"], point["loss"]) for point in loss if math.isfinite(point["loss"])]
    return np.array(pairs, dtype=float).reshape(-1, 2)  # [n, 2]


def _curve(loss: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The loss curve as SVG point lists and ticks, or None without two finite points."""
    points = _points(loss)
    if len(points) < 2:
        return None
    steps, values = points.T
    smooth = _smooth(values)
    x_ticks = MaxNLocator(7, integer=True).tick_values(steps[0], steps[-1])
    y_ticks = MaxNLocator(5).tick_values(min(0.0, values.min()), values.max())
    left, right, bottom, top = steps[0], max(steps[-1], steps[0] + 1), y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return (step - left) / (right - left) * CURVE[0]

    def y(value: float) -> float:
        return (top - value) / (top - bottom) * CURVE[1]

    every = max(1, len(points) // 600)
    return {
        "width": CURVE[0],
        "height": CURVE[1],
        "raw": " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps[::every], values[::every], strict=True)),
        "smooth": " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps[::every], smooth[::every], strict=True)),
        "x_ticks": [(round(x(tick), 1), f"{tick:,.0f}") for tick in x_ticks if left <= tick <= right],
        "y_ticks": [(round(y(tick), 1), f"{tick:g}") for tick in y_ticks],
        "text": f"from {smooth[0]:.2f} at step {steps[0]:,.0f} to {smooth[-1]:.2f} at step {steps[-1]:,.0f}",
    }


def _heat(routing: Mapping[str, Any]) -> dict[str, Any] | None:
    weights = routing.get("weights") or []
    if not weights:
        return None
    top = max(max(row) for row in weights) or 1.0
    rows = [
        (_task(task), [(f"{weight:.2f}", f"{weight / top:.3f}", weight > 0.62 * top) for weight in row])
        for task, row in zip(routing["benchmarks"], weights, strict=True)
    ]
    return {"experts": len(weights[0]), "rows": rows}


def _card(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with its picture inlined and its boxes in percent of the picture."""
    boxes = [("reference", box) for box in sample.get("reference_boxes") or []]
    boxes += [("predicted", box) for box in sample.get("boxes") or []]
    return {
        "id": str(sample.get("id", "")),
        "task": _task(sample.get("benchmark", "")),
        "image": _inline(sample["image"]) if sample.get("image") else None,
        "boxes": [(kind, box["label"] or "?", _percent(box["bbox"])) for kind, box in boxes],
        **{key: str(sample.get(key, "")) for key in ("question", "answer", "reference")},
        "experts": [(int(expert), f"{100 * gate:.0f}") for expert, gate in sample.get("experts") or []],
    }


def _percent(box: Sequence[float]) -> str:
    """CSS place of a box, cut at the picture's edges."""
    x1, y1, x2, y2 = (min(max(100.0 * value, 0.0), 100.0) for value in box)
    return f"left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%"


def _inline(path: str | Path) -> str:
    """The picture, at most PICTURE_SIDE wide and high and on white, as a data URL."""
    with Image.open(path) as picture:
        picture = picture.convert("RGBA")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    data = io.BytesIO()
    page.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _save(figure: Figure, path: Path, under: str) -> None:
    figure.text(0.5, -0.01, under, ha="center", va="top", fontsize=7, color="0.35", wrap=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def _plot_loss(loss: Mapping[str, Sequence[Mapping[str, float]]], path: Path, under: str) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(loss.items()):
        steps, values = _points(curve).T
        axes.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=f"C{index}", linewidth=1.6, label=_column(name))
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
        axes.barh(y, values, height=height, color="0.78" if name == "blind" else f"C{index}", label=_column(name))
        for place, row in zip(y, rows, strict=True):
            text, right = _score(row.values[index]), row.values[index] or 0.0
            if index == 0 and row.interval:
                axes.plot(row.interval, [place, place], color="black", linewidth=1)
                right = max(right, row.interval[1])
            axes.text(right + 1, place, text, va="center", fontsize=7)
    axes.set_yticks(np.arange(len(rows)) + (len(columns) - 1) * height / 2)
    axes.set_yticklabels([f"{_task(row.task)}\n{row.metric} (n = {row.n})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("score \u00d7 100; line: 95 % interval of the main metric")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, under)


def _plot_routing(routing: Mapping[str, Any], path: Path, under: str) -> None:
    weights = np.array(routing["weights"], dtype=float)  # [tasks, E]
    figure = Figure(figsize=(1.8 + 0.7 * min(weights.shape[1], 16), 0.9 + 0.38 * len(weights)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(weights, cmap="Blues", vmin=0, aspect="auto")
    for (row, expert), weight in np.ndenumerate(weights):
        if weights.shape[1] <= 16:
            color = "white" if weight > 0.62 * weights.max() else "black"
            axes.text(expert, row, f"{weight:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(weights)), [_task(task) for task in routing["benchmarks"]], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    figure.colorbar(shown, label="mean gate")
    _save(figure, path, under)
