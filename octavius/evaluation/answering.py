"""Answers to many questions: in batches over tasks, in shards over processes, line by line so that a kill loses none.

The batches are a function of the records and the options alone. A shard takes every n-th batch, and a run that goes on
after a kill repeats the whole batch that the kill tore: so shards and resumed runs write the very same lines.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import Stores
from octavius.data.records import Record
from octavius.evaluation.benchmarks import BENCHMARKS
from octavius.evaluation.inferencers import Questions, inferencer
from octavius.model.octavius import Octavius

LIMIT = 128  # tokens of an answer where no benchmark says


@dataclass(frozen=True)
class Plan:
    """How questions are answered.

    Args:
        batch_size: questions that the model gets at once.
        max_new_tokens: of an answer, at most; None: what each benchmark says.
        inferencer: a name of INFERENCERS; None: what each benchmark says.
        shard: (number, count): answer this part of the batches, counted from 1.
    Raises:
        ValueError: the shard is none.
    """

    batch_size: int = 32
    max_new_tokens: int | None = None
    inferencer: str | None = None
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        number, count = self.shard
        if not 1 <= number <= count:
            raise ValueError(f"shard must be NUMBER/COUNT with 1 <= NUMBER <= COUNT, got {number}/{count}")
        if self.batch_size < 1 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise ValueError(
                f"batch_size and max_new_tokens must be at least 1, got {self.batch_size}, {self.max_new_tokens}"
            )


def parse_shard(text: str | None) -> tuple[int, int]:
    """(number, count) of a text such as "1/2"; (1, 1) of None.

    Raises:
        ValueError: another form.
    """
    number, slash, count = (text or "1/1").partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError(f"shard must be NUMBER/COUNT, such as 1/2, got {text!r}")
    return int(number), int(count)


@dataclass(frozen=True)
class Batch:
    """Numbers of records that are answered together, the same way."""

    rows: list[int]
    inferencer: str
    max_new_tokens: int


def answer_batches(
    model: Octavius, records: list[Record], stores: Stores, plan: Plan, skip: frozenset[int] = frozenset()
) -> Iterator[tuple[list[int], list[str], torch.Tensor]]:
    """Answer the questions of one shard, batch by batch.

    Args:
        records: of all shards.
        skip: numbers of records whose answers are known; a batch with others among them is answered whole.
    Returns:
        for each batch the numbers of its records, the answers, and the experts' weights [N, E].
    """
    data = InstructionData(records, model.conversation, model.image_tokens, 0, False, model.cloud_tokens)
    collate = Collator(model.conversation.eos, stores.images, True, stores.scenes)
    samples = [data[index] for index in range(len(data))]
    lengths = [len(sample["input_ids"]) for sample in samples]
    batches = make_batches(records, lengths, plan)[plan.shard[0] - 1 :: plan.shard[1]]
    was_training = model.training
    model.eval()
    try:
        for batch in track(batches, description="answers"):
            if not skip.issuperset(batch.rows):
                questions = Questions(
                    [records[row] for row in batch.rows], [samples[row] for row in batch.rows], collate
                )
                texts, weights = inferencer(batch.inferencer)(model, questions, batch.max_new_tokens)
                yield batch.rows, texts, weights.float().cpu()
    finally:
        model.train(was_training)


def make_batches(records: list[Record], lengths: list[int], plan: Plan) -> list[Batch]:
    """Batches of questions of like length, of any task, that share inferencer and length of answer."""
    groups: dict[tuple[str, int], list[int]] = {}
    for row, record in enumerate(records):
        name = record.truth.get("benchmark")
        entry = BENCHMARKS[name] if name in BENCHMARKS.parts else None
        how = plan.inferencer or (entry.inferencer if entry else "Direct")
        groups.setdefault((how, plan.max_new_tokens or (entry.max_new_tokens if entry else LIMIT)), []).append(row)
    batches = []
    for (how, limit), rows in sorted(groups.items()):
        rows.sort(key=lambda row: (lengths[row], row))
        batches += [
            Batch(rows[start : start + plan.batch_size], how, limit) for start in range(0, len(rows), plan.batch_size)
        ]
    return batches


def answer_file(model: Octavius, records: list[Record], stores: Stores, path: Path, plan: Plan) -> list[dict[str, Any]]:
    """Answer the questions of one shard into a file of one JSON line per record, in the order of the records.

    While it runs, the lines stand in `path` + ".partial", each batch written to the disk before the next one begins. A
    run of the same model, questions and plan goes on from what it holds; one of another run is begun anew.

    Returns:
        the lines: index, id, benchmark, image or pcl, question, answer, reference, experts, truth.
    Raises:
        ValueError: another process writes the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{partial}: another process writes it; choose another output folder") from error
        lines = _begin(file, {"run": _fingerprint(model, records, plan)})
        known = frozenset(line["index"] for line in lines)
        for rows, texts, weights in answer_batches(model, records, stores, plan, known):
            fresh = [
                answer_line(row, records[row], text, gates)
                for row, text, gates in zip(rows, texts, weights, strict=True)
                if row not in known
            ]
            _append(file, fresh)
            lines += fresh
        lines.sort(key=lambda line: line["index"])
        write_lines(path, lines)
        partial.unlink()
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    whole = path.with_name(path.name + ".whole")
    with whole.open("wb") as file:
        _append(file, lines)
    whole.replace(path)


def _begin(file: Any, header: dict[str, str]) -> list[dict[str, Any]]:
    """Whole lines of the same run; what is torn, or of another run, is cut off."""
    file.seek(0)
    lines, end = [], 0
    for raw in file.read().split(b"\n")[:-1]:  # what follows the last line break is torn, or nothing
        try:
            lines.append(json.loads(raw))
        except ValueError:
            break
        end += len(raw) + 1
    if not lines or lines[0] != header:
        lines, end = [], 0
    file.truncate(end)
    if not lines:
        _append(file, [header])
    return lines[1:]


def _append(file: Any, lines: list[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


def answer_line(index: int, record: Record, text: str, weights: torch.Tensor) -> dict[str, Any]:
    return {
        "index": index,
        "id": record.id,
        "benchmark": record.truth.get("benchmark"),
        "image" if record.image else "pcl": str(record.source),
        **({"object": record.cloud.object} if record.cloud and record.cloud.object is not None else {}),
        "question": record.turns[-1][0],
        "answer": text,
        "reference": record.turns[-1][1],
        "experts": [[e, round(w, 4)] for e, w in enumerate(weights.tolist()) if w > 0],
        "truth": record.truth,
    }


def _fingerprint(model: Octavius, records: list[Record], plan: Plan) -> str:
    """Names the model, the questions and the plan."""
    digest = hashlib.sha256(f"{plan} {model.settings}".encode())
    for name, value in sorted(model.named_parameters()):
        if value.requires_grad:
            digest.update(f"{name} {tuple(value.shape)} {value.detach().double().sum().item():.9e}".encode())
    for record in records:
        digest.update(f"{record.id} {record.source} {record.cloud} {record.turns} {record.truth}".encode())
    return digest.hexdigest()[:24]
