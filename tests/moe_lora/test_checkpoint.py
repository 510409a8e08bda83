"""`save` and `load`: round trips, and damage that must be seen before anything changes."""

import errno
import json
import os
import shutil
from pathlib import Path

import moe_lora
import pytest
import torch
import torch.distributed as distributed
from moe_lora import MoELoRAConfig, MoELoRALinear, storage
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

CONFIG = MoELoRAConfig(num_experts=3, top_k=2, rank=2, alpha=4, dropout=0.1, target_modules=("up", "down"))


def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}), nn.Linear(6, 6))


def model(seed=1):
    made = moe_lora.apply(bare(), CONFIG)
    torch.manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return made


def adapters(made):
    return {name: tensor.clone() for name, tensor in made.state_dict().items() if "lora_" in name}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def folder(tmp_path):
    moe_lora.save(model(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_save_writes_pefts_folder(folder):
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_LORA" and config["target_modules"] == ["up", "down"]
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"0.{n}.lora_{x}" for n in ("up", "down") for x in "ab"
    }


def test_load_into_a_model_with_experts(folder):
    other = model(seed=2)
    assert moe_lora.load(other, folder) is other
    assert_equal(adapters(other), adapters(model()))


def test_load_into_a_bare_model_applies(folder):
    other = moe_lora.load(bare(), folder)
    assert_equal(adapters(other), adapters(model()))
    layers = [module for module in other.modules() if isinstance(module, MoELoRALinear)]
    assert [layer.config for layer in layers] == [CONFIG] * 2 and len({layer.slot for layer in layers}) == 1


def test_save_of_a_compiled_or_wrapped_model_has_the_bare_names(folder, tmp_path):
    moe_lora.save(nn.DataParallel(torch.compile(model())), tmp_path / "wrapped")
    assert_equal(
        load_file(tmp_path / "wrapped/adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )
    assert_equal(adapters(moe_lora.load(bare(), tmp_path / "wrapped")), adapters(model()))


def test_save_and_load_of_models_that_are_wrapped(folder, tmp_path):
    want = adapters(model())
    compiled = torch.compile(bare())
    assert_equal(adapters(moe_lora.load(compiled, folder)._orig_mod), want)
    checkpointed = model()
    checkpointed[0]["up"] = checkpoint_wrapper(checkpointed[0]["up"])
    moe_lora.save(checkpointed, tmp_path)
    assert_equal(load_file(tmp_path / "adapter_model.safetensors"), want)


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_parameters_sharded_by_fsdp2_are_saved_whole_and_loaded_back(folder, tmp_path, one_rank):
    sharded = fully_shard(model(seed=2), mesh=one_rank)
    moe_lora.save(sharded, tmp_path)
    assert_equal(load_file(tmp_path / "adapter_model.safetensors"), adapters(model(seed=2)))
    moe_lora.load(sharded, folder)
    assert_equal({name: tensor.full_tensor() for name, tensor in adapters(sharded).items()}, adapters(model()))


def test_a_child_called_module_keeps_its_name(tmp_path):
    moe_lora.save(nn.ModuleDict({"module": model()}), tmp_path)
    other = moe_lora.load(nn.ModuleDict({"module": bare()}), tmp_path)
    assert_equal(adapters(other["module"]), adapters(model()))


def test_a_shared_linear_is_saved_and_loaded_once(tmp_path):
    def shared():
        made = bare()
        made[0]["down"] = made[0]["up"]
        return made

    one = moe_lora.apply(shared(), CONFIG)
    moe_lora.save(one, tmp_path)
    other = moe_lora.load(shared(), tmp_path)
    assert other[0]["down"] is other[0]["up"]
    assert_equal(adapters(other), adapters(one))


def test_save_of_parts_with_different_configs_is_refused(tmp_path):
    made = nn.ModuleList(
        moe_lora.apply(nn.Sequential(nn.Linear(4, 4)), MoELoRAConfig(rank=rank, target_modules=("0",)))
        for rank in (2, 3)
    )
    with pytest.raises(ValueError, match=r"experts of one config to save, got .*save each part by itself"):
        moe_lora.save(made, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("target", [model, bare], ids=["with-experts", "bare"])
def test_load_into_a_model_without_data_is_refused(folder, target):
    with pytest.raises(ValueError, match=r"0\.(up|down) must have data, got the meta device"):
        moe_lora.load(target().to("meta"), folder)


def test_load_casts_to_the_models_dtype(folder):
    other = model(seed=2).double()
    moe_lora.load(other, folder)
    assert other[0]["up"].lora_a.dtype == torch.float64
    assert torch.equal(other[0]["up"].lora_a, model()[0]["up"].lora_a.double())


def test_save_replaces_an_older_one(folder):
    moe_lora.save(model(seed=5), folder)
    assert_equal(adapters(moe_lora.load(bare(), folder)), adapters(model(seed=5)))


def test_save_that_fails_leaves_the_old_files(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(storage.DiskFullError, match="the disk is full"):
        moe_lora.save(model(seed=5), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_cut_between_its_files_is_the_new_one(folder, monkeypatch):
    replace, calls = os.replace, []

    def cut(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        moe_lora.save(model(seed=5), folder)
    assert_equal(adapters(moe_lora.load(bare(), folder)), adapters(model(seed=5)))


def test_save_without_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must have experts to save, got none"):
        moe_lora.save(bare(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def flip(path):
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def edit_config(**change):
    def damage(folder):
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text()) | change
        text = json.dumps({key: value for key, value in values.items() if value is not None or key not in change})
        path.write_text(text)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"config": text})

    return damage


def edit_weights(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"config": (folder / "adapter_config.json").read_text()})

    return damage


def cut_weights(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def unmarked_weights(folder):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path)


DAMAGE = (
    (cut_weights, ValueError, "must be a whole safetensors file, got"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), ValueError, "must be a whole safetensors file"),
    (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 99),
        ValueError,
        "must be a whole safetensors file",
    ),
    (lambda f: (f / "adapter_model.safetensors").unlink(), ValueError, "adapter_model.safetensors must be in manifest"),
    (lambda f: (f / "adapter_config.json").unlink(), ValueError, "adapter_config.json must be in manifest"),
    (lambda f: (f / "adapter_config.json").write_text('{"rank": 2'), ValueError, "must be JSON, got"),
    (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe"), ValueError, "must be JSON, got"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), ValueError, "must have peft_type MOE_LORA"),
    (unmarked_weights, ValueError, "same save as adapter_config.json"),
    (edit_config(peft_type="LORA"), ValueError, "must have peft_type MOE_LORA"),
    (edit_config(colour="red"), ValueError, r"must have the keys \[.*\], got \[.*'colour'"),
    (edit_config(rank=None), ValueError, "must have the keys"),
    (edit_config(rank=-1), ValueError, "not hold a valid config: rank must be"),
    (edit_config(alpha="much"), ValueError, "not hold a valid config"),
    (edit_config(rank=3), ValueError, r"rank must be 2 like the model's, got 3|must be \(3, 6, 3\), got \(3, 6, 2\)"),
    (edit_weights(lambda t: t.pop("0.up.lora_a")), ValueError, r"got 1 missing \['0.up.lora_a'\] and 0 unexpected"),
    (edit_weights(lambda t: t.update(x=torch.zeros(1))), ValueError, r"got 0 missing \[\] and 1 unexpected \['x'\]"),
    (
        edit_weights(lambda t: t.update({"0.down.lora_b": torch.zeros(3, 2, 8)})),
        ValueError,
        r"0.down.lora_b must be \(3, 2, 6\), got \(3, 2, 8\)",
    ),
    (
        edit_weights(lambda t: t.update({"0.down.lora_b": torch.zeros(3, 2, 6).int()})),
        ValueError,
        "0.down.lora_b must be floating point, got torch.int32",
    ),
)


@pytest.mark.parametrize("target", [model, bare], ids=["with-experts", "bare"])
@pytest.mark.parametrize("damage, kind, message", DAMAGE, ids=[f"{i}-{case[-1]}" for i, case in enumerate(DAMAGE)])
def test_load_of_damage_changes_nothing(folder, damage, kind, message, target):
    """The damage is sealed: a manifest that agrees does not make a wrong file right."""
    damage(folder)
    storage.seal(folder)
    other = target()
    before, trains = (
        {k: v.clone() for k, v in other.state_dict().items()},
        [p.requires_grad for p in other.parameters()],
    )
    with pytest.raises(kind, match=message):
        moe_lora.load(other, folder)
    assert_equal(other.state_dict(), before)
    assert [p.requires_grad for p in other.parameters()] == trains


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": 4}, "num_experts must be 4 like the model's, got 3"),
        ({"top_k": 1}, "top_k must be 1 like the model's, got 2"),
        ({"alpha": 8}, "alpha must be 8 like the model's, got 4"),
        ({"target_modules": ("up",)}, r"got 0 missing \[\] and 2 unexpected \['0.down.lora_a', '0.down.lora_b'\]"),
    ],
    ids=str,
)
def test_load_into_a_different_model_is_refused(folder, change, message):
    arguments = {"num_experts": 3, "top_k": 2, "rank": 2, "alpha": 4, "target_modules": ("up", "down")} | change
    other = moe_lora.apply(bare(), MoELoRAConfig(**arguments))
    before = adapters(other)
    with pytest.raises(ValueError, match=message):
        moe_lora.load(other, folder)
    assert_equal(adapters(other), before)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda p: os.truncate(p, 5), flip], ids=["delete", "cut", "flip"])
def test_load_of_a_file_that_is_not_the_written_one_is_refused(folder, name, damage):
    damage(folder / name)
    other = model(seed=2)
    with pytest.raises(ValueError, match=name):
        moe_lora.load(other, folder)
    assert_equal(adapters(other), adapters(model(seed=2)))


def test_load_of_a_missing_folder(folder):
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        moe_lora.load(bare(), folder)
