"""Contrastive training: the loss as it is defined, its augmentation, and that a small encoder learns real models."""

import numpy as np
import pytest
import torch

from octavius.assets import registry
from octavius.data.scan2inst.furniture import Furniture
from octavius.points import pointbert
from octavius.points.cloud import PointCloud
from octavius.points.pointbert import PRESETS, PointBert, PointBertConfig, load_pointbert
from octavius.training import point_encoder
from octavius.training.point_encoder import PretrainConfig, augment, contrast, embed_texts, occupancy, pretrain

FAST = PointBertConfig(
    width=48, depth=1, heads=2, groups=16, group_size=12, patch_width=32, channels=6, points=128, drop_path=0.0
)


def test_loss_is_cross_entropy_over_the_positives():
    a, b = (torch.nn.functional.normalize(torch.randn(5, 7), dim=-1) for _ in range(2))
    same = torch.eye(5).bool()
    same[1, 3] = same[3, 1] = True
    want, logits = 0.0, 4.0 * (a.double() @ b.double().T)
    for way in (logits, logits.T):
        log = way - way.exp().sum(1, keepdim=True).log()
        want -= sum(log[i][same[i]].mean() for i in range(5)) / 10
    torch.testing.assert_close(contrast(a, b, torch.tensor(4.0), same).double(), want, atol=1e-5, rtol=1e-5)


def test_augmented_objects_stay_objects():
    rng = np.random.default_rng(0)
    cloud = PointCloud(rng.normal(size=(4096, 3)).astype(np.float32), rng.random((4096, 3)).astype(np.float32))
    for _ in range(30):
        made = augment(cloud, rng)
        assert 75 < len(made) <= 1000 + 3 * 300 and np.isfinite(made.xyz).all()
        assert made.rgb.min() >= 0 and made.rgb.max() <= 1 and made.xyz.dtype == np.float32
        ratio = np.prod(np.ptp(made.xyz, 0) / np.ptp(cloud.xyz, 0)) ** (1 / 3)
        assert 0.75 * 0.49 * 0.6 < ratio < 1.25 * 2.02 * 1.5  # a half hidden, or turned by 45 degrees


def test_classes_are_drawn_equally_often():
    labels = ["a"] * 6 + ["b"] * 2 + [""] * 4
    odds = point_encoder._odds(labels, 0.6)
    assert odds.sum() == pytest.approx(1)
    for label, count in (("a", 6), ("b", 2), ("", 4)):
        of_class = sum(odds[row] for row, name in enumerate(labels) if name == label)
        assert of_class == pytest.approx(0.4 * count / 12 + (0.3 if label else 0))


def test_sentences_say_class_colour_and_size():
    model = Furniture("x", "oak chair", "Office", "A", (0.5, 0.5, 0.9), 0.0, "", "", (), "chair")
    cloud = PointCloud(np.zeros((9, 3), np.float32), np.full((9, 3), 0.9, np.float32))
    said = point_encoder.descriptions(model, cloud)
    assert said[:3] == ("an oak chair", "a chair", "This is a white chair. It is 0.9 m high.")
    assert "0.5 m wide" in said[3] and len(point_encoder.descriptions(model, PointCloud(cloud.xyz))) == 4


def test_occupancy_is_a_distribution():
    grid = occupancy(PointCloud(np.random.default_rng(0).random((500, 3)).astype(np.float32)))
    assert grid.shape == (512,) and grid.square().sum() == pytest.approx(1)


@pytest.mark.assets
def test_sentences_of_one_meaning_are_near():
    chair, seat, car = embed_texts(["a chair", "a seat to sit on", "a fast car"])
    assert chair @ seat > chair @ car and chair.norm() == pytest.approx(1)


@pytest.mark.assets
@pytest.mark.slow
def test_a_minute_of_training_beats_chance(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", FAST)
    cache = registry.default_cache() / "points"
    report = pretrain(tmp_path, PretrainConfig(steps=300, batch_size=32, learning_rate=2e-3), cache)
    assert report["loss"][-1] < report["loss"][0] - 1
    for split in ("test", "zeroshot"):
        scores = report[split]
        assert scores["zero_shot_acc"] > 2.5 * scores["zero_shot_chance"]
        assert scores["image_recall@5"] > 2.5 * scores["image_chance@5"]
        assert scores["labelled"] > 50
    assert load_pointbert(tmp_path).config == FAST


def test_an_encoder_of_another_recipe_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "default_cache", lambda: tmp_path)
    first = pointbert.default_folder("small")
    monkeypatch.setattr(pointbert, "RECIPE", pointbert.RECIPE + 1)
    assert pointbert.default_folder("small") != first


def test_pretraining_leaves_the_callers_random_numbers(tmp_path, monkeypatch):
    def seeded(folder, config):
        torch.manual_seed(config.seed)
        PointBert(FAST).save(folder)

    monkeypatch.setattr(registry, "default_cache", lambda: tmp_path)
    monkeypatch.setattr(point_encoder, "pretrain", seeded)
    drawn = []
    for _ in range(2):  # pre-trained, then at hand
        torch.manual_seed(5)
        point_encoder.ensure_encoder("small")
        assert pointbert.load_encoder("small").config == FAST
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="cannot be read as a Point-BERT checkpoint"):
        pointbert.load_encoder("nowhere")


def test_missing_encoder_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "default_cache", lambda: tmp_path)
    with pytest.raises(ValueError, match="octavius pretrain-points --preset small"):
        pointbert.load_encoder("small")
