"""All answers of a run on one page, with filters: `answers.html`, one file, nothing loaded from elsewhere.

Beside a single LoRA's answers to the same questions it states the paired difference of each task with its interval: the
same samples are drawn for both, so that what both find hard cancels.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from octavius.inputs.images import open_image

SIDE = 224  # pixels of an image, at most
DRAWS = 2000  # of the bootstrap
RIGHT = 0.5  # a sample's score from which its answer counts as right


def write_viewer(path: str | Path, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the page.

    Args:
        path: of the HTML file; its folder is made.
        rows: {"id", "task", "image" (a file, or None), "question", "answer", "reference", "experts": [[expert,
            weight]], "score": 0..1, or None where one sample has none, as for captions, "boxes": [[label, box]]}.
        others: the same samples in the same order, answered by a single LoRA.
    Raises:
        ValueError: the others are not the same samples.
    """
    if others and [row["id"] for row in rows] != [row["id"] for row in others]:
        raise ValueError("the single LoRA must have answered the same samples in the same order")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    images: dict[str, int] = {}
    pixels: list[str] = []
    items = []
    for index, row in enumerate(rows):
        file = str(row.get("image") or "")
        if file and file not in images:
            images[file] = len(pixels)
            pixels.append(_inline(file))
        item = {key: row[key] for key in ("id", "task", "question", "answer", "reference", "experts", "score")}
        item["boxes"], item["image"] = row.get("boxes") or [], images.get(file, -1)
        if others:
            item["other"], item["other_score"] = others[index]["answer"], others[index]["score"]
        items.append(item)
    text = environment.get_template("viewer.html.jinja").render(
        data=_script_json({"items": items, "images": pixels, "right": RIGHT}),
        differences=paired(rows, others) if others else [],
        count=len(items),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def paired(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean difference × 100 of each task's samples, with its 95 % interval.

    Bootstrap over samples (Efron 1979), both answers of a sample together. verdict: "ahead" or "behind" where the
    interval is on one side of 0, else "open".
    """
    groups: dict[str, list[float]] = {}
    for row, other in zip(rows, others, strict=True):
        if row["score"] is not None and other["score"] is not None:
            groups.setdefault(row["task"], []).append(100 * (row["score"] - other["score"]))
    table, rng = [], np.random.default_rng(0)
    for task, values in groups.items():
        differences = np.array(values)
        means = differences[rng.integers(0, len(differences), (DRAWS, len(differences)))].mean(1)
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
        verdict = "ahead" if low > 0 else "behind" if high < 0 else "open"
        mean = float(differences.mean())
        table.append({"task": task, "n": len(values), "mean": mean, "low": low, "high": high, "verdict": verdict})
    return table


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _inline(file: str) -> str:
    image = open_image(file)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
