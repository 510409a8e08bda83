"""The projector's start in closed form: from what the tower sees to the words of the answers.

Ridge regression gives the projection W and the positions p together, from rows of input (x, e), target t and weight w:

    W, p = argmin Σ w ‖x W + e p − t‖² + λ ‖(W, p)‖²        x: C channels, e: which of the P tokens it is

A classification or description is one row: the mean of its picture's tokens, and the mean embedding of its answer's
tokens, each weighted by how rare it is (inverse document frequency). A detection is P rows: where the token's centre
is in a box, the mean embedding of the label plus the box's sides along four fixed directions; elsewhere 0. So the LLM
meets picture tokens that already speak of what it will be asked for, and learns to read them instead of what they look
like.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import normalize

from octavius.data import Record
from octavius.encoders import FeatureStore
from octavius.projector import Projector

RIDGE = 300.0  # λ
PICTURE_WEIGHT = 100.0  # w of a row that stands for a whole picture; a single token's is 1
SIDES = 1.0  # length of the four directions, in lengths of a text embedding
LOUDNESS = 6.0  # standard deviation of the LLM's picture tokens, in that of its text embeddings
KEPT = 0.5  # share of the random start that stays, so that all else that the tower sees comes through too
RECORDS = 4000  # of each kind, at most
CHUNK = 64

Rows = Iterator[tuple[Tensor, Tensor, float]]  # x and e [n, C + P], t [n, D], w


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
    found = [record for record in records if record.task_type == "detection" and "object" in record.truth][:RECORDS]
    table = table.float()
    mean = table.mean(0)
    table = table - mean
    C, P, D = projector.mean.numel(), *projector.positions.shape
    xx, xt = torch.zeros(C + P, C + P), torch.zeros(C + P, D)
    see = _Sight(projector, store)
    for x, target, weight in chain(_answers(told, see, tokens, table), _boxes(found, see, tokens, table)):
        xx += weight * x.T @ x
        xt += weight * x.T @ target
    if not xt.any():
        return
    solved = torch.linalg.solve(xx.double() + RIDGE * torch.eye(C + P, dtype=torch.double), xt.double()).float()
    seen = see(records[:: max(1, len(records) // 256)]) @ solved
    solved *= LOUDNESS * table.std() / seen.std()
    last = projector.net[0]
    last.weight.mul_(KEPT).add_(solved[:C].T)
    last.bias.copy_(mean)
    projector.positions.copy_(solved[C:])


class _Sight:
    """Standardised tower features of records with each token's number beside them."""

    def __init__(self, projector: Projector, store: FeatureStore):
        self.projector, self.store = projector, store

    def __call__(self, records: list[Record]) -> Tensor:  # [n, P, C + P]
        x = self.projector.standard(self.store([record.image for record in records]))
        return torch.cat((x, torch.eye(x.shape[1]).expand(len(x), -1, -1)), 2)


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


def _boxes(records: list[Record], see: _Sight, tokens: Callable[[str], list[int]], table: Tensor) -> Rows:
    """One row a token: the label and the sides of the smallest box that its centre lies in."""
    P, D = see.projector.positions.shape
    side = math.isqrt(P)
    centres = (torch.arange(side) + 0.5) / side
    y, x = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))  # [P]
    directions = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    directions = normalize(directions) * SIDES * table.std() * D**0.5
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        targets = torch.zeros(len(chunk), P, D)
        for row, record in enumerate(chunk):
            for item in sorted(record.truth["object"], key=_area, reverse=True):
                x1, y1, x2, y2 = item["bbox"]
                inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
                word = table[tokens(f" {item['label']}")].mean(0)
                targets[row, inside] = word + (2 * torch.tensor(item["bbox"]) - 1) @ directions
        yield see(chunk).flatten(0, 1), targets.flatten(0, 1), 1.0


def _area(item: dict) -> float:
    x1, y1, x2, y2 = item["bbox"]
    return (x2 - x1) * (y2 - y1)
