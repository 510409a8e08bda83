"""Several processes under torchrun train the model that one process trains."""

import json
import re
import shutil
import subprocess

import pytest
from safetensors.torch import load_file

from octavius.config import load_config
from octavius.training.trainer import training_arguments
from tests.support import runs

pytestmark = pytest.mark.slow


def outcome(folder):
    """Losses of the steps, and what the run trained."""
    losses = [entry["loss"] for entry in json.loads((folder / "train.json").read_text())["loss"]]
    names = ("adapter_model.safetensors", "octavius.safetensors")
    return losses, {key: tensor for name in names for key, tensor in load_file(folder / name).items()}


def assert_near(one, other):
    assert len(one[0]) == len(other[0]) == 20 and one[1].keys() == other[1].keys()
    assert max(abs(a - b) for a, b in zip(one[0], other[0], strict=True)) < 1e-5
    far = {name: (tensor - other[1][name]).abs().max().item() for name, tensor in one[1].items()}
    # a key's bias moves all scores of a softmax alike: its gradient is rounding alone, which Adam scales to whole steps
    far = {name: distance for name, distance in far.items() if not name.endswith("fc_k.bias")}
    assert max(far.values()) < 1e-5, max(far.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def single(parts, tmp_path_factory):
    """(configuration, folder) of 20 steps by one process: AdamW, clipping, six batches a step, of either modality."""
    root = tmp_path_factory.mktemp("single")
    config = runs.both(parts, root / "clouds")
    done = runs.run(runs.write(config, root))
    assert done.returncode == 0, done.stderr
    return config, root


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process_on_the_same_global_batch(single, tmp_path, ranks):
    """With one sample a batch, some ranks see images alone and others clouds alone; most experts are unused."""
    config, root = single
    path = runs.write(config, tmp_path, gradient_accumulation=6 // ranks)
    done = runs.run(path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_near(outcome(root / "out"), outcome(tmp_path / "out"))
    assert done.stdout.count("20 steps") == 1  # one rank speaks
    assert len(list((tmp_path / "out/runs").rglob("events.out.tfevents.*"))) == 1


def test_run_resumes_on_another_number_of_ranks(single, tmp_path):
    config, root = single
    shutil.copytree(root / "out/checkpoint-10", tmp_path / "out/checkpoint-10")
    path = runs.write(config, tmp_path, gradient_accumulation=2)
    wrong = runs.run(path, "--resume", ranks=2)
    assert wrong.returncode != 0 and "was started with 6 samples a step, got 4" in wrong.stderr
    path = runs.write(config, tmp_path, gradient_accumulation=3)
    done = runs.run(path, "--resume", ranks=2)
    assert done.returncode == 0, done.stderr
    losses, weights = outcome(root / "out")
    resumed, again = outcome(tmp_path / "out")
    assert resumed == pytest.approx(losses, abs=1e-5)
    assert max((tensor - again[name]).abs().max().item() for name, tensor in weights.items()) < 1e-5


def test_world_size_that_trainer_does_not_see_is_an_error(single, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"started 2 processes \(WORLD_SIZE\), Trainer sees 1|torchrun"):
        training_arguments(load_config(single[1] / "config.yaml"))


def test_two_runs_in_one_folder_and_sigterm(single, tmp_path):
    """The second is refused; the first, told to stop, saves, ends with 85 and goes on later."""
    config, _ = single
    path = runs.write(config, tmp_path, steps=2000, gradient_accumulation=1)
    environment = runs.environment()
    process = subprocess.Popen(
        runs.command(path), env=environment, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    assert any(re.search(r"'loss'", line) for line in process.stdout)  # it trains
    second = runs.run(path, "--resume")
    assert second.returncode == 1 and "in use by another process" in second.stderr
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 85 and "go on with --resume" in err, err
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    done = runs.run(runs.write(config, tmp_path, steps=step + 2, gradient_accumulation=1), "--resume")
    assert done.returncode == 0 and f"{step + 2} steps" in done.stdout, done.stderr
