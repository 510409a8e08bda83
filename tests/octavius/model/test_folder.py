"""Saved models: the same answers after loading; a damaged or foreign folder changes nothing."""

import json
import shutil

import pytest
import torch
from moe_lora import MoELoRAConfig, storage
from safetensors.torch import load_file, save_file

from octavius.model.octavius import CONFIG, WEIGHTS, Octavius
from tests.support import tiny


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make(parts, gate=tiny.gate(load_balancing=0.1))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [parameter.requires_grad for parameter in model.parameters()]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and one[1] == other[1]
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


def test_folder_holds_what_trains_only(saved, parts):
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", CONFIG, WEIGHTS]
    )
    projector = {"net.0.weight", "net.0.bias", "positions", "mean", "std", "limit"}
    gate = {f"gate.{name}" for name in ("w_gating", "center", "scale", "bias")}
    own = {"markers", "share"} | gate | {f"projector.{name}" for name in projector}
    assert load_file(saved / WEIGHTS).keys() == own
    assert json.loads((saved / CONFIG).read_text())["llm"] == str(parts.llm)


def test_loaded_model_is_the_saved_one(model, saved, parts):
    other = Octavius.from_folder(saved).eval()
    assert other.settings == model.settings
    assert_same(snapshot(other), snapshot(model))
    records = tiny.records(parts)
    learnt, asked = tiny.batch(model, records), tiny.batch(model, records, answer=False)
    one, two = model(**learnt), other(**learnt)
    assert torch.equal(one["loss"], two["loss"]) and torch.equal(one["gates"], two["gates"])
    replies, again = (each.generate(**asked, max_new_tokens=7) for each in (model, other))
    assert replies[0] == again[0] and torch.equal(replies[1], again[1])


def test_load_over_another_model(parts, saved, model):
    other = tiny.make(parts, seed=9, gate=tiny.gate(load_balancing=0.3))
    assert not torch.equal(other.markers, model.markers)
    trains = [parameter.requires_grad for parameter in other.parameters()]
    other.load(saved)
    assert_same(snapshot(other), (model.state_dict(), trains))


def test_save_over_an_older_one(parts, folder):
    other = tiny.make(parts, seed=9)
    other.save(folder)
    assert_same(snapshot(Octavius.from_folder(folder)), snapshot(other))
    assert len(list(folder.iterdir())) == 6


def cut(name):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])

    return damage


def edit(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def setting(**changes):
    def damage(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | changes))

    return damage


DAMAGE = {
    "weights-cut": (cut(WEIGHTS), rf"{WEIGHTS}: cannot be read as safetensors"),
    "weights-empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "cannot be read as safetensors"),
    "weights-gone": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS} must be in manifest\.json"),
    "weights-less": (
        edit(lambda t: t.pop("gate.w_gating")),
        r"gate.w_gating must be \(64, 4\) for this model, got None",
    ),
    "weights-more": (edit(lambda t: t.update(new=torch.ones(1))), r"new must be None for this model, got \(1,\)"),
    "weights-shape": (
        edit(lambda t: t.update(markers=torch.ones(2, 63))),
        r"markers must be \(2, 64\) for this model, got \(2, 63\)",
    ),
    "weights-kind": (
        edit(lambda t: t.update(markers=torch.ones(2, 64).int())),
        r"markers must be floating point, got torch.int32",
    ),
    "config-cut": (cut(CONFIG), rf"must be a folder that training wrote, but {CONFIG} cannot be read"),
    "config-gone": (lambda f: (f / CONFIG).unlink(), "must be a folder that training wrote"),
    "config-key": (setting(colour="red"), "unknown key 'colour'; did you mean"),
    "config-gate": (setting(gate={"mode": "dense"}), r"gate must be .*instance.* for this model, got .*dense"),
    "config-layer": (setting(tower_layer=-1), "tower_layer must be -2 for this model, got -1"),
    "config-system": (setting(system=True), "system must be False for this model, got True"),
    "experts-cut": (cut("adapter_model.safetensors"), "must be a whole safetensors file"),
    "experts-gone": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors must be in manifest\.json",
    ),
    "experts-config-cut": (cut("adapter_config.json"), "must be JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_changes_nothing(parts, folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    storage.seal(folder)  # a manifest that agrees does not make a wrong file right
    model = tiny.make(parts, seed=5)
    before = snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.load(folder)
    assert_same(snapshot(model), before)


FILES = (WEIGHTS, CONFIG, "adapter_model.safetensors", "adapter_config.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["delete", "cut", "flip"])
def test_folder_with_a_damaged_file_is_refused_by_name(parts, folder, name, how):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    if how == "delete":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[: len(data) // 2] if how == "cut" else data)
    model = tiny.make(parts, seed=5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=name):
        model.load(folder)
    assert_same(snapshot(model), before)


FOREIGN = {
    "more-experts": {"lora": MoELoRAConfig(num_experts=5, top_k=2, rank=3, alpha=6, dropout=0.0)},
    "other-rank": {"lora": MoELoRAConfig(num_experts=4, top_k=2, rank=2, alpha=6, dropout=0.0)},
    "other-alpha": {"lora": MoELoRAConfig(num_experts=4, top_k=2, rank=3, alpha=3, dropout=0.0)},
    "other-top-k": {"lora": MoELoRAConfig(num_experts=4, top_k=1, rank=3, alpha=6, dropout=0.0)},
    "other-projector": {"projector": "mlp"},
    "other-merge": {"tower_merge": 2},
    "other-gate": {"gate": tiny.gate(include_padding=True)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_folder_of_another_model_changes_nothing(parts, saved, name):
    model = tiny.make(parts, seed=5, **FOREIGN[name])
    before = snapshot(model)
    with pytest.raises(ValueError, match="must be"):
        model.load(saved)
    assert_same(snapshot(model), before)


def test_folder_that_is_none(tmp_path, parts):
    with pytest.raises(ValueError, match="must be a folder that training wrote"):
        Octavius.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be a folder that training wrote"):
        Octavius.from_folder(parts.llm)
