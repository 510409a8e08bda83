"""The projectors' start in closed form: from what tower and encoder see to the words and the places of the answers.

Ridge regression gives the projection W and the positions p together, from rows of input (x, e), target t and weight w:

    W, p = argmin Σ w ‖x W + e p − t‖² + λ ‖(W, p)‖²        x: C channels, e: which of the P tokens it is

Words. A classification or description is one row: the mean of its image's tokens, and the mean embedding of its
answer's tokens, each weighted by how rare it is (inverse document frequency). A detection is P rows: the embedding of
the label where the token's centre is in a box, 0 elsewhere. Places. Every token inside a box is a row, its target the
box's sides along four fixed directions. The sum of both is the start: the LLM meets image tokens that already speak
of what it will be asked for, and learns to read them instead of what they look like.

Scenes (`init_scene_projector`) have no grid of tokens: there the first cross-attention is set so that every query
looks at about one object, and the regression goes from the resampler's output to the words said of the object that
the query looks at, and to its box.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import cast

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import normalize

from octavius.data.records import Record
from octavius.points.object_store import ObjectStore, Region
from octavius.points.scene_projector import Attention, SceneProjector
from octavius.vision.features import FeatureStore
from octavius.vision.projector import Projector

RIDGE = 300.0  # λ
PLACE = 5.0  # size of e: a token's position costs 1 / PLACE² of what a channel costs
IMAGE_WEIGHT = 100.0  # w of a row that stands for a whole image; a single token's is 1
PLACE_NORM = 0.5  # length of the directions that say places, in lengths of a text embedding
TOUCH = 0.01  # of the image: an object that reaches less far into a token's cell is not in it
LOUDNESS = 6.0  # standard deviation of the LLM's image tokens, in that of its text embeddings
KEPT = 0.5  # share of the random start that stays, so that all else that the tower sees comes through too
KEPT_OF_SCENES = 2.0  # the same of scenes, whose colours else drown in names and places
RECORDS = 3000  # of each kind, at most
FOCUS = 4.0  # standard deviation of a query's attention scores over single objects
SCENES = 1000  # at most
CHUNK = 64

Tokens = Callable[[str], list[int]]  # of a text
Rows = Iterator[tuple[Tensor, Tensor, Tensor | float]]  # (x, e) [n, C + P], t [n, D], w of all or [n, 1]


@torch.no_grad()
def init_projector(
    projector: Projector,
    records: list[Record],
    store: FeatureStore,
    tokens: Tokens,
    table: Tensor,
) -> None:
    """Set a linear projector's weight, bias and positions; without a fitting record it stays as it is.

    Args:
        projector: calibrated.
        records: of training.
        store: the features of their images.
        tokens: text → ids.
        table: [V, D] the LLM's text embeddings.

    Raises:
        ValueError: the projector is not linear.
    """
    if len(projector.net) != 1:
        raise ValueError("train.projector_init needs model.projector: linear, which alone has a closed form")
    told = [record for record in records if record.task_type in ("classification", "description")][:RECORDS]
    found = [record for record in records if record.task_type == "detection" and record.truth.get("object")][:RECORDS]
    found = found if store.tower.grid else []  # without a grid no token has a place
    table = table.float()
    mean = table.mean(0)
    table = table - mean
    C, P, D = projector.mean.numel(), *projector.positions.shape
    see = _Sight(projector, store)
    words = _ridge(chain(_answers(told, see, tokens, table), _labels(found, see, tokens, table)), C + P, D)
    placed = found[: RECORDS // 2]
    edges, *sides = _directions(4 + 40, D).mul(table.std() * D**0.5).split((4, 10, 10, 10, 10))
    places = _ridge(_edges(placed, see, edges), C + P, D)
    for side, decimals in enumerate(sides):
        places += _ridge(_sides(placed, see, side, decimals), C + P, D)
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
        xx += (weight * x).T @ x
        xt += (weight * x).T @ target
    return torch.linalg.solve(xx, xt).float()


class _Sight:
    """Standardised tower features of records with each token's number beside them."""

    def __init__(self, projector: Projector, store: FeatureStore):
        self.projector, self.store = projector, store

    def __call__(self, records: list[Record]) -> Tensor:  # [n, P, C + P]
        x = self.projector.standard(self.store([record.image for record in records if record.image]))
        return torch.cat((x, PLACE * torch.eye(x.shape[1]).expand(len(x), -1, -1)), 2)


def _answers(records: list[Record], see: _Sight, tokens: Tokens, table: Tensor) -> Rows:
    """One row an image: what is said of it."""
    if not records:
        return
    targets = _meanings([tokens(f" {record.turns[0][1]}") for record in records], table)
    for start in range(0, len(records), CHUNK):
        yield see(records[start : start + CHUNK]).mean(1), targets[start : start + CHUNK], IMAGE_WEIGHT


