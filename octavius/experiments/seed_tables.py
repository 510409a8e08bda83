"""The Octavius work's tables at mini scale: every row trained and scored here, the paper's figures in their own column.

Rows that the paper only cites (3D-LLM) and gates that it reports as failing have no figure of ours or none of theirs.
Source of the paper's figures: Chen et al., "Octavius" (ICLR 2024, arXiv 2311.02684), tables of section 4, as the
authors' summary gives them; detection on VOC2012, VQA on ScienceQA, 3D on ScanNet, on other data and models than ours.
"""

import csv
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from octavius.config import load_config
from octavius.data.loading import load_data
from octavius.evaluation.evaluate import evaluate
from octavius.experiments.ablate import Run, read_results
from octavius.training.train import train

# Our value → what the paper calls it.
VALUES = {
    "detection recall@0.5": "detection recall",
    "detection precision@0.5": "detection precision",
    "vqa Acc@1": "VQA accuracy",
    "caption CIDEr": "caption CIDEr",
    "classification Acc@1": "classification accuracy",
    "hair Acc@1": "hair accuracy",
    "smile Acc@1": "smile accuracy",
    "caption3d CIDEr": "3D caption CIDEr",
    "vqa3d CIDEr": "3D VQA CIDEr",
    "classification3d Acc@1": "3D classification accuracy",
}
DETECTION, PRECISION, VQA, CAPTION, CLASSIFICATION, HAIR, SMILE, CAPTION3D, VQA3D, CLASSIFICATION3D = VALUES
TWO_D = (DETECTION, VQA, CAPTION, CLASSIFICATION, HAIR, SMILE)
THREE_D = (CAPTION3D, VQA3D, CLASSIFICATION3D)


@dataclass(frozen=True)
class Row:
    """One row: its name, the settings that make it from the preset, and the paper's figures in percent.

    preset: None for a row that is cited and not trained here.
    """

    name: str
    settings: tuple[str, ...] = ()
    paper: Mapping[str, float] = field(default_factory=dict)
    preset: str | None = "mini-2d"
    note: str = ""


def _lora(experts: int, rank: int) -> tuple[str, ...]:
    return (f"model.lora.num_experts={experts}", f"model.lora.rank={rank}", f"model.lora.alpha={rank}")


def _figures(recall: float, precision: float, vqa: float) -> dict[str, float]:
    return {DETECTION: recall, PRECISION: precision, VQA: vqa}


PAPER_GATE = ("model.gate={kind: paper, load_balancing: 0.0}",)
ONE = ("model.lora.num_experts=1", "model.lora.top_k=1", "model.lora.rank=32", "model.lora.alpha=32", *PAPER_GATE)
BALANCED = ("model.gate={kind: paper, load_balancing: 0.01}",)
SYSTEM = ("model.system=true", "model.gate={kind: paper, load_balancing: 0.0, input: system+question}")
DENSE = ("model.gate={kind: paper, load_balancing: 0.0, mode: dense}",)
TOKEN = ("model.gate={kind: paper, load_balancing: 0.0, mode: token}",)
TOKEN_BALANCED = ("model.gate={kind: paper, load_balancing: 0.01, mode: token}",)
TOP2 = Row("top-2 by question, 4 experts, rank 32", (*_lora(4, 32), *PAPER_GATE), _figures(39.04, 35.21, 46.95))
OURS = Row("our gate, 4 experts, rank 32", ("model.gate={kind: tasks}",), note="not in the paper")
BASELINE = Row("one LoRA, rank 32", ONE, _figures(7.61, 5.95, 40.31))


def _paper2d(*values: float) -> dict[str, float]:
    return dict(zip(TWO_D, values, strict=True))


def _paper3d(*values: float) -> dict[str, float]:
    return dict(zip(THREE_D, values, strict=True))


