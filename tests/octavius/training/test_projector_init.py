from pathlib import Path

import pytest
import torch
from torch import nn

from octavius.config import CloudConfig
from octavius.data.records import Record
from octavius.points.object_store import Objects, ObjectStore, Region
from octavius.points.scene_projector import SceneProjector
from octavius.training.projector_init import _directions, init_projector, init_scene_projector
from octavius.vision.features import FeatureStore
from octavius.vision.projector import Projector
from octavius.vision.towers import ImageTower

WORDS = {" red": 3, " blue": 4, " bird": 5, " fish": 6, " .": 7, " the": 8}
SIDE, C, D = 4, 24, 32
LEFT = (0.15, 0.35, 0.65)  # of objects that start in the first, second, third column of the grid


class Seen(ImageTower):
    """Only says how large its tokens are; the features are handed out by `Store`."""

    tokens, width, grid = SIDE**2, C, (SIDE, SIDE)


class Store(FeatureStore):
    def __init__(self, features: dict[Path, torch.Tensor]):
        super().__init__(Seen())
        self.features = features

    def __call__(self, paths):
        return torch.stack([self.features[path] for path in paths])


def tokens(text: str) -> list[int]:
    return [WORDS[f" {word}"] for word in text.split()]


def table() -> torch.Tensor:
    return torch.randn(12, D, generator=torch.Generator().manual_seed(3))


def told(number: int) -> tuple[list[Record], dict[Path, torch.Tensor]]:
    """Images whose colour is one noisy direction of all their tokens."""
    rng = torch.Generator().manual_seed(number)
    direction = torch.randn(2, C, generator=torch.Generator().manual_seed(5))
    records, features = [], {}
    for index in range(number):
        path = Path(f"{number}-{index}.png")
        answer = ("the red .", "the blue .")[index % 2]
        records.append(Record(str(index), path, [("Colour?", answer)], "classification", {}))
        features[path] = direction[index % 2] + torch.randn(SIDE**2, C, generator=rng)
    return records, features


