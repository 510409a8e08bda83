"""Small training runs of both modalities as commands: one process, or several under torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from octavius.config import CloudConfig, Config, TrainConfig
from tests.support import clouds, tiny

ROOT = Path(__file__).parents[2]


def both(parts: tiny.Parts, root: Path) -> Config:
    """A run on 21 samples of images and 9 of clouds; `root` gets the clouds and the encoder."""
    clouds.save_clouds(root)
    lora = replace(tiny.LORA, num_experts=6, target_modules=("q_proj", "v_proj"))
    scenes = CloudConfig(encoder=str(root / "encoder"), queries=3, heads=2, dropout=0.0)
    model = tiny.model_config(parts, clouds=scenes, lora=lora)
    data = tiny.data_config(parts, root_3d=str(root), loop=3, loop_detection=3)
    settings = {"batch_size": 1, "gradient_accumulation": 6, "learning_rate": 1e-3, "log_steps": 1, "workers": 0}
    return Config(model, data, TrainConfig(steps=20, save_steps=10, max_grad_norm=0.5, **settings))


def write(config: Config, folder: Path, **changes) -> Path:
    """The YAML file of a run whose output is `folder`, with other settings of training."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, train=replace(config.train, output=str(folder / "out"), **changes))
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    return folder / "config.yaml"


def command(config: Path, *more: str, ranks: int = 0) -> list[str]:
    """`octavius train` as a command; with `ranks`, under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, "-m", "octavius", "train", "--config", str(config), *more]


def environment() -> dict[str, str]:
    """Of a child that finds this tree's packages."""
    path = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(config: Path, *more: str, ranks: int = 0, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    return subprocess.run(
        command(config, *more, ranks=ranks),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