TABLES: dict[str, tuple[Row, ...]] = {
    "gates": (
        BASELINE,
        TOP2,
        Row("top-2 by system and question", (*_lora(4, 32), *SYSTEM), _figures(34.23, 30.78, 40.25)),
        Row("dense", (*_lora(4, 32), *DENSE), _figures(9.78, 5.33, 44.71)),
        OURS,
    ),
    "rank": (
        TOP2,
        Row("top-2, rank 16", (*_lora(4, 16), *PAPER_GATE), _figures(32.81, 24.46, 39.11)),
        Row("top-2, rank 8", (*_lora(4, 8), *PAPER_GATE), _figures(25.44, 21.87, 37.65)),
    ),
    "experts": (TOP2, Row("top-2, 8 experts", (*_lora(8, 32), *PAPER_GATE), _figures(22.30, 11.01, 39.91))),
    "balance": (
        TOP2,
        Row("4 experts, load balancing", (*_lora(4, 32), *BALANCED), _figures(33.21, 26.80, 45.26)),
        Row("8 experts", (*_lora(8, 32), *PAPER_GATE), _figures(22.30, 11.01, 39.91)),
        Row("8 experts, load balancing", (*_lora(8, 32), *BALANCED), _figures(21.52, 12.10, 37.53)),
    ),
    "token": (
        TOP2,
        Row("token gate", (*_lora(4, 32), *TOKEN), note="the paper: fail"),
        Row("token gate, load balancing", (*_lora(4, 32), *TOKEN_BALANCED), note="the paper: fail"),
    ),
    "modalities": (
        Row("2D, one LoRA", ONE, _paper2d(7.61, 40.31, 13.28, 73.50, 58.04, 50.15)),
        Row("2D, experts", (*_lora(4, 32), *PAPER_GATE), _paper2d(39.04, 46.95, 26.71, 65.40, 60.93, 59.82)),
        Row("3D, one LoRA", ONE, _paper3d(39.56, 162.14, 47.60), "mini-3d"),
        Row("3D, experts", (*_lora(3, 32), *PAPER_GATE), _paper3d(39.38, 167.31, 43.40), "mini-3d"),
        Row(
            "2D and 3D, one LoRA",
            ONE,
            _paper2d(2.64, 39.71, 0.04, 71.66, 42.47, 50.66) | _paper3d(19.76, 182.00, 38.80),
            "mini-2d+3d",
        ),
        Row(
            "2D and 3D, experts",
            (*_lora(6, 32), *PAPER_GATE),
            _paper2d(34.30, 35.80, 10.06, 56.86, 51.52, 54.22) | _paper3d(33.29, 181.44, 47.20),
            "mini-2d+3d",
        ),
    ),
    "systems": (
        Row("LAMM (one LoRA)", ONE, _paper2d(7.61, 40.31, 0.21, 73.50, 58.04, 50.15) | {PRECISION: 5.95}),
        Row(
            "LAMM with experts",
            (*_lora(4, 32), *PAPER_GATE),
            _paper2d(39.04, 46.95, 5.66, 65.40, 60.93, 59.82) | {PRECISION: 35.21},
        ),
        Row(
            "LLaVA-LoRA (one LoRA, no boxes)",
            (*ONE, "data.loop_detection=0"),
            {VQA: 52.35, CAPTION: 30.75, CLASSIFICATION: 2.89, HAIR: 12.50, SMILE: 50.23},
        ),
        Row("3D-LLM (Flamingo)", (), {VQA3D: 59.20}, None, "cited, not trained here"),
    ),
}
# Data and training of each budget, and its seeds.
BUDGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "smoke": (("train.steps=8", "train.compile=false"), 1),
    "small": (("train.steps=400", "train.compile=false"), 1),
    "full": ((), 3),
}
DATA = {"smoke": "smoke", "small": "demo", "full": "mini"}


