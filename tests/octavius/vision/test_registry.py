"""Towers by name: what a stranger adds is used, trains without a grid, or is refused in one sentence."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from octavius.config import Config, TrainConfig
from octavius.training.train import train
from octavius.vision.towers import TOWERS, ImageTower, load_tower, register_tower
from tests.support import tiny


class TenTokens(ImageTower):
    """Ten learnt directions of the whole image, which form no grid."""

    tokens, width, size = 10, 6, 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Linear(3 * 16 * 16, 10 * 6)

    def forward(self, pixels):
        return self.net(pixels.flatten(1)).unflatten(1, (10, 6))


class Strip(TenTokens):
    """Two rows of five."""

    grid = (2, 5)


PACKAGE = """
import torch
from octavius.vision.towers import ImageTower

class Mean(ImageTower):
    tokens, width, size = 1, 3, 8
    def forward(self, pixels):
        return pixels.mean((2, 3))[:, None]

def build(layer, merge):
    return Mean()
"""


@pytest.fixture(autouse=True)
def _own_names(monkeypatch):
    monkeypatch.setattr(TOWERS, "parts", dict(TOWERS.parts))


@pytest.mark.parametrize("kind", [TenTokens, Strip])
@pytest.mark.parametrize("closed_form", [False, True], ids=["random", "projector_init"])
def test_registered_tower_of_ten_tokens_trains(parts, tmp_path, kind, closed_form):
    register_tower("ten", lambda layer, merge: kind())
    model = tiny.model_config(parts, tower="ten")
    settings = TrainConfig(output=str(tmp_path), steps=3, batch_size=3, projector_init=closed_form, learning_rate=1e-9)
    trained, report = train(Config(model, tiny.data_config(parts), settings))
    assert trained.image_tokens == 10 and report["steps"] == 3
    assert all(torch.isfinite(value).all() for value in trained.projector.parameters())
    if closed_form:  # without a grid no token differs from another by its place
        assert bool(trained.projector.positions.std(0).max() > 1e-4) == (kind is Strip)


def test_tower_of_an_installed_package_is_used(tmp_path, monkeypatch):
    (tmp_path / "mean_tower.py").write_text(PACKAGE)
    facts = tmp_path / "mean_tower-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-tower\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[octavius.towers]\nmean-colour = mean_tower:build\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tower = load_tower("mean-colour")
    assert tower(torch.ones(2, 3, 8, 8)).shape == (2, 1, 3) and not tower.training
    sys.modules.pop("mean_tower")


WRONG = {
    "no tower": (lambda: nn.Linear(2, 2), "must be an octavius.vision.towers.ImageTower, got Linear"),
    "grid": (lambda: _changed(grid=(3, 3)), r"rows by columns making 10 tokens, or None .*got \(3, 3\)"),
    "width": (lambda: _changed(width=7), r"must give \[N, 10, 7\], got \[1, 10, 6\] for one image"),
}


def _changed(**values):
    tower = TenTokens()
    for name, value in values.items():
        setattr(tower, name, value)
    return tower


@pytest.mark.parametrize(("build", "message"), WRONG.values(), ids=WRONG)
def test_tower_that_is_not_what_it_says_is_refused_in_one_sentence(build, message):
    register_tower("wrong", lambda layer, merge: build())
    with pytest.raises(ValueError, match=message) as caught:
        load_tower("wrong")
    assert "\n" not in str(caught.value)


def test_tower_must_be_a_function():
    with pytest.raises(TypeError, match=r"the tower 'text' must be a function \(layer, merge\)"):
        register_tower("text", "vit")  # type: ignore[arg-type]


def test_settings_reach_the_builder(parts):
    register_tower("recorded", lambda layer, merge: _changed(size=16 if (layer, merge) == (-3, 2) else 8))
    config = tiny.model_config(parts, tower="recorded")
    config = replace(config, tower_layer=-3, tower_merge=2)
    assert load_tower("recorded", config.tower_layer, config.tower_merge).size == 16
