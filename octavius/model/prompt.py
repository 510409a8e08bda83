"""What a conversation shows and asks, as the tensors that the model reads: images and clouds in memory, no files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from octavius.language.dialogue import Turn, encode_dialogue
from octavius.model.octavius import Octavius
from octavius.points.cloud import PointCloud
from octavius.points.object_store import encode_objects
from octavius.points.proposals import Boxes


@dataclass(frozen=True)
class SeenImage:
    """An encoded image. features: [1, P, C]."""

    features: torch.Tensor


@dataclass(frozen=True)
class SeenCloud:
    """An encoded point cloud.

    objects, boxes: [O, C] and [O, 6] in metres; attention: [O], the mean share that the scene's queries give each.
    """

    objects: torch.Tensor
    boxes: torch.Tensor
    attention: torch.Tensor


Seen = SeenImage | SeenCloud


@dataclass(frozen=True)
class Prompt:
    """One conversation as `Octavius.embed` takes it, a batch of one.

    input_ids, gate_mask: [1, L]; seen: features of its images, objects of its clouds.
    """

    input_ids: torch.Tensor
    gate_mask: torch.Tensor
    seen: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return self.input_ids.shape[1]


@dataclass(frozen=True)
class Exchange:
    """One turn: what it shows, what it asks, and its answer, None while it is open."""

    question: str
    seen: tuple[Seen, ...] = ()
    answer: str | None = None


@torch.no_grad()
def see_image(model: Octavius, image: Image.Image) -> SeenImage:
    """Encode an image.

    Raises:
        ValueError: the model reads no images.
    """
    tower = model.tower[0]
    if tower is None:
        raise ValueError("this model reads point clouds alone: it was trained without model.tower")
    pixels = tower.pixels(image)[None].to(next(tower.parameters()).device)
    return SeenImage(tower(pixels).half())


@torch.no_grad()
def see_cloud(model: Octavius, cloud: PointCloud, boxes: Boxes | None = None) -> SeenCloud:
    """Encode a point cloud with the given boxes of its objects, or with proposals.

    Raises:
        ValueError: the model reads no clouds, or none of the boxes holds points.
    """
    if not model.settings.clouds:
        raise ValueError("this model reads images alone: it was trained without model.clouds")
    if model.encoder[0] is None:
        raise ValueError("this model has no point encoder: it reads precomputed objects only")
    scene = encode_objects(model.encoder[0], cloud, boxes)
    mask = torch.ones(1, len(scene.ids), dtype=torch.bool)
    inputs = (scene.features[None], scene.boxes[None], mask)
    _, weights = model.scene(*(tensor.to(model.device) for tensor in inputs))  # [1, Q, O]
    return SeenCloud(scene.features, scene.boxes, weights[0].mean(0).float().cpu())


def make_prompt(model: Octavius, turns: Sequence[Exchange], task_type: str = "normal", blind: bool = False) -> Prompt:
    """Encode a conversation whose last turn is open.

    Args:
        model: its format and its tokens.
        turns: at least one.
        task_type: of models that were trained with system messages.
        blind: leave out what the turns show, so that the text alone can help.

    Raises:
        ValueError: no turn, an empty question, or an unknown task type.
    """
    if not turns or not all(turn.question.strip() for turn in turns):
        raise ValueError("question must be a text, got an empty one")
    shown = [() if blind else turn.seen for turn in turns]
    images = [thing for seen in shown for thing in seen if isinstance(thing, SeenImage)]
    clouds = [thing for seen in shown for thing in seen if isinstance(thing, SeenCloud)]
    texts = []
    for turn, seen in zip(turns, shown, strict=True):
        count = sum(isinstance(thing, SeenImage) for thing in seen)
        texts.append(Turn(turn.question, turn.answer, count, len(seen) - count))
    ids, gate = encode_dialogue(model.conversation, texts, task_type, model.image_tokens, model.cloud_tokens)
    batch: dict[str, torch.Tensor] = {}
    if images:
        batch["features"] = torch.cat([image.features for image in images])
    if clouds:
        batch |= _pad(clouds)
    return Prompt(torch.tensor([ids]), torch.tensor([gate]), batch)


def check_alike(model: Octavius, other: Octavius) -> None:
    """Raise ValueError unless both models see alike, so that what one has encoded the other reads too."""
    for name in ("tower", "tower_layer", "tower_merge", "clouds"):
        have, want = getattr(other.settings, name), getattr(model.settings, name)
        if have != want:
            raise ValueError(f"the models to compare must see alike: model.{name} must be {want}, got {have}")


def _pad(clouds: Sequence[SeenCloud]) -> dict[str, torch.Tensor]:
    most = max(len(cloud.boxes) for cloud in clouds)
    objects = torch.zeros(len(clouds), most, clouds[0].objects.shape[1], dtype=clouds[0].objects.dtype)
    boxes, mask = torch.zeros(len(clouds), most, 6), torch.zeros(len(clouds), most, dtype=torch.bool)
    for row, cloud in enumerate(clouds):
        count = len(cloud.boxes)
        objects[row, :count], boxes[row, :count], mask[row, :count] = cloud.objects, cloud.boxes, True
    return {"objects": objects, "boxes": boxes, "object_mask": mask}
