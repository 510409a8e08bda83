"""One HTML file that shows what a run was, what it scored, how it learnt, where it routed and what it answered.

`write_report` fills `report.html.jinja`: no script, no link, images inside, everything escaped (answers are a model's
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.ticker import MaxNLocator
from moe_lora import storage

from octavius.inputs.images import open_image
from octavius.report.plots import points, smooth
from octavius.report.tables import (
    PARTS,
    SHOWN,
    Row,
    against,
    column_name,
    facts,
    score_rows,
    score_text,
    short,
    signed,
    time_text,
    titles,
)

IMAGE_SIDE = 480
CURVE = (720, 240)  # of the loss curve's plane, in SVG units


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
        samples: answered test images; `boxes` and `reference_boxes` in fractions of the image's sides.
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
    environment.filters |= {"score": score_text, "signed": signed}
    run, names = metrics.get("run") or {}, titles(metrics)
    parts = [_part(metrics, part) for part in PARTS if metrics.get(part)]
    html = environment.get_template("report.html.jinja").render(
        run=run,
        facts=facts(run),
        tiles=_tiles(run, *score_rows(metrics)),
        parts=parts,
        curve=_curve(loss),
        routing=_heat(routing, names),
        samples=[_card(sample, names) for sample in samples],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_file(path, html.encode("utf-8", "xmlcharrefreplace"))  # half surrogates do occur in generated text


def _part(metrics: Mapping[str, Any], part: str) -> dict[str, Any]:
    columns, rows = score_rows(metrics, part)
    return {
        "title": PARTS[part],
        "columns": [column_name(name) for name in columns],
        "blind": columns[-1] == "blind",
        "against": against(columns),
        "rows": [row for row in rows if row.main or row.metric in SHOWN],
        "more": rows,
    }


def _tiles(run: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The headline's figures as (value, what it is)."""
    tiles = []
    compared = [row for row in rows if row.main and row.difference is not None]
    if compared:
        better = sum(row.clear and (row.difference or 0) > 0 for row in compared)
        what = f"tasks where {against(columns)} lies below the 95 % interval of {column_name(columns[0])}"
        tiles.append((f"{better} of {len(compared)}", what))
    for key, write, what in (
        ("steps", "{:,}".format, "training steps"),
        ("train_seconds", time_text, "training time"),
        ("trainable_parameters", short, "trained parameters; the rest is frozen"),
        ("train_tokens_per_second", short, "tokens per second in training"),
        ("generate_tokens_per_second", short, "tokens per second in generation"),
    ):
        if run.get(key) is not None:
            tiles.append((write(run[key]), what))
    return tiles


def _curve(loss: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The loss curve as SVG point lists and ticks, or None without two finite points."""
    curve = points(loss)
    if len(curve) < 2:
        return None
    steps, values = curve.T
    smoothed = smooth(values)
    x_ticks = MaxNLocator(7, integer=True).tick_values(steps[0], steps[-1])
    y_ticks = MaxNLocator(5).tick_values(min(0.0, values.min()), values.max())
    left, right, bottom, top = steps[0], max(steps[-1], steps[0] + 1), y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return (step - left) / (right - left) * CURVE[0]

    def y(value: float) -> float:
        return (top - value) / (top - bottom) * CURVE[1]

    every = max(1, len(curve) // 600)
    return {
        "width": CURVE[0],
        "height": CURVE[1],
        "raw": " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps[::every], values[::every], strict=True)),
        "smooth": " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps[::every], smoothed[::every], strict=True)),
        "x_ticks": [(round(x(tick), 1), f"{tick:,.0f}") for tick in x_ticks if left <= tick <= right],
        "y_ticks": [(round(y(tick), 1), f"{tick:g}") for tick in y_ticks],
        "text": f"from {smoothed[0]:.2f} at step {steps[0]:,.0f} to {smoothed[-1]:.2f} at step {steps[-1]:,.0f}",
    }


def _heat(routing: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any] | None:
    weights = routing.get("weights") or []
    if not weights:
        return None
    top = max(max(row) for row in weights) or 1.0
    rows = []
    for benchmark, row in zip(routing["benchmarks"], weights, strict=True):
        cells = [(f"{weight:.2f}", f"{weight / top:.3f}", weight > 0.62 * top) for weight in row]
        rows.append((names.get(benchmark, benchmark), cells))
    return {"experts": len(weights[0]), "rows": rows}


def _card(sample: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A sample with its image inlined and its boxes in percent of the image."""
    benchmark = sample.get("benchmark", "")
    boxes = [("reference", box) for box in sample.get("reference_boxes") or []]
    boxes += [("predicted", box) for box in sample.get("boxes") or []]
    return {
        "id": str(sample.get("id", "")),
        "task": names.get(benchmark, benchmark),
        "image": _inline(sample["image"]) if sample.get("image") else None,
        "boxes": [(kind, box["label"] or "?", _percent(box["bbox"])) for kind, box in boxes],
        **{key: str(sample.get(key, "")) for key in ("question", "answer", "reference")},
        "experts": [(int(expert), f"{100 * gate:.0f}") for expert, gate in sample.get("experts") or []],
    }


def _percent(box: Sequence[float]) -> str:
    """CSS place of a box, cut at the image's edges."""
    x1, y1, x2, y2 = (min(max(100.0 * value, 0.0), 100.0) for value in box)
    return f"left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%"


def _inline(path: str | Path) -> str:
    """The image, at most IMAGE_SIDE wide and high and on white, as a data URL."""
    image = open_image(path)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
