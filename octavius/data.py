"""Upstream's instruction JSON, 2D and 3D, as token batches: records → samples → padded tensors.

A file is a list of {"image", "conversations": [{"from": "human" | "gpt", "value"}, ...], "task_type"}; a detection
answer is an XML string of <Item x1= y1= x2= y2= cls=> with corners in fractions of the picture (LAMM v2). Records about
point clouds have `pcl`, the cloud's file, and `object_id` where they are about one object (Scan2Inst).
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from rich.console import Console

from octavius.encoders import FeatureStore
from octavius.objects import ObjectStore, Region
from octavius.prompts import IGNORE, SYSTEM, ConversationFormat, box_answer

MAX_BAD_PICTURES = 0.01  # of the records; more than this stops the run
console = Console(stderr=True)


class Stores(NamedTuple):
    """Features of pictures and objects of point clouds; None for what the model does not read."""

    pictures: FeatureStore | None = None
    scenes: ObjectStore | None = None

    def prepare(self, records: "list[Record]") -> dict[Path | Region, str]:
        """Encode what the records show, once.

        Returns:
            the unreadable files and the objects that their clouds lack, each with the reason.
        """
        bad: dict[Path | Region, str] = {}
        if self.pictures:
            bad |= self.pictures.prepare([record.image for record in records if record.image])
        if self.scenes:
            regions = [record.cloud for record in records if record.cloud]
            bad |= self.scenes.prepare(region.cloud for region in regions)
            bad |= self.scenes.lacking(regions)
        return bad


@dataclass(frozen=True)
class Record:
    """One conversation about one picture or point cloud; `truth` is the rest of its JSON, such as labels."""

    id: str
    image: Path | None
    turns: list[tuple[str, str]]
    task_type: str
    truth: dict[str, Any]
    cloud: Region | None = None

    @property
    def source(self) -> Path:
        """The file of the picture or of the cloud."""
        assert self.image or self.cloud
        return self.image or self.cloud.cloud  # type: ignore[union-attr, return-value]


def read_records(file: str | Path, images: str | Path | None = None) -> list[Record]:
    """Read a JSON file of conversations.

    Args:
        file: the JSON list.
        images: folder that relative paths of pictures and clouds start from; None: the file's folder.

    Raises:
        ValueError: not JSON, or a malformed record: the file, the record and the field are named.
    """
    file = Path(file)
    folder = Path(images) if images else file.parent
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    return make_records(items, file, folder)


def make_records(items: Any, file: Path, folder: Path) -> list[Record]:
    """Records of a parsed JSON list; errors name `file`."""
    if not isinstance(items, list):
        raise ValueError(f"{file}: must be a list of records, got {type(items).__name__}")
    records = [_record(item, folder, f"{file}: record {index}") for index, item in enumerate(items)]
    kept = [record for record in records if record is not None]
    if len(kept) < len(items):
        without = len(items) - len(kept)
        console.print(f"{file}: {without} of {len(items)} records have no picture or cloud and are skipped")
    return kept


def _record(item: Any, folder: Path, where: str) -> Record | None:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: must be an object, got {type(item).__name__}")
    if "id" in item:
        where = f"{where} (id {item['id']})"
    if item.get("image") is None and item.get("pcl") is None:
        return None
    for field in ("image", "pcl"):
        if not isinstance(item.get(field), str | None):
            raise ValueError(f"{where}: field {field} must be a path, got {item[field]!r}")
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
        texts.append(re.sub(r"<(image|pcl)>\n|\n?<(image|pcl)>", "", text))
    known = ("id", "image", "pcl", "conversations", "task_type")
    truth |= {key: value for key, value in item.items() if key not in known}
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    image = None if item.get("image") is None else folder / item["image"]
    cloud = None if item.get("pcl") is None else Region(folder / item["pcl"], _object(item, task_type, where))
    return Record(str(item.get("id", where)), image, turns, task_type, truth, cloud)


def _object(item: dict, task_type: str, where: str) -> int | None:
    """The number of the object that a record shows alone: that of classification and description."""
    if task_type not in ("classification3d", "description3d") or item.get("object_id") is None:
        return None
    try:
        return int(item["object_id"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: field object_id must be a number, got {item['object_id']!r}") from error


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


def drop_bad_pictures(records: list[Record], bad: dict[Path | Region, str]) -> list[Record]:
    """Leave out the records of unreadable pictures or clouds, and of objects that their cloud lacks, naming them.

    Args:
        bad: file, or object of a cloud → why it cannot be read.

    Raises:
        ValueError: more than MAX_BAD_PICTURES of the records would go.
    """
    kept = [record for record in records if record.source not in bad and record.cloud not in bad]
    if not bad:
        return kept
    files = [(key.cloud if isinstance(key, Region) else key, why) for key, why in bad.items()]
    names = "; ".join(f"{path}: {why}" for path, why in files[:5])
    lost = len(records) - len(kept)
    count = f"{lost} of {len(records)} records have an unreadable picture or cloud"
    count += f" ({len({path for path, _ in files})} files: {names})"
    if lost > MAX_BAD_PICTURES * len(records):
        raise ValueError(f"{count}; at most {MAX_BAD_PICTURES:.0%} may be")
    console.print(f"skipped: {count}")
    return kept


class InstructionData(torch.utils.data.Dataset):
    """Records as token ids: {"input_ids", "labels", "gate_mask", "image", "cloud"} each.

    Args:
        records: from `read_records`.
        conversation: the format.
        image_tokens: P, tokens that stand for a picture.
        max_tokens: cut what follows the picture to this many tokens.
        answer: False leaves the last answer out, for generation.
        cloud_tokens: Q, tokens that stand for a point cloud.
    """

    def __init__(
        self,
        records: list[Record],
        conversation: ConversationFormat,
        image_tokens: int,
        max_tokens: int,
        answer: bool = True,
        cloud_tokens: int = 0,
    ):
        if not records:
            raise ValueError("the data must hold at least one record with a readable picture or cloud, got none")
        self.records, self.conversation = records, conversation
        self.cloud_tokens = cloud_tokens
        self.image_tokens, self.max_tokens, self.answer = image_tokens, max_tokens, answer

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        turns: list[tuple[str, str | None]] = list(record.turns)
        if not self.answer:
            turns[-1] = (turns[-1][0], None)
        limit = self.max_tokens if self.answer else 0  # a prompt is never cut: its end asks for the answer
        tokens = [self.image_tokens if record.image else 0, limit, self.cloud_tokens if record.cloud else 0]
        sample = self.conversation.encode(turns, record.task_type, *tokens)
        ids = {"input_ids": sample.ids, "labels": sample.labels, "gate_mask": sample.gate}
        return {**ids, "image": record.image, "cloud": record.cloud}


class BucketSampler(torch.utils.data.Sampler[int]):
    """Random order in which the samples of one batch are about equally long.

    Windows of `window` batches are sorted by length, and the batches of each are shuffled: without that (as in
    transformers' `group_by_length`) the lengths, and with them the tasks, come in long runs of the same.

    Args:
        lengths: of the samples.
        batch_size: samples that a step pads together.
        seed: of the order; every pass over the data has another.
        first: samples that the first pass begins with.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int = 0, window: int = 20, first: Sequence[int] = ()):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.first, self.epoch = frozenset(first), 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self)))
        rng.shuffle(order)
        first = [row for row in order if row in self.first] if not self.epoch else []
        rest = [row for row in order if row not in self.first] if first else order
        for part in (first, rest):
            yield from self._batches(part, rng)

    def _batches(self, order: list[int], rng: random.Random) -> Iterator[int]:
        for start in range(0, len(order), self.batch_size * self.window):
            rows = sorted(order[start : start + self.batch_size * self.window], key=lambda row: self.lengths[row])
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # or it would shift those behind it
            rng.shuffle(batches)
            for batch in batches + last:
                yield from batch


