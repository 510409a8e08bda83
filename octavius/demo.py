"""The whole job on one machine: train, route, answer, score; a table, `metrics.json` and `report.html` to look at."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from moe_lora import storage

from octavius.config import Config
from octavius.data.loading import load_data
from octavius.data.records import Record
from octavius.evaluation.evaluate import Answers, evaluate, routing_map, write_answers
from octavius.evaluation.metrics import METRICS
from octavius.evaluation.parsing import parse_boxes
from octavius.evaluation.scoring import metric_of, score
from octavius.model.octavius import Octavius
from octavius.points.object_store import ObjectStore, Region
from octavius.report.html import write_report
from octavius.report.plots import plots
from octavius.report.scene_image import save_scene_image
from octavius.report.viewer import write_viewer
from octavius.training.runs import DONE
from octavius.training.train import train


def demo(config: Config, resume: bool = False, baseline: bool = False) -> dict[str, Any]:
    """Train as `config` says and score on held-out images, with them and blind.

    Args:
        config: the run; everything is written under `train.output`.
        resume: go on where an earlier run stopped.
        baseline: also train and score a single LoRA of equal active rank on the same data and budget.

    Returns:
        what `metrics.json` holds: {"run": ..., "scores": {column: scores}, "zeroshot": {column: scores}}.
    """
    folder = Path(config.train.output)
    with _single_lora(config, folder / "lora", resume) if baseline else nullcontext():
        model, report, scores, zeroshot, records, answers, stores = _train_and_score(config, folder / "model", resume)
        metrics = {
            "run": _conditions(config, model, report, answers),
            "scores": {"moe": scores[0], "blind": scores[1]},
            "zeroshot": {"moe": zeroshot[0], "blind": zeroshot[1]},
        }
        write_answers(folder / "answers.jsonl", records, answers)
        storage.write_file(folder / "metrics.json", json.dumps(metrics, indent=1))  # the other process may fail later
    routing = routing_map(records, answers.weights)
    losses = {"LoRA-MoE": report["loss"]}
    if baseline:
        single = json.loads((folder / "lora/metrics.json").read_text())
        for split in ("scores", "zeroshot"):
            metrics[split]["lora"] = single[split]["moe"]
        losses["LoRA"] = json.loads((folder / "lora/model" / DONE).read_text())["loss"]
        storage.write_file(folder / "metrics.json", json.dumps(metrics, indent=1))
    samples = _samples(records, answers)
    if stores.scenes:
        _draw(samples, model, stores.scenes, folder / "scenes")
    write_report(folder / "report.html", metrics, [sample for sample, _ in samples], losses["LoRA-MoE"], routing)
    plots(folder, metrics, losses, routing)
    scenes = _draw_scenes(records, model, stores.scenes, folder / "scenes") if stores.scenes else {}
    columns = [_answered(records, answers.texts, answers.weights.tolist(), scenes)]
    if baseline:
        lines = (folder / "lora/answers.jsonl").read_text().splitlines()
        columns.append(_answered(records, [json.loads(line)["answer"] for line in lines], None, scenes))
    write_viewer(folder / "answers.html", *columns)
    return metrics


@contextmanager
def _single_lora(config: Config, folder: Path, resume: bool) -> Iterator[None]:
    """The same job with one LoRA of equal active rank, in a process of its own that has ended when the block has.

    Its scale alpha / rank is 1/K of the experts', whose gates sum to 1: so the update K·(1/K)·ΔW of a step is as large.

    On a CPU it runs beside the block, each on half of the threads: that is faster than one after the other on all.
    """
    lora = config.model.lora
    single = replace(lora, num_experts=1, top_k=1, rank=lora.rank * lora.top_k, alpha=lora.alpha)
    plain = replace(config, model=replace(config.model, lora=single), train=replace(config.train, output=str(folder)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(plain.to_dict()))))
    command = [sys.executable, "-m", "octavius.cli", "demo", "--config", str(folder / "config.yaml")]
    command += ["--resume"] * resume
    threads, beside = torch.get_num_threads(), not torch.cuda.is_available()
    half = max(1, threads // 2) if beside else threads
    with (folder / "log.txt").open("w") as log:
        run = {"stdout": log, "stderr": subprocess.STDOUT, "env": os.environ | {"OMP_NUM_THREADS": str(half)}}
        process = subprocess.Popen(command, **run) if beside else None
        torch.set_num_threads(half)
        try:
            yield
            failed = process.wait() if process else subprocess.call(command, **run)
        finally:
            torch.set_num_threads(threads)
            if process:
                process.kill()
    if failed:
        raise ValueError(f"the run of the single LoRA failed: see {folder / 'log.txt'}")


def _train_and_score(config: Config, folder: Path, resume: bool):
    config = replace(config, train=replace(config.train, output=str(folder)))
    model, report = train(config, resume)
    records, stores = load_data(config.data, "test.json", **model.readers())
    scored, answers = evaluate(model, records, stores)
    scores = [scored, evaluate(model, records, stores, blind=True)[0]]
    unseen, others = load_data(
        config.data, "zeroshot.json", **model.readers()
    )  # empty where the photographs could not be fetched
    zeroshot = [evaluate(model, unseen, others, blind=blind)[0] if unseen else {} for blind in (False, True)]
    return model, report, scores, zeroshot, records, answers, stores


def _conditions(config: Config, model: Octavius, report: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """What a reader must know to read the figures."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "model": config.model.llm,
        "tower": config.model.tower,
        "experts": config.model.lora.num_experts,
        "top_k": config.model.lora.top_k,
        "rank": config.model.lora.rank,
        "steps": report["steps"],
        "batch_size": config.train.batch_size,
        "train_seconds": report["seconds"],
        "threads": torch.get_num_threads(),
        "dtype": config.model.dtype,
        "seed": config.train.seed,
        "commit": commit,
        "command": " ".join(["octavius", *sys.argv[1:]]),
        "processor": _processor(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_tokens_per_second": report["tokens_per_second"],
        "generate_tokens_per_second": answers.tokens_per_second,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _samples(records: list[Record], answers: Answers, count: int = 12) -> list[tuple[dict[str, Any], Record]]:
    """A dozen test records, the benchmarks in turn, in the order of the file: not chosen by their answers."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.truth["benchmark"], []).append(index)
    turns = [
        index for column in zip(*(members[:count] for members in groups.values()), strict=False) for index in column
    ]
    return [
        (_sample(records[index], answers.texts[index], answers.weights[index]), records[index])
        for index in turns[:count]
    ]


def _draw(samples: list[tuple[dict[str, Any], Record]], model: Octavius, scenes: ObjectStore, folder: Path) -> None:
    """An image of every sample's cloud, named by its number: an id is text of the data, not a file name."""
    for number, (sample, record) in enumerate(samples):
        if record.cloud:
            sample["image"] = str(save_scene_image(model, scenes, record.cloud, folder / f"{number:02d}.png") or "")


def _draw_scenes(records: list[Record], model: Octavius, scenes: ObjectStore, folder: Path) -> dict[Path, Path]:
    """An image of every cloud; its number is its name, since an id is text of the data."""
    drawn = {}
    for number, cloud in enumerate(dict.fromkeys(record.cloud.cloud for record in records if record.cloud)):
        file = save_scene_image(model, scenes, Region(cloud), folder / f"all-{number:04d}.png")
        drawn |= {cloud: file} if file else {}
    return drawn


def _answered(
    records: list[Record], texts: list[str], weights: list[list[float]] | None, scenes: dict[Path, Path]
) -> list[dict[str, Any]]:
    """Rows of the viewer; a caption's row has no score, since CIDEr is that of many."""
    rows = []
    for index, (record, text) in enumerate(zip(records, texts, strict=True)):
        (scored,) = score([{"id": record.id, "prediction": text} | record.truth]).values()
        own = weights[index] if weights else []
        rows.append(
            {
                **{"id": record.id, "task": scored["title"], "answer": text},
                **{"question": record.turns[-1][0], "reference": record.turns[-1][1]},
                "image": str(record.image or scenes.get(record.source, "")),
                "experts": [[expert, round(weight, 4)] for expert, weight in enumerate(own) if weight > 0],
                "score": None if scored["main"] == "CIDEr" else scored[scored["main"]],
                "boxes": parse_boxes(text, record.truth.get("labels", [])) if record.image else [],
            }
        )
    return rows


def _sample(record: Record, text: str, weights: torch.Tensor) -> dict[str, Any]:
    labels = record.truth.get("labels", [])
    detection = metric_of(record.truth) is METRICS["detection"]
    return {
        "id": record.id,
        "benchmark": record.truth["benchmark"],
        "image": str(record.source),
        "question": record.turns[-1][0],
        "answer": text,
        "reference": record.turns[-1][1],
        "boxes": [{"label": label, "bbox": box} for label, box in parse_boxes(text, labels)] if detection else [],
        "reference_boxes": record.truth.get("object", []),
        "experts": [[expert, weight] for expert, weight in enumerate(weights.tolist()) if weight > 0],
    }
