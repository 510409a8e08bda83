"""Answers to a file of questions, scored; also blind, with the images exchanged, to show what they are worth."""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octavius.data.loading import Stores, open_stores
from octavius.data.records import Record, drop_unreadable
from octavius.evaluation.answering import Plan, answer_batches, answer_line, write_lines
from octavius.evaluation.benchmarks import benchmark_records
from octavius.evaluation.scoring import check, score
from octavius.model.octavius import Octavius


@dataclass(frozen=True)
class Answers:
    """What a model said: per record its answer and the weights of the experts; tokens generated per second."""

    texts: list[str]
    weights: torch.Tensor  # [records, E]
    tokens_per_second: float


def answer(
    model: Octavius,
    records: list[Record],
    stores: Stores,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    blind: bool = False,
) -> Answers:
    """Greedy answers to the last question of every record.

    Args:
        records: the questions.
        stores: the features of images and clouds.
        blind: give every question another record's image or cloud, of the same benchmark, so that only its text can
            help.
    """
    if blind:
        records = exchange_images(records)
    plan = Plan(batch_size, max_new_tokens)
    texts, weights = [""] * len(records), torch.zeros(len(records), model.settings.lora.num_experts)
    start, tokens = time.perf_counter(), 0
    for rows, replies, gates in answer_batches(model, records, stores, plan):
        weights[rows] = gates
        for row, reply in zip(rows, replies, strict=True):
            texts[row] = reply
            tokens += len(model.tokenizer(reply).input_ids) + 1
    return Answers(texts, weights, tokens / (time.perf_counter() - start))


def exchange_images(records: list[Record], seed: int = 0) -> list[Record]:
    """The same questions, each with another image or cloud of the same benchmark, drawn from `seed`.

    Only where more than half of a benchmark's records share one do some of them keep it.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.truth.get("benchmark", record.task_type), []).append(index)
    exchanged, rng = list(records), random.Random(seed)
    for members in groups.values():
        places = {source: rng.random() for source in dict.fromkeys(records[index].source for index in members)}
        members.sort(key=lambda index: places[records[index].source])
        step = max(Counter(records[index].source for index in members).values())  # past all with the same one
        for index, other in zip(members, members[step:] + members[:step], strict=True):
            exchanged[index] = replace(records[index], image=records[other].image, cloud=records[other].cloud)
    return exchanged


def evaluate(
    model: Octavius, records: list[Record], stores: Stores, blind: bool = False, **options
) -> tuple[dict[str, Any], Answers]:
    """Scores by benchmark (see `octavius.evaluation.scoring.score`) and the answers that they come from.

    Raises:
        ValueError: a record without usable ground truth, before any question is asked.
    """
    rows = [{"id": record.id} | record.truth for record in records]
    check(rows)
    answers = answer(model, records, stores, blind=blind, **options)
    return score([row | {"prediction": text} for row, text in zip(rows, answers.texts, strict=True)]), answers


def load_benchmarks(names: list[str], data: str | Path | None = None, **readers: Any) -> tuple[list[Record], Stores]:
    """Records of one or more benchmarks whose images and clouds can be read, and the features of those.

    Args:
        names: of the benchmarks.
        data: the folder of all of them; each benchmark's own when None.
        readers: what the model reads, `Octavius.readers()`.
    Raises:
        ValueError: an unknown benchmark, no data, images for a model that reads none, or more than 1 % of the records
            without a readable image.
    """
    records: list[Record] = []
    scenes = {}
    for name in dict.fromkeys(names):
        chosen, objects = benchmark_records(name, data)
        for field, reads in (("image", readers.get("tower") is not None), ("cloud", readers.get("clouds", False))):
            if not reads and any(getattr(record, field) for record in chosen):
                raise ValueError(f"benchmark {name} asks about {field}s, which this model does not read")
        records, scenes = records + chosen, scenes | objects
    stores = open_stores(scenes, **readers)
    return drop_unreadable(records, stores.prepare(records)), stores


def routing_map(records: list[Record], weights: torch.Tensor) -> dict[str, list]:
    """The mean weight of every expert by benchmark."""
    names = sorted({record.truth["benchmark"] for record in records})
    members = [[index for index, record in enumerate(records) if record.truth["benchmark"] == name] for name in names]
    return {"benchmarks": names, "weights": [weights[rows].mean(0).tolist() for rows in members]}


def write_answers(path: Path, records: list[Record], answers: Answers) -> None:
    """One JSON line per record: index, id, image, question, answer, reference, experts, and the ground truth."""
    write_lines(
        path,
        [answer_line(*row) for row in zip(range(len(records)), records, answers.texts, answers.weights, strict=True)],
    )


def read_answers(paths: list[Path]) -> list[dict[str, Any]]:
    """The answered records of one or more files of answers, shards in any order, as `score` takes them.

    Raises:
        ValueError: a line is not such a record; the file and the line are named.
    """
    rows = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as answers: {error}") from error
        for number, line in enumerate(lines, 1):
            try:
                item = json.loads(line)
                row = item["truth"] | {"id": item["id"], "prediction": item["answer"]}
                rows.append((int(item["index"]), row))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                kind = type(error).__name__
                raise ValueError(f"{path}: line {number} must be an answer that eval wrote: {kind}") from error
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]