class Collator:
    """Pads samples to one batch and fetches the features of pictures and clouds, each only where there are some.

    Samples with a picture and samples with a cloud share a batch; only text is padded.

    Args:
        pad: id to fill with.
        features: list of picture paths → [n, P, C].
        left: pad on the left, for generation.
        objects: list of clouds' regions → {"objects": [m, P, C], "boxes": [m, P, 6], "object_mask": [m, P]}.
    """

    def __init__(
        self,
        pad: int,
        features: Callable[[list[Path]], torch.Tensor] | None,
        left: bool = False,
        objects: Callable[[list[Region]], dict[str, torch.Tensor]] | None = None,
    ):
        self.pad, self.features, self.left, self.objects = pad, features, left, objects

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)

        def stack(key: str, fill: int) -> torch.Tensor:
            rows = []
            for sample in samples:
                gap = [fill] * (length - len(sample[key]))
                rows.append(gap + sample[key] if self.left else sample[key] + gap)
            return torch.tensor(rows)

        batch = {
            "input_ids": stack("input_ids", self.pad),  # [N, L]
            "labels": stack("labels", IGNORE),
            "gate_mask": stack("gate_mask", 0),
            "attention_mask": stack_mask([len(sample["input_ids"]) for sample in samples], length, self.left),
        }
        images = [sample["image"] for sample in samples if sample["image"]]
        clouds = [sample["cloud"] for sample in samples if sample["cloud"]]
        if images:
            if self.features is None:
                raise ValueError(f"a model without an image tower cannot read {images[0]}")
            batch["features"] = self.features(images)  # [n, P, C]
        if clouds:
            if self.objects is None:
                raise ValueError(f"a model without a 3D branch cannot read {clouds[0].cloud}")
            batch |= self.objects(clouds)
        return batch


def stack_mask(lengths: list[int], length: int, left: bool) -> torch.Tensor:
    """[N, L] ones on real tokens."""
    positions = torch.arange(length)
    return torch.stack([(positions >= length - n) if left else (positions < n) for n in lengths]).long()