class SeedTable:
    """A table of TABLES for the runner: rows that tables share are trained once.

    Args:
        name: of the table.
        budget: of BUDGETS.
        folder: scratch of the trainings.
    """

    def __init__(self, name: str, budget: str, folder: Path):
        for kind, value, known in (("table", name, TABLES), ("budget", budget, BUDGETS)):
            if value not in known:
                raise ValueError(f"{kind} must be one of {', '.join(known)}, got {value!r}")
        self.rows, self.budget, self.folder = TABLES[name], budget, folder

    def runs(self, finished: Sequence[dict[str, Any]]) -> list[Run]:
        """The rows' runs that are not finished, seed by seed."""
        keys = {line["key"] for line in finished}
        runs = []
        for seed in range(BUDGETS[self.budget][1]):
            for row in self.rows:
                if row.preset:
                    config = load_config(row.preset, list(row.settings))
                    runs.append(
                        Run("seeds", self.budget, "main", slug(row), row.preset, seed, config.train.learning_rate)
                    )
        return [run for run in runs if run.key not in keys]

    def execute(self, run: Run) -> dict[str, Any]:
        """Train and score one row."""
        row = next(row for row in self.rows if row.preset == run.mix and slug(row) == run.arm)
        size, output = DATA[self.budget], self.folder / run.key
        settings = [*row.settings, *BUDGETS[self.budget][0], f"train.seed={run.seed}", f"train.output={output}"]
        base = load_config(run.mix).data
        if base.root:
            settings.append(f"data.root=mini-lamm:{size}")
        if base.root_3d:
            settings.append(f"data.root_3d=mini-scan2inst:{size}")
        config = load_config(run.mix, settings)
        model, report = train(config, resume=True)
        records, stores = load_data(config.data, "test.json", **model.readers())
        scores, _ = evaluate(model, records, stores)
        shutil.rmtree(output, ignore_errors=True)
        return {"scores": scores, "steps": report["steps"], "routing": report["routing"]}


def slug(row: Row) -> str:
    """What a row's runs are called: its settings, so that the same row of two tables is one run."""
    return re.sub(r"[^a-z0-9_.]+", "-", " ".join(row.settings).replace("model.", "")).strip("-")


def write_table(name: str, results: Path, folder: Path, budget: str) -> list[dict[str, Any]]:
    """Write one table as NAME.csv and NAME.png: our mean over seeds and the paper's figure, each in its own column.

    Args:
        name: of the table.
        results: the file of finished runs.
        folder: receives the files.
        budget: whose runs count.
    Returns:
        the rows of the CSV.
    """
    lines = [line for line in read_results(results) if line["table"] == "seeds" and line["budget"] == budget]
    cells = []
    for row in TABLES[name]:
        own = [line["scores"] for line in lines if (line["arm"], line["mix"]) == (slug(row), row.preset)]
        for value in VALUES:
            benchmark, _, metric = value.partition(" ")
            ours = [100 * scores[benchmark][metric] for scores in own if metric in scores.get(benchmark, {})]
            if ours or value in row.paper:
                wanted = BUDGETS[budget][1] if row.preset else 0
                mean = f"{np.mean(ours):.2f}" if ours else ("" if row.preset is None else "missing")
                cell = {"row": row.name, "value": VALUES[value], "ours": mean, "seeds": f"{len(ours)} of {wanted}"}
                cells.append(cell | {"paper": row.paper.get(value, ""), "note": row.note})
            elif row.note and value == DETECTION:
                empty = {"row": row.name, "value": VALUES[value], "ours": "missing", "seeds": "0", "paper": ""}
                cells.append(empty | {"note": row.note})
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("row", "value", "ours", "seeds", "paper", "note"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
    _plot(name, cells, folder / f"{name}.png", budget)
    return cells


def _plot(name: str, cells: Sequence[Mapping[str, Any]], path: Path, budget: str) -> None:
    """Two panels with scales of their own: what was measured here, and what the paper reports."""
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    values = [value for value in VALUES.values() if any(cell["value"] == value for cell in cells)]
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(rows) * max(1, len(values)) ** 0.5), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True), ("ours", "paper"), ("measured here, mini scale", "the paper's"), strict=True
    ):
        for index, value in enumerate(values):
            heights = [next((c[column] for c in cells if (c["row"], c["value"]) == (row, value)), "") for row in rows]
            numbers = [float(height) if height not in ("", "missing") else 0.0 for height in heights]
            places = np.arange(len(rows)) + 0.8 * (index + 0.5) / len(values) - 0.4
            axes.barh(places, numbers, 0.8 / len(values), label=value)
        axes.set_title(title)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
    figure.axes[0].legend(fontsize=7)
    figure.text(0.5, -0.01, f"octavius ablate --table {name} --budget {budget}", ha="center", va="top", fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
