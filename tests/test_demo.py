"""What the demo writes beside its scores."""

from dataclasses import replace

import torch

from octavius import demo
from octavius.data import read_records
from octavius.evaluate import Answers
from octavius.objects import ObjectStore
from tests import clouds


def test_pictures_stay_in_their_folder_whatever_the_ids(parts, tmp_path):
    root = clouds.save_clouds(tmp_path / "data")
    model = clouds.make(parts, root)
    records = [replace(record, id=f"../../{record.id}/x") for record in read_records(root / "train.json")]
    weights = torch.full((len(records), model.settings.lora.num_experts), 0.25)
    samples = demo._samples(records, Answers(["A chair."] * len(records), weights, 1.0))
    demo._draw(samples, model, ObjectStore(model.encoder[0]), tmp_path / "run/scenes")
    names = sorted(path.name for path in (tmp_path / "run/scenes").iterdir())
    assert names == [f"{number:02d}.png" for number in range(len(samples))]
    assert [sample["image"] for sample, _ in samples] == [str(tmp_path / "run/scenes" / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