def _meanings(answers: list[list[int]], table: Tensor) -> Tensor:
    """The mean embedding of each answer's tokens, rare ones counting more; less the mean of all answers. [n, D]"""
    seen = Counter(token for answer in answers for token in set(answer))
    rarity = torch.zeros(len(table))
    for token, count in seen.items():
        rarity[token] = math.log(len(answers) / count)
    answers = [list(dict.fromkeys(answer)) for answer in answers]  # what is said twice means no more
    means = torch.stack([rarity[answer] @ table[answer] / rarity[answer].sum().clamp(min=1e-6) for answer in answers])
    return means - means.mean(0)


def _labels(records: list[Record], see: _Sight, tokens: Tokens, table: Tensor) -> Rows:
    """One row a token: the label of the smallest box that its centre lies in."""
    for chunk, x, inside, *_ in _objects(records, see):
        targets = torch.zeros(*inside.shape, table.shape[1])
        for row, record in enumerate(chunk):
            for number, item in enumerate(record.truth["object"]):
                targets[row, inside[row] == number] = table[tokens(f" {item['label']}")].mean(0)
        yield x.flatten(0, 1), targets.flatten(0, 1), 1.0


def _edges(records: list[Record], see: _Sight, directions: Tensor) -> Rows:
    """One row a token: which sides of the smallest object around it cross its cell."""
    for _, x, _, sides, _ in _objects(records, see):
        yield x.flatten(0, 1), (sides.float() @ directions).flatten(0, 1), 1.0


def _sides(records: list[Record], see: _Sight, side: int, directions: Tensor) -> Rows:
    """One row a token whose cell a side of its object crosses: the decimals around that side's place."""
    for _, x, _, sides, boxes in _objects(records, see):
        crossed = sides[..., side]
        yield x[crossed], _decimals(boxes[crossed][:, side]) @ directions, 1.0


def _decimals(values: Tensor) -> Tensor:
    """Values in 0..1 as weights of the ten decimals, linear in between. [n, 10]"""
    middles = (torch.arange(10) + 0.5) / 10
    return (1 - (values[:, None] - middles).abs() * 10).clamp(min=0)


def _directions(count: int, D: int) -> Tensor:  # [count, D]
    return PLACE_NORM * normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(0)))


def _objects(records: list[Record], see: _Sight) -> Iterator[tuple[list[Record], Tensor, Tensor, Tensor, Tensor]]:
    """Records, their tokens [n, P, C + P], and of the smallest object in each token's cell the number [n, P], or -1,
    which of its sides x1, y1, x2, y2 cross the cell [n, P, 4], and its box [n, P, 4]."""
    if not records:
        return
    assert see.store.tower.grid
    rows, columns = see.store.tower.grid
    corners = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    y, x = (corner.flatten() for corner in corners)  # of the cells, [P]
    cells = torch.stack((x, y, x + 1 / columns, y + 1 / rows), 1)
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        number = torch.full((len(chunk), len(cells)), -1)
        boxes = torch.zeros(len(chunk), len(cells), 4)
        for row, record in enumerate(chunk):
            items = record.truth["object"]
            for index in sorted(range(len(items)), key=lambda i: _area(items[i]["bbox"]), reverse=True):
                box = torch.tensor(items[index]["bbox"])
                touched = ((cells[:, 2:] > box[:2] + TOUCH) & (cells[:, :2] < box[2:] - TOUCH)).all(1)
                number[row, touched], boxes[row, touched] = index, box
        crossed = torch.cat((cells[:, :2] <= boxes[..., :2], cells[:, 2:] >= boxes[..., 2:]), 2)
        yield chunk, see(chunk), number, crossed & (number >= 0)[..., None], boxes


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@torch.no_grad()
def init_scene_projector(
    scene: SceneProjector,
    records: list[Record],
    store: ObjectStore,
    tokens: Tokens,
    table: Tensor,
) -> None:
    """Set the queries' first look and the projection of a scene projector; without a fitting record it stays as it is.

    Args:
        records: of training, with clouds; what is said of single objects is learnt from.
        store: the objects of their clouds.
        tokens: text → ids.
        table: [V, D] the LLM's text embeddings.
    """
    told = [record for record in records if record.cloud and record.cloud.object is not None]
    if not told:
        return
    table = table.float()
    mean = table.mean(0)
    said: dict[Region, list[int]] = {}  # of an object, all its answers one after the other
    for record in told:
        assert record.cloud
        said.setdefault(record.cloud, []).extend(tokens(f" {record.turns[0][1]}"))
    meanings = dict(zip(said, _meanings(list(said.values()), table - mean), strict=True))
    whole = dict.fromkeys(Region(region.cloud) for region in said)
    regions = [*list(whole)[:SCENES], *list(said)[: 2 * SCENES]]
    was_training = scene.training
    scene.eval()
    _focus(scene, store(list(said)), torch.stack(list(meanings.values())))
    looks = [_look(scene, store, regions[i : i + CHUNK], meanings) for i in range(0, len(regions), CHUNK)]
    scene.train(was_training)
    seen, words, known, boxes = (torch.cat(column) for column in zip(*looks, strict=True))
    x = seen - seen.mean(0)
    D = table.shape[1]
    places = ((boxes - boxes.mean(0)) / boxes.std(0).clamp(min=1e-3)) @ _directions(6, D) * table.std() * D**0.5
    solved = [_ridge(iter([rows]), x.shape[1], D) for rows in ((x, words, known), (x, places, 1.0))]
    solved = torch.stack([part / (x @ part).std() for part in solved]).sum(0)  # as loud as each other
    linear, norm = scene.llama_proj_3d
    assert isinstance(linear, nn.Linear) and isinstance(norm, nn.LayerNorm)
    start = KEPT_OF_SCENES * linear.weight / (x @ linear.weight.T).std() + LOUDNESS * solved.T / (x @ solved).std()
    linear.weight.copy_(start)
    linear.bias.copy_(-start @ seen.mean(0))
    norm.weight.fill_(LOUDNESS * table.std())
    norm.bias.copy_(mean)


