"""Small real clouds, an untrained point encoder of few channels, and a model that reads images and clouds."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from octavius.config import CloudConfig
from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import Stores
from octavius.data.records import Record, read_records
from octavius.model.octavius import Octavius
from octavius.points.object_store import ObjectStore
from octavius.points.pointbert import PointBert
from octavius.vision.features import FeatureStore
from tests.octavius.points.test_pointbert import TINY
from tests.support import tiny

NAMES = ["chair", "table", "lamp"]


def save_clouds(root: Path) -> Path:
    """Three scenes of one to three blocks, their boxes, an encoder, and records of the three tasks."""
    torch.manual_seed(3)
    PointBert(TINY).save(root / "encoder")
    (root / "clouds").mkdir(parents=True)
    rng, items = np.random.default_rng(0), []
    for scene in range(3):
        low = np.stack([np.array([2.0 * i, 0.3 * i, 0]) for i in range(scene + 1)])
        boxes = np.concatenate((low, low + rng.uniform(0.4, 1, (scene + 1, 3))), 1).astype(np.float32)
        xyz = np.concatenate([rng.uniform(box[:3], box[3:], (50, 3)) for box in boxes]).astype(np.float32)
        rgb = np.repeat(rng.integers(0, 256, (scene + 1, 3)), 50, 0).astype(np.uint8)
        ids = np.arange(scene + 1, dtype=np.int32) + 10
        np.savez(root / f"clouds/{scene}.npz", xyz=xyz, rgb=rgb, boxes=boxes, ids=ids)
        name, about = NAMES[scene], {"scene_id": str(scene), "pcl": f"clouds/{scene}.npz", "object_id": 10 + scene}
        items += [
            {"id": f"k{scene}", "task_type": "classification3d", "benchmark": "mini-classification3d", **about}
            | {"label": name, "labels": NAMES, "conversations": tiny.turns("<pcl>\nWhat is it?", name)},
            {"id": f"d{scene}", "task_type": "description3d", "benchmark": "mini-caption3d", **about}
            | {"sentences": [f"This is a {name}."], "conversations": tiny.turns("Describe it.", f"This is a {name}.")},
            {"id": f"q{scene}", "task_type": "VQA3D", "benchmark": "mini-vqa3d", **about, "sentences": [f"A {name}."]}
            | {"label": name, "labels": NAMES, "conversations": tiny.turns("What is left?", f"A {name}.")},
        ]
    (root / "train.json").write_text(json.dumps(items))
    return root


def make(parts: tiny.Parts, clouds: Path, **changes) -> Octavius:
    """A model of both kinds whose 3D branch has something to say."""
    config = CloudConfig(encoder=str(clouds / "encoder"), queries=3, heads=2, dropout=0.0)
    model = tiny.make(parts, clouds=config, **changes) if changes.get("tower", 1) else blind(parts, config, **changes)
    for value in model.scene.parameters():
        nn.init.normal_(value, std=0.3)
    return model.eval()


def blind(parts: tiny.Parts, config: CloudConfig, **changes) -> Octavius:
    torch.manual_seed(0)
    return Octavius.from_config(tiny.model_config(parts, clouds=config, **changes))


def stores(model: Octavius) -> Stores:
    images = FeatureStore(model.tower[0]) if model.tower[0] else None
    return Stores(images, ObjectStore(model.encoder[0]))


def records(parts: tiny.Parts, clouds: Path) -> list[Record]:
    """Images and clouds in turn."""
    pairs = zip(tiny.records(parts), read_records(clouds / "train.json"), strict=False)
    return [record for pair in pairs for record in pair]


def batch(model: Octavius, chosen: list[Record], answer: bool = True) -> dict[str, torch.Tensor]:
    held = stores(model)
    data = InstructionData(chosen, model.conversation, model.image_tokens, 0, answer, model.cloud_tokens)
    collate = Collator(model.conversation.eos, held.images, not answer, held.scenes)
    made = collate([data[index] for index in range(len(data))])
    if "pixels" in made:
        made["features"] = held.images.tower.features(made.pop("pixels"))
    if not answer:
        made.pop("labels")
    return made