def found(number: int) -> tuple[list[Record], dict[Path, torch.Tensor]]:
    """Images with a bird in one half and nothing or a fish in the other, told apart by the tokens' features."""
    rng = torch.Generator().manual_seed(7)
    direction = 2 * torch.randn(3, C, generator=rng)
    records, features = [], {}
    for index in range(number):
        path = Path(f"d{index}.png")
        objects = [{"label": "bird", "bbox": [0.0, 0.0, 0.5, 1.0]}, {"label": "fish", "bbox": [0.5, 0.5, 1.0, 1.0]}]
        records.append(Record(f"d{index}", path, [("Find.", "")], "detection", {"object": objects[: 1 + index % 2]}))
        kind = torch.zeros(SIDE, SIDE, dtype=torch.long)
        kind[:, : SIDE // 2] = 1
        if index % 2:
            kind[SIDE // 2 :, SIDE // 2 :] = 2
        features[path] = direction[kind.flatten()] + 0.3 * torch.randn(SIDE**2, C, generator=rng)
    return records, features


def start(features: dict[Path, torch.Tensor], kind: str = "linear") -> Projector:
    torch.manual_seed(0)
    projector = Projector(SIDE**2, C, D, kind, 1.0)
    projector.calibrate(torch.stack(list(features.values())))
    return projector


def nearest(vectors: torch.Tensor, words: list[int]) -> list[int]:
    rows = table() - table().mean(0)
    return [
        words[i] for i in (nn.functional.normalize(vectors, dim=-1) @ nn.functional.normalize(rows[words]).T).argmax(-1)
    ]


def test_align_makes_unseen_images_speak_of_their_answers():
    records, features = told(160)
    projector = start(features)
    init_projector(projector, records, Store(features), tokens, table())
    _, fresh = told(60)
    said = projector(torch.stack(list(fresh.values()))).mean(1)
    said = said - said.mean(0)
    right = [WORDS[" red"], WORDS[" blue"]] * 30
    hits = sum(a == b for a, b in zip(nearest(said.detach(), [3, 4, 7, 8]), right, strict=True))
    assert hits >= 54


def test_align_makes_tokens_speak_of_the_object_that_they_lie_in():
    records, features = found(80)
    projector = start(features)
    init_projector(projector, records, Store(features), tokens, table())
    z = projector(torch.stack(list(features.values()))).detach() - table().mean(0)  # [n, P, D]
    z = z.unflatten(1, (SIDE, SIDE))
    left, right = z[1::2, :, : SIDE // 2], z[1::2, SIDE // 2 :, SIDE // 2 :]
    difference = left.mean((0, 1, 2)) - right.mean((0, 1, 2))
    words = table()[WORDS[" bird"]] - table()[WORDS[" fish"]]
    assert torch.cosine_similarity(difference, words, dim=0) > 0.3
    empty = z[::2, :, SIDE // 2 :]  # no object there
    assert empty.square().mean() < 0.7 * left.square().mean()


def test_align_makes_tokens_say_where_the_side_in_them_is():
    rng = torch.Generator().manual_seed(1)
    records, features = [], {}
    for index in range(120):
        path, column = Path(f"s{index}.png"), index % 3
        box = [LEFT[column], 0.1, 0.95, 0.9]
        records.append(
            Record(f"s{index}", path, [("Find.", "")], "detection", {"object": [{"label": "bird", "bbox": box}]})
        )
        kind = torch.zeros(SIDE, SIDE, C)
        kind[:, column, 0], kind[:, column:, 1] = 4.0, 4.0  # the tower sees the edge, and the object
        features[path] = kind.flatten(0, 1) + 0.3 * torch.randn(SIDE**2, C, generator=rng)
    projector = start(features)
    init_projector(projector, records, Store(features), tokens, table())
    z = projector(torch.stack(list(features.values()))).detach().unflatten(1, (SIDE, SIDE)) - table().mean(0)
    edge, *sides = _directions(44, D).split((4, 10, 10, 10, 10))
    for column in range(3):
        here, elsewhere = z[column::3, :, column], z[column::3, :, 3]
        assert ((here - elsewhere) @ edge[0]).mean() > 0
        said = (here.mean((0, 1)) - z[:, :, :3].mean((0, 1, 2))) @ sides[0].T
        assert said.argmax() == int(10 * LEFT[column])


def test_align_is_deterministic():
    records, features = told(20)
    first, second = start(features), start(features)
    for projector in (first, second):
        init_projector(projector, records, Store(features), tokens, table())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "records", [[], [Record("v", Path("v.png"), [("Where?", "red")], "VQA", {})]], ids=["none", "vqa"]
)
def test_align_without_fitting_records_changes_nothing(records):
    projector = start(told(4)[1])
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    init_projector(projector, records, Store({Path("v.png"): torch.randn(SIDE**2, C)}), tokens, table())
    for name, value in projector.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_align_refuses_a_projector_without_closed_form():
    records, features = told(4)
    with pytest.raises(ValueError, match="linear"):
        init_projector(start(features, "mlp"), records, Store(features), tokens, table())


def scenes(number: int, seed: int) -> tuple[list[Record], ObjectStore]:
    """Scenes of one to three objects, each a bird or a fish by its features; of the last nothing is said."""
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.randn(2, C, generator=torch.Generator().manual_seed(11))
    records, stored = [], {}
    for index in range(number):
        path, count = Path(f"{seed}-{index}.npz"), 1 + index % 3
        labels = torch.randint(0, 2, (count,), generator=rng)
        features = kinds[labels] + 0.3 * torch.randn(count, C, generator=rng)
        boxes = torch.rand(count, 6, generator=rng).sort(-1).values
        stored[path] = Objects(features.half(), boxes, list(range(count)))
        for number_, label in enumerate(labels.tolist()[: max(1, count - 1)]):
            turns = [("What?", ("bird", "fish")[label])]
            records.append(Record(f"{index}", None, turns, "classification3d", {}, Region(path, number_)))
    return records, ObjectStore(scenes=stored)


def scene_projector() -> SceneProjector:
    torch.manual_seed(0)
    return SceneProjector(C, D, table().mean(0), table().std().item(), CloudConfig(queries=4, heads=2))


def test_align_scenes_makes_tokens_speak_of_the_objects_that_they_look_at():
    records, store = scenes(90, 1)
    scene = scene_projector()
    init_scene_projector(scene, records, store, tokens, table())
    assert scene.training
    scene.eval()
    fresh, others = scenes(60, 2)
    regions = [record.cloud for record in fresh if record.cloud]
    z = scene(**named(others(regions)))[0].detach() - table().mean(0)
    right = [WORDS[f" {record.turns[0][1]}"] for record in fresh]
    hits = sum(a == b for a, b in zip(nearest(z.mean(1), [5, 6, 3, 8]), right, strict=True))
    assert hits >= 0.9 * len(fresh)
    several = [Region(path) for path, objects in others.scenes.items() if len(objects.ids) == 3]
    look = scene(**named(others(several)))[1]
    assert look.max(-1).values.mean() > 0.7  # about one object a query, not the mean of three


def named(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"features": batch["objects"].float(), "boxes": batch["boxes"], "mask": batch["object_mask"]}


def test_align_scenes_without_single_objects_changes_nothing():
    _, store = scenes(3, 1)
    scene, before = scene_projector(), scene_projector().state_dict()
    record = Record("q", None, [("Where?", "bird")], "VQA3D", {}, Region(Path("1-0.npz")))
    init_scene_projector(scene, [record], store, tokens, table())
    for name, value in scene.state_dict().items():
        assert torch.equal(value, before[name]), name
