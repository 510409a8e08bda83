"""Runs that survive: kills, damage, full disks, numbers that are not finite, labels that are not there."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from moe_lora import storage

from octavius.config import Config, TrainConfig
from octavius.model.octavius import Octavius
from octavius.training.stopped import TrainingStoppedError
from octavius.training.train import train
from tests.support import runs, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


def run_config(parts, folder, **changes):
    settings = {"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 2, "workers": 0}
    data = changes.pop("data", tiny.data_config(parts))
    return Config(tiny.model_config(parts), data, TrainConfig(output=str(folder), **settings | changes))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """(folder, weights) of four steps, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    model, _ = train(run_config(parts, folder))
    return folder, trained(model)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def end(folder):
    """Remove what marks the run as finished."""
    for name in ("train.json", "manifest.json"):
        (folder / name).unlink()


FILES = (
    "README.md", "adapter_model.safetensors", "adapter_config.json", "octavius.safetensors", "octavius.json",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json",
)  # fmt: skip


def damage(path, how):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if how == "cut" else data)


def test_checkpoint_holds_these_files(whole):
    names = {path.name for path in (whole[0] / "checkpoint-4").iterdir()}
    assert names - {"training_args.bin"} == set(FILES)
    notes = storage.read_manifest(whole[0] / "checkpoint-4").notes
    assert notes["world_size"] == 1 and notes["samples"] == 7 and notes["config"]["train"]["steps"] == 4


@pytest.mark.parametrize("how", ["delete", "cut", "flip"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_passed_over_by_name(folder, name, how):
    damage(folder / "checkpoint-4" / name, how)
    place, (reason,) = storage.newest(folder, "checkpoint")
    assert place == folder / "checkpoint-2" and f"checkpoint-4/{name}" in reason
    damage(folder / "checkpoint-2" / name, how)
    with pytest.raises(storage.DamagedError, match=f"checkpoint-4/{name}.*checkpoint-2/{name}"):
        storage.newest(folder, "checkpoint")


def test_run_resumes_from_the_older_checkpoint_to_the_same_bits(parts, whole, folder, capsys):
    end(folder)
    (folder / "checkpoint-4/optimizer.pt").unlink()
    model, report = train(run_config(parts, folder), resume=True)
    assert "passed over: " in capsys.readouterr().err and report["steps"] == 4
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in trained(model).items())
    assert storage.newest(folder, "checkpoint") == (folder / "checkpoint-4", [])  # written anew


def test_run_without_a_whole_checkpoint_is_refused(parts, folder):
    end(folder)
    for number in (2, 4):
        os.truncate(folder / f"checkpoint-{number}/optimizer.pt", 10)
    with pytest.raises(storage.DamagedError, match="no whole checkpoint"):
        train(run_config(parts, folder), resume=True)


@pytest.mark.parametrize("finished", [True, False])
def test_resume_with_other_settings_is_refused(parts, folder, finished):
    if not finished:
        end(folder)
    with pytest.raises(ValueError, match=r"started with train\.learning_rate = 0\.01 instead of 0\.02"):
        train(run_config(parts, folder, learning_rate=2e-2), resume=True)
    with pytest.raises(ValueError, match="was started with 3 samples a step, got 2"):
        train(run_config(parts, folder, batch_size=2), resume=True)


def test_finished_run_cannot_become_shorter(parts, folder):
    with pytest.raises(ValueError, match="finished with 4 steps, so --resume cannot make it 3"):
        train(run_config(parts, folder, steps=3), resume=True)


def test_rate_that_blows_up_stops_and_keeps_the_last_good_checkpoint(parts, tmp_path):
    config = run_config(parts, tmp_path / "run", steps=6, save_steps=1, learning_rate=1e30, schedule="constant")
    with pytest.raises(TrainingStoppedError, match=r"not finite|norm is (nan|inf)"):
        train(config)
    last, passed = storage.newest(tmp_path / "run", "checkpoint")
    if last:
        assert not passed
        Octavius.from_folder(last)
        assert all(tensor.isfinite().all() for tensor in trained(Octavius.from_folder(last)).values())
    assert not (tmp_path / "run/train.json").exists()


def test_labels_that_are_all_cut_away_stop_the_run(parts, tmp_path):
    with pytest.raises(ValueError, match="none of the 7 samples has a token to learn"):
        train(run_config(parts, tmp_path / "run", data=tiny.data_config(parts, max_tokens=3)))
    assert not (tmp_path / "run/train.json").exists()


def test_window_without_a_label_stops_the_run(parts, tmp_path):
    """All but one of the samples are cut, and the run does not come to that one."""
    items = [item | {"conversations": tiny.turns("What is it? " * 30, "red")} for item in tiny.lamm()]
    items[0]["conversations"] = tiny.turns("", "red")
    items = [item | {"image": str(parts.data.parent / item["image"])} for item in items * 3]
    items = [item for number, item in enumerate(items) if number % 7 or number == 0]
    (tmp_path / "train.json").write_text(json.dumps(items))
    data = tiny.data_config(parts, root=str(tmp_path), max_tokens=20)
    with pytest.raises(TrainingStoppedError, match="no token of the batches since the last log carries a label"):
        train(run_config(parts, tmp_path / "run", data=data, steps=8))


def test_template_that_does_not_match_the_tokenizer_stops(parts, tmp_path):
    """A tokenizer with more ids than the LLM has rows would make text into images."""
    model = tiny.model_config(parts)
    shutil.copytree(parts.llm, tmp_path / "llm")
    file = tmp_path / "llm/tokenizer.json"
    values = json.loads(file.read_text())
    for token, number in list(values["model"]["vocab"].items()):
        values["model"]["vocab"][token] = number + 40 if number > 1 else number
    file.write_text(json.dumps(values))
    config = run_config(parts, tmp_path / "run")
    with pytest.raises(ValueError, match="tokenizer must have ids below the LLM's 330 rows, got"):
        train(replace(config, model=replace(model, llm=str(tmp_path / "llm"))))


def killed(root, kills, seed):
    line = [sys.executable, "-m", "tests.support.killed_runs", str(root), str(kills), str(seed)]
    done = subprocess.run(line, env=runs.environment(), cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_bits_of_the_run_that_was_not(tmp_path, kills):
    result, errors = killed(tmp_path, kills, seed=kills)
    assert result["kills"] >= kills and result["different"] == result["refused"] == 0, (result, errors)


@pytest.mark.slow
def test_full_disk_ends_training_with_one_line_and_keeps_the_checkpoint(parts, tmp_path):
    """The disk is filled behind the first checkpoint, with ever less space left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        train(run_config(parts, disk / "run", steps=2))
        for left in (2**19, 2**17, 2**15, 0):
            config = run_config(parts, disk / "run", steps=40)
            path = runs.write(config, tmp_path / "settings")
            path.write_text(path.read_text().replace(str(tmp_path / "settings/out"), str(disk / "run")))
            space = os.statvfs(disk)
            (disk / "fill").write_bytes(bytes(max(0, space.f_bavail * space.f_bsize - left)))
            done = runs.run(path, "--resume")
            assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
            line = done.stderr.strip().splitlines()[-1]
            assert "error:" in line and ("disk is full" in line or "No space left" in line), done.stderr[-2000:]
            (disk / "fill").unlink()
            assert storage.newest(disk / "run", "checkpoint")[0] is not None
    finally:
        subprocess.run(["umount", str(disk)], check=True)
