"""The projector's start in closed form: from what the tower sees to the words and the places of the answers.

Ridge regression gives the projection W and the positions p together, from rows of input (x, e), target t and weight w:

    W, p = argmin Σ w ‖x W + e p − t‖² + λ ‖(W, p)‖²        x: C channels, e: which of the P tokens it is

Words. A classification or description is one row: the mean of its picture's tokens, and the mean embedding of its
answer's tokens, each weighted by how rare it is (inverse document frequency). A detection is P rows: the embedding of
the label where the token's centre is in a box, 0 elsewhere. Places. Every token inside a box is a row, its target the
box's sides along four fixed directions. The sum of both is the start: the LLM meets picture tokens that already speak
of what it will be asked for, and learns to read them instead of what they look like.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from octavius.data import Record
from octavius.encoders import FeatureStore
from octavius.projector import Projector

RIDGE = 300.0  # λ
PLACE = 5.0  # size of e: a token's position costs 1 / PLACE² of what a channel costs
PICTURE_WEIGHT = 100.0  # w of a row that stands for a whole picture; a single token's is 1
SIDES = 1.0  # length of the four directions, in lengths of a text embedding
LOUDNESS = 6.0  # standard deviation of the LLM's picture tokens, in that of its text embeddings
KEPT = 0.5  # share of the random start that stays, so that all else that the tower sees comes through too
RECORDS = 4000  # of each kind, at most
CHUNK = 64

Rows = Iterator[tuple[Tensor, Tensor, float]]  # (x, e) [n, C + P], t [n, D], w


@torch.no_grad()
def align(
    projector: Projector,
    records: list[Record],
    store: FeatureStore,
    tokens: Callable[[str], list[int]],
    table: Tensor,
) -> None:
    """Set a linear projector's weight, bias and positions; without a fitting record it stays as it is.

    Args:
        projector: calibrated.
        records: of training.
        store: the features of their pictures.
        tokens: text → ids.
        table: [V, D] the LLM's text embeddings.

    Raises:
        ValueError: the projector is not linear.
    """
    if len(projector.net) != 1:
        raise ValueError("align needs projector: linear, only that has a closed form; set train.align: false")
    told = [record for record in records if record.task_type in ("classification", "description")][:RECORDS]
    found = [record for record in records if record.task_type == "detection" and record.truth.get("object")][:RECORDS]
    table = table.float()
    mean = table.mean(0)
    table = table - mean
    C, P, D = projector.mean.numel(), *projector.positions.shape
    see = _Sight(projector, store)
    words = _ridge(chain(_answers(told, see, tokens, table), _labels(found, see, tokens, table)), C + P, D)
    places = _ridge(_sides(found, see, table.std() * D**0.5), C + P, D)
    solved = words + places
    if not solved.any():
        return
    seen = see(records[:: max(1, len(records) // 256)]) @ solved
    solved *= LOUDNESS * table.std() / seen.std()
    last = projector.net[0]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(KEPT).add_(solved[:C].T)
    last.bias.copy_(mean)
    projector.positions.copy_(PLACE * solved[C:])


def _ridge(rows: Rows, inputs: int, D: int) -> Tensor:  # [inputs, D]
    xx, xt = RIDGE * torch.eye(inputs, dtype=torch.double), torch.zeros(inputs, D, dtype=torch.double)
    for x, target, weight in rows:
        xx += weight * x.T @ x
        xt += weight * x.T @ target
    return torch.linalg.solve(xx, xt).float()


class _Sight:
    """Standardised tower features of records with each token's number beside them."""

    def __init__(self, projector: Projector, store: FeatureStore):
        self.projector, self.store = projector, store

    def __call__(self, records: list[Record]) -> Tensor:  # [n, P, C + P]
        x = self.projector.standard(self.store([record.image for record in records if record.image]))
        return torch.cat((x, PLACE * torch.eye(x.shape[1]).expand(len(x), -1, -1)), 2)


def _answers(records: list[Record], see: _Sight, tokens: Callable[[str], list[int]], table: Tensor) -> Rows:
    """One row a picture: what is said of it."""
    if not records:
        return
    answers = [tokens(f" {record.turns[0][1]}") for record in records]
    seen = Counter(token for answer in answers for token in set(answer))
    rarity = torch.zeros(len(table))
    for token, count in seen.items():
        rarity[token] = math.log(len(answers) / count)
    targets = torch.stack([rarity[answer] @ table[answer] / rarity[answer].sum().clamp(min=1e-6) for answer in answers])
    targets -= targets.mean(0)
    for start in range(0, len(records), CHUNK):
        yield see(records[start : start + CHUNK]).mean(1), targets[start : start + CHUNK], PICTURE_WEIGHT


def _labels(records: list[Record], see: _Sight, tokens: Callable[[str], list[int]], table: Tensor) -> Rows:
    """One row a token: the label of the smallest box that its centre lies in."""
    for chunk, x, inside in _objects(records, see):
        targets = torch.zeros(*inside.shape, table.shape[1])
        for row, record in enumerate(chunk):
            for number, item in enumerate(record.truth["object"]):
                targets[row, inside[row] == number] = table[tokens(f" {item['label']}")].mean(0)
        yield x.flatten(0, 1), targets.flatten(0, 1), 1.0


def _sides(records: list[Record], see: _Sight, length: Tensor) -> Rows:
    """One row a token inside a box: the sides of the smallest such box."""
    directions = torch.randn(4, see.projector.positions.shape[1], generator=torch.Generator().manual_seed(0))
    directions = normalize(directions) * SIDES * length
    for chunk, x, inside in _objects(records, see):
        boxes = torch.cat([torch.tensor([item["bbox"] for item in record.truth["object"]]) for record in chunk])
        first = torch.tensor([0, *(len(record.truth["object"]) for record in chunk)]).cumsum(0)[:-1]
        found = inside >= 0
        yield x[found], (2 * boxes[(inside + first[:, None])[found]] - 1) @ directions, 1.0


def _objects(records: list[Record], see: _Sight) -> Iterator[tuple[list[Record], Tensor, Tensor]]:
    """Records, their tokens [n, P, C + P], and for each token the number of the smallest object around it, or -1."""
    side = math.isqrt(see.projector.positions.shape[0])
    centres = (torch.arange(side) + 0.5) / side
    y, x = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))  # [P]
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        inside = torch.full((len(chunk), side**2), -1)
        for row, record in enumerate(chunk):
            items = record.truth["object"]
            for number in sorted(range(len(items)), key=lambda i: _area(items[i]["bbox"]), reverse=True):
                x1, y1, x2, y2 = items[number]["bbox"]
                inside[row, (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)] = number
        yield chunk, see(chunk), inside


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
