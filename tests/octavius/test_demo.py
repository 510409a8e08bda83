"""The whole job on tiny parts, beside a single LoRA; what the demo writes beside its scores."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from octavius import demo
from octavius.config import Config, TrainConfig
from octavius.data.records import read_records
from octavius.evaluation.evaluate import Answers
from octavius.points.object_store import ObjectStore
from tests.support import clouds, tiny


def test_images_stay_in_their_folder_whatever_the_ids(parts, tmp_path):
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


def test_demo_trains_scores_and_reports_beside_a_single_lora(parts, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(parts.data.parent, data)
    shutil.copy(data / "train.json", data / "test.json")
    (data / "zeroshot.json").write_text("[]")
    settings = TrainConfig(output=str(tmp_path / "run"), steps=3, batch_size=3, save_steps=3, log_steps=1)
    config = Config(tiny.model_config(parts), replace(tiny.data_config(parts), root=str(data)), settings)
    metrics = demo.demo(config, baseline=True)
    assert metrics == json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(metrics["scores"]) == {"moe", "lora", "blind"} and metrics["run"]["experts"] == tiny.LORA.num_experts
    assert set(metrics["scores"]["lora"]) == set(metrics["scores"]["moe"]) >= {"mini-detection", "mini-vqa"}
    single = json.loads((tmp_path / "run/lora/metrics.json").read_text())
    assert single["run"]["experts"] == 1 and single["run"]["rank"] == tiny.LORA.rank * tiny.LORA.top_k
    assert single["scores"]["moe"] == metrics["scores"]["lora"]
    assert {"report.html", "answers.html", "loss.png", "scores.png", "answers.jsonl"} <= {
        f.name for f in (tmp_path / "run").iterdir()
    }
    assert "LoRA" in (tmp_path / "run/report.html").read_text()
    assert "Against the single LoRA" in (tmp_path / "run/answers.html").read_text()


def test_failed_single_lora_is_reported(parts, tmp_path):
    settings = TrainConfig(output=str(tmp_path / "run"), steps=1)
    config = Config(tiny.model_config(parts), replace(tiny.data_config(parts), root=str(tmp_path)), settings)
    with (
        pytest.raises(ValueError, match=r"single LoRA failed: see .*log\.txt"),
        demo._single_lora(config, tmp_path / "run/lora", False),
    ):
        pass
    assert "train.json" in (tmp_path / "run/lora/log.txt").read_text()
