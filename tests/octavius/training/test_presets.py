"""The paper's presets, unchanged but for paths and steps, on a tree in upstream's layout."""

import pytest
import torch

from octavius.config import load_config
from octavius.model.octavius import Octavius
from octavius.training.train import train
from octavius.training.trainer import training_arguments
from tests.support import upstream

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
PRESETS = {"octavius-2d": 4, "octavius-3d": 3, "octavius-2d+3d": 6}  # and their experts


@pytest.fixture(scope="module", params=["bin", "safetensors"])
def tree(request, tmp_path_factory):
    return upstream.save_tree(tmp_path_factory.mktemp(request.param), request.param)


def preset(name, tree, output):
    """The preset with its paths below the tree, and two steps."""
    plain = load_config(name)
    paths = [("model.llm", plain.model.llm), ("model.tower", plain.model.tower)]
    paths += [(f"data.{key}", getattr(plain.data, key)) for key in ("root", "images", "root_3d")]
    settings = [f"{key}={tree / value}" for key, value in paths if value]
    return load_config(name, [*settings, f"train.output={output}", "train.steps=2", "train.log_steps=1"])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_and_answers(tree, tmp_path, name, capsys):
    config = preset(name, tree, tmp_path / "run")
    assert config.model.lora.num_experts == PRESETS[name]
    model, report = train(config)
    assert report["steps"] == 2 and len(report["loss"]) == 2 and all(0 < entry["loss"] < 20 for entry in report["loss"])
    assert "attention: grouped" in capsys.readouterr().err
    again = Octavius.from_folder(tmp_path / "run")
    for key, tensor in model.state_dict().items():
        if not key.startswith("llm."):
            assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_upstreams_optimizer(name, tmp_path):
    """DeepSpeed's block in upstream's YAML: betas 0.9 and 0.95, decay 1e-3, clipping at 1, 10 % warm-up, linear."""
    args = training_arguments(load_config(name, [f"train.output={tmp_path}"]))
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (5e-4, 1e-3, 1.0)
    assert (args.warmup_steps, args.lr_scheduler_type) == (0.1, "linear")
    gpus = 8 if name == "octavius-2d+3d" else 4
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 64


def test_workers_decode_the_same_batches(tree, tmp_path):
    """Images in two loader processes give the losses of none."""
    losses = []
    for workers in (0, 2):
        config = preset("octavius-2d", tree, tmp_path / str(workers))
        object.__setattr__(config.train, "workers", workers)
        losses.append(train(config)[1]["loss"])
    assert losses[0] == losses[1]
