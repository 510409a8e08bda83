"""One question about one image or point cloud."""

from dataclasses import dataclass
from pathlib import Path

from octavius.data.batches import Collator, InstructionData
from octavius.data.records import Record
from octavius.model.octavius import Octavius
from octavius.points.object_store import ObjectStore, Region
from octavius.points.proposals import Boxes
from octavius.report.scene_image import save_scene_image
from octavius.vision.features import FeatureStore


@dataclass(frozen=True)
class Scan:
    """A point cloud to ask about: its file, the unit of its points and boxes, its boxes (None: proposals).

    draw: an image file that receives the cloud, the boxes and the attention they got.
    """

    file: Path
    unit: str = "m"
    boxes: Boxes | None = None
    draw: Path | None = None


def chat(
    model: Octavius,
    seen: Path | Scan,
    question: str,
    task_type: str = "normal",
    max_new_tokens: int = 128,
) -> tuple[str, list[tuple[int, float]]]:
    """Ask a model about an image or a point cloud.

    Returns:
        the answer, and (expert, weight) of the experts that gave it, heaviest first.

    Raises:
        ValueError: the image or the cloud cannot be read, or the model does not read such.
    """
    if not question.strip():
        raise ValueError("question must be a text, got an empty one")
    images, scenes, image, cloud = None, None, None, None
    if isinstance(seen, Scan):
        if not model.settings.clouds:
            raise ValueError("this model reads images alone: it was trained without model.clouds")
        scenes, cloud = ObjectStore(model.encoder[0]), Region(seen.file)
        scenes.add(seen.file, seen.boxes, seen.unit)
        if seen.draw:
            save_scene_image(model, scenes, cloud, seen.draw, seen.unit)
    else:
        if model.tower[0] is None:
            raise ValueError("this model reads point clouds alone: it was trained without model.tower")
        images, image = FeatureStore(model.tower[0]), seen
        if bad := images.prepare([seen]):
            raise ValueError(f"image must be a readable image, got {seen}: {bad[seen]}")
    record = Record("chat", image, [(question, "")], task_type, {}, cloud)
    data = InstructionData([record], model.conversation, model.image_tokens, 0, False, model.cloud_tokens)
    batch = Collator(model.conversation.eos, images, True, scenes)([data[0]])
    batch.pop("labels")
    answers, weights = model.eval().generate(**batch, max_new_tokens=max_new_tokens)
    used = [(expert, weight) for expert, weight in enumerate(weights[0].tolist()) if weight > 0]
    return answers[0], sorted(used, key=lambda pair: -pair[1])
