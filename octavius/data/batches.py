"""Records as token batches: records → samples → padded tensors."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from octavius.data.records import Record
from octavius.language.prompts import IGNORE, ConversationFormat
from octavius.points.object_store import Region
from octavius.vision.features import FeatureStore


class InstructionData(torch.utils.data.Dataset):
    """Records as token ids: {"input_ids", "labels", "gate_mask", "image", "cloud", "task"} each.

    `task` is a number: the place of the record's task in `tasks`.

    Args:
        records: from `read_records`.
        conversation: the format.
        image_tokens: P, tokens that stand for an image.
        max_tokens: cut what follows the image to this many tokens.
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
            raise ValueError("the data must hold at least one record with a readable image or cloud, got none")
        self.records, self.conversation = records, conversation
        self.tasks = sorted({record.task for record in records})
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
        seen = {"image": record.image, "cloud": record.cloud}
        return ids | seen | {"task": self.tasks.index(record.task)}


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
    """Pads samples to one batch and fetches the features of images and clouds, each only where there are some.

    Samples with an image and samples with a cloud share a batch; only text is padded.

    Args:
        pad: id to fill with.
        features: the store of the images' features.
        left: pad on the left, for generation.
        objects: list of clouds' regions → {"objects": [m, P, C], "boxes": [m, P, 6], "object_mask": [m, P]}.
        tasks: also give the batch's `tasks` [N], for counting which experts serve which.
    """

    def __init__(
        self,
        pad: int,
        features: FeatureStore | None,
        left: bool = False,
        objects: Callable[[list[Region]], dict[str, torch.Tensor]] | None = None,
        tasks: bool = False,
    ):
        self.pad, self.features, self.left, self.objects = pad, features, left, objects
        self.tasks = tasks

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
        if self.tasks:
            batch["tasks"] = torch.tensor([sample["task"] for sample in samples])  # [N]
        images = [sample["image"] for sample in samples if sample["image"]]
        clouds = [sample["cloud"] for sample in samples if sample["cloud"]]
        if images:
            if self.features is None:
                raise ValueError(f"a model without an image tower cannot read {images[0]}")
            # features [n, P, C], or pixels [n, 3, S, S] that the model's tower reads
            batch |= self.features.batch(images)
        if clouds:
            if self.objects is None:
                raise ValueError(f"a model without a 3D branch cannot read {clouds[0].cloud}")
            batch |= self.objects(clouds)
        return batch


def stack_mask(lengths: list[int], length: int, left: bool) -> torch.Tensor:
    """[N, L] ones on real tokens."""
    positions = torch.arange(length)
    return torch.stack([(positions >= length - n) if left else (positions < n) for n in lengths]).long()