def _focus(scene: SceneProjector, batch: dict[str, Tensor], meanings: Tensor) -> None:
    """Have each query of the first cross-attention look for objects of one kind, and its values be standardised.

    The kinds are clusters of what is said of single objects. A ridge classifier from what the attention reads to the
    kinds is split into keys and queries, the same for all heads.

    Args:
        batch: of single objects.
        meanings: [n, D] of the same.
    """
    cross = cast(Attention, scene.resampler_3d.cross_attn[0])
    q, k, v = (cast(nn.Linear, cross.attention[name]) for name in ("fc_q", "fc_k", "fc_v"))
    queries = scene.resampler_3d.query_embed.weight  # [Q, C]
    objects = (batch["objects"].float() + scene.pos_3d_proj(batch["boxes"]))[:, 0]
    mean, std = objects.mean(0), objects.std(0) + 1e-2
    x = (objects - mean) / std
    apart = torch.cat((meanings / meanings.std().clamp(min=1e-6), 0.1 * x), 1)  # looks part what words do not
    kinds = KMeans(min(len(queries), len(x)), random_state=0).fit_predict(apart.numpy())
    target = nn.functional.one_hot(torch.from_numpy(kinds).long(), len(queries)) - 1 / len(queries)
    classifier = _ridge(iter([(x, target, 1.0)]), x.shape[1], len(queries))
    classifier *= FOCUS / (x @ classifier).std(0).mean()
    left, strength, right = torch.linalg.svd(classifier, full_matrices=False)
    size = len(q.weight) // cross.heads  # of a head; queries beyond it share directions
    keys = nn.functional.pad((left * strength)[:, :size], (0, max(0, size - len(strength))))  # [C, size]
    picks = nn.functional.pad(right.T[:, :size], (0, max(0, size - len(strength)))) * size**0.5  # [Q, size]
    q.weight.copy_((torch.linalg.pinv(queries) @ picks).T.repeat(cross.heads, 1))
    q.bias.zero_()
    k.weight.copy_((keys / std[:, None]).T.repeat(cross.heads, 1))
    v.weight.div_(std)
    for part in (k, v):
        part.bias.copy_(-part.weight @ mean)


def _look(
    scene: SceneProjector, store: ObjectStore, regions: list[Region], meanings: dict[Region, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row a query of each region: [n, C] the resampler's output; of the objects that the query looks at [n, D]
    what is said of them, [n, 1] the share of those of which something is said, and [n, 6] the box."""
    batch = store(regions)
    boxes, mask = batch["boxes"], batch["object_mask"]
    x, weights = scene.resampler_3d(batch["objects"].float() + scene.pos_3d_proj(boxes), mask)
    words = torch.zeros(*mask.shape, len(next(iter(meanings.values()))))
    known = torch.zeros(*mask.shape, 1)
    for row, region in enumerate(regions):
        numbers = store.scenes[region.cloud].ids if region.object is None else [region.object]
        for place, number in enumerate(numbers):
            if (meaning := meanings.get(Region(region.cloud, number))) is not None:
                words[row, place], known[row, place] = meaning, 1.0
    share = weights @ known
    words = weights @ words / share.clamp(min=1e-6)
    return tuple(rows.flatten(0, 1) for rows in (x, words, share, weights @ boxes))  # type: ignore[return-value]
