"""Upstream's 2D instruction JSON as token batches: records → samples → padded tensors.

A file is a list of {"image", "conversations": [{"from": "human" | "gpt", "value"}, ...], "task_type"}; a detection
answer is an XML string of <Item x1= y1= x2= y2= cls=> with corners in fractions of the picture (LAMM v2).
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console

from octavius.prompts import IGNORE, SYSTEM, ConversationFormat, box_answer

MAX_BAD_PICTURES = 0.01  # of the records; more than this stops the run
console = Console(stderr=True)


@dataclass(frozen=True)
class Record:
    """One conversation about one picture; `truth` is what the JSON carries beyond that, such as labels to score by."""

    id: str
    image: Path
    turns: list[tuple[str, str]]
    task_type: str
    truth: dict[str, Any]


def read_records(file: str | Path, images: str | Path | None = None) -> list[Record]:
    """Read a JSON file of conversations.

    Args:
        file: the JSON list.
        images: folder that relative image paths start from; None: the file's folder.

    Raises:
        ValueError: not JSON, or a malformed record: the file, the record and the field are named.
    """
    file = Path(file)
    folder = Path(images) if images else file.parent
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(items, list):
        raise ValueError(f"{file}: must be a list of records, got {type(items).__name__}")
    records = [_record(item, folder, f"{file}: record {index}") for index, item in enumerate(items)]
    kept = [record for record in records if record is not None]
    if len(kept) < len(items):
        console.print(f"{file}: {len(items) - len(kept)} of {len(items)} records have no picture and are skipped")
    return kept


def _record(item: Any, folder: Path, where: str) -> Record | None:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: must be an object, got {type(item).__name__}")
    if "id" in item:
        where = f"{where} (id {item['id']})"
    if item.get("image") is None:
        return None
    if not isinstance(item["image"], str):
        raise ValueError(f"{where}: field image must be a path, got {item['image']!r}")
    task_type = item.get("task_type", "normal")
    if task_type not in SYSTEM:
        raise ValueError(f"{where}: field task_type must be one of {', '.join(SYSTEM)}, got {task_type!r}")
    conversations = item.get("conversations")
    if not isinstance(conversations, list) or not conversations or len(conversations) % 2:
        raise ValueError(
            f"{where}: field conversations must hold pairs of human and gpt turns, got {conversations!r:.80}"
        )
    texts, truth = [], {}
    for index, turn in enumerate(conversations):
        speaker = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"{where}: field conversations[{index}] must be from {speaker} with a text value, got {turn!r:.80}"
            )
        text = turn["value"]
        if speaker == "gpt" and task_type == "detection" and text.lstrip().startswith("<"):
            truth["object"] = _objects(text, f"{where}: field conversations[{index}]")
            text = box_answer(truth["object"])
        texts.append(text.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", ""))
    truth |= {key: value for key, value in item.items() if key not in ("id", "image", "conversations", "task_type")}
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return Record(str(item.get("id", where)), folder / item["image"], turns, task_type, truth)


def _objects(text: str, where: str) -> list[dict]:
    """Objects of a detection answer in XML; a value may be an attribute of <Item> or its child element."""
    try:
        root = ElementTree.fromstring(f"<all>{text}</all>")
        return [
            {
                "label": item.get("cls") or item.findtext("cls") or "object",
                "bbox": [
                    min(1.0, max(0.0, float(item.get(k) or item.findtext(k) or ""))) for k in ("x1", "y1", "x2", "y2")
                ],
            }
            for item in root.iter("Item")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{where} must be XML <Item>s with x1, y1, x2, y2 and cls: {error}; got {text!r:.80}"
        ) from error


def drop_bad_pictures(records: list[Record], bad: dict[Path, str]) -> list[Record]:
    """Leave out the records of unreadable pictures, naming them.

    Args:
        bad: picture → why it cannot be read.

    Raises:
        ValueError: more than MAX_BAD_PICTURES of the records would go.
    """
    kept = [record for record in records if record.image not in bad]
    if not bad:
        return kept
    names = "; ".join(f"{path}: {why}" for path, why in list(bad.items())[:5])
    lost = len(records) - len(kept)
    count = f"{lost} of {len(records)} records have an unreadable picture ({len(bad)} pictures: {names})"
    if lost > MAX_BAD_PICTURES * len(records):
        raise ValueError(f"{count}; at most {MAX_BAD_PICTURES:.0%} may be")
    console.print(f"skipped: {count}")
    return kept


class InstructionData(torch.utils.data.Dataset):
    """Records as token ids: {"input_ids", "labels", "gate_mask", "image"} each.

    Args:
        records: from `read_records`.
        conversation: the format.
        image_tokens: P, tokens that stand for a picture.
        max_tokens: cut what follows the picture to this many tokens.
        answer: False leaves the last answer out, for generation.
    """

    def __init__(
        self,
        records: list[Record],
        conversation: ConversationFormat,
        image_tokens: int,
        max_tokens: int,
        answer: bool = True,
    ):
        if not records:
            raise ValueError("the data must hold at least one record with a readable picture, got none")
        self.records, self.conversation = records, conversation
        self.image_tokens, self.max_tokens, self.answer = image_tokens, max_tokens, answer

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        turns: list[tuple[str, str | None]] = list(record.turns)
        if not self.answer:
            turns[-1] = (turns[-1][0], None)
        limit = self.max_tokens if self.answer else 0  # a prompt is never cut: its end asks for the answer
        sample = self.conversation.encode(turns, record.task_type, self.image_tokens, limit)
        return {"input_ids": sample.ids, "labels": sample.labels, "gate_mask": sample.gate, "image": record.image}


class BucketSampler(torch.utils.data.Sampler[int]):
    """Random order in which the samples of one batch are about equally long.

    Windows of `window` batches are sorted by length, and the batches of each are shuffled: without that (as in
    transformers' `group_by_length`) the lengths, and with them the tasks, come in long runs of the same.

    Args:
        lengths: of the samples.
        batch_size: samples that a step pads together.
        seed: of the order; every pass over the data has another.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int = 0, window: int = 20):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self)))
        rng.shuffle(order)
        for start in range(0, len(order), self.batch_size * self.window):
            rows = sorted(order[start : start + self.batch_size * self.window], key=lambda row: self.lengths[row])
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # or it would shift those behind it
            rng.shuffle(batches)
            for batch in batches + last:
                yield from batch


class Collator:
    """Pads samples to one batch and fetches the pictures' features.

    Args:
        pad: id to fill with.
        features: list of picture paths → [N, P, C].
        left: pad on the left, for generation.
    """

    def __init__(self, pad: int, features: Callable[[list[Path]], torch.Tensor], left: bool = False):
        self.pad, self.features, self.left = pad, features, left

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)

        def stack(key: str, fill: int) -> torch.Tensor:
            rows = []
            for sample in samples:
                gap = [fill] * (length - len(sample[key]))
                rows.append(gap + sample[key] if self.left else sample[key] + gap)
            return torch.tensor(rows)

        return {
            "input_ids": stack("input_ids", self.pad),  # [N, L]
            "labels": stack("labels", IGNORE),
            "gate_mask": stack("gate_mask", 0),
            "attention_mask": stack_mask([len(sample["input_ids"]) for sample in samples], length, self.left),
            "features": self.features([sample["image"] for sample in samples]),  # [N, P, C]
        }


def stack_mask(lengths: list[int], length: int, left: bool) -> torch.Tensor:
    """[N, L] ones on real tokens."""
    positions = torch.arange(length)
    return torch.stack([(positions >= length - n) if left else (positions < n) for n in lengths]).long()
