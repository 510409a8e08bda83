"""What a model saw of a point cloud: the points, the objects' boxes, and the share of attention each object got."""

from pathlib import Path

import torch
from PIL import Image

from octavius.model.octavius import Octavius
from octavius.points.cloud import read_cloud
from octavius.points.object_store import ObjectStore, Region
from octavius.points.render import render


def scene_image(
    model: Octavius, store: ObjectStore, region: Region, unit: str = "m", size: int = 480
) -> Image.Image | None:
    """Draw a region of the store; None where its cloud is not at hand, as with precomputed objects.

    The number at a box is the mean share of the queries' attention, in percent; of one object alone it is 100.
    """
    if not region.cloud.is_file():
        return None
    boxes, shares = attention(model, store, region)
    cloud = read_cloud(region.cloud, unit)
    labels = [f"{100 * share:.0f}" for share in shares.tolist()]
    return render(cloud, size, yaw=20.0, pitch=40.0, boxes=boxes.numpy(), labels=labels, dot=2)


@torch.inference_mode()
def attention(model: Octavius, store: ObjectStore, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [P, 6] of a region's objects and the mean weight [P] that the queries' cross-attention gives each."""
    was_training = model.training
    model.eval()
    batch = {name: value.to(model.device) for name, value in store([region]).items()}
    _, weights = model.scene(batch["objects"], batch["boxes"], batch["object_mask"])  # [1, Q, P]
    model.train(was_training)
    return batch["boxes"][0].cpu(), weights[0].mean(0).cpu()


def save_scene_image(model: Octavius, store: ObjectStore, region: Region, file: Path, unit: str = "m") -> Path | None:
    """Write the image of a region; None where there is nothing to draw."""
    image = scene_image(model, store, region, unit)
    if image is None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file
