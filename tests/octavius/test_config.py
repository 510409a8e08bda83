"""Configuration: presets, files, overrides, and errors that say what to write instead."""

import json

import pytest
import yaml
from moe_lora import MoELoRAConfig

from octavius.config import PRESETS, Config, GateConfig, ModelConfig, from_dict, load_config


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_preset_loads_and_round_trips(name):
    config = load_config(name)
    assert isinstance(config, Config) and config.train.output.startswith("runs/")
    assert from_dict(Config, json.loads(json.dumps(config.to_dict())), "again") == config
    assert yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["model"]["lora"]["rank"] == config.model.lora.rank


def test_presets_are_those_of_the_issue():
    assert {"demo", "mini-2d+3d", "octavius-2d"} <= {path.stem for path in PRESETS.glob("*.yaml")}


def test_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()


def test_file_reaches_every_section(tmp_path):
    text = (
        "model: {tower_layer: -1, attn_implementation: sdpa, gate: {mode: dense, load_balancing: 1},\n"
        "        lora: {rank: 7, target_modules: all-linear}}\n"
        "data: {images: images, max_tokens: 31}\n"
        "train: {learning_rate: 5e-4, weight_decay: 1e-3, epochs: 3, steps: 11}\n"
    )
    config = load_config(str(write(tmp_path, text)))
    assert config.model.gate == GateConfig(mode="dense", load_balancing=1.0)
    assert config.model.lora == MoELoRAConfig(rank=7, target_modules="all-linear")
    assert (config.model.tower_layer, config.model.attn_implementation) == (-1, "sdpa")
    assert (config.data.images, config.data.max_tokens) == ("images", 31)
    assert config.train.learning_rate == 5e-4 and config.train.weight_decay == 1e-3  # strings to YAML
    assert isinstance(config.train.epochs, float) and config.train.steps == 11


def test_override_wins_over_the_file(tmp_path):
    path = write(tmp_path, "train: {steps: 11, seed: 3}")
    settings = ["train.steps=5", "model.gate.mode=token", "data.images=null", "train.learning_rate=1e-4"]
    config = load_config(path, [*settings, "model.lora.target_modules=[q_proj, up_proj]"])
    assert (config.train.steps, config.train.seed, config.model.gate.mode) == (5, 3, "token")
    assert config.data.images is None and config.train.learning_rate == 1e-4
    assert config.model.lora.target_modules == ("q_proj", "up_proj")


BAD = (
    ("train: {learningrate: 1}", "train: unknown key 'learningrate'; did you mean 'learning_rate'"),
    ("modell: {}", "unknown key 'modell'; did you mean 'model'"),
    ("model: {gate: {inputs: question}}", "model: gate: unknown key 'inputs'; did you mean 'input'"),
    ("model: {lora: {ranks: 4}}", "model: lora: unknown key 'ranks'; did you mean 'rank'"),
    ("3: {}", "unknown key 3; did you mean"),
    ("train: {steps: many}", "train: steps: must be int, got 'many'"),
    ("train: {steps: true}", "train: steps: must be int, got True"),
    ("train: {steps: 1.5}", "train: steps: must be int, got 1.5"),
    ("train: {learning_rate: fast}", "train: learning_rate: must be float, got 'fast'"),
    ("train: {learning_rate: true}", "train: learning_rate: must be float, got True"),
    ("train: {output: 3}", "train: output: must be str, got 3"),
    ("model: {system: 1}", "model: system: must be bool, got 1"),
    ("model: {dtype: int8}", "model: dtype: must be one of bfloat16, float16, float32, got 'int8'"),
    ("model: {gate: {mode: [dense]}}", r"model: gate: mode: must be one of instance, dense, token, got \['dense'\]"),
    ("model: {attn_implementation: 3}", "model: attn_implementation: must be .*, got 3"),
    ("model: {lora: {top_k: 5}}", "model: lora: top_k must be at most num_experts = 4, got 5"),
    ("model: {lora: {target_modules: 3}}", "target_modules: must be"),
    ("model: 3", "model: must be a mapping of ModelConfig's keys, got int"),
    ("model:", "model: must be a mapping of ModelConfig's keys, got NoneType"),
    ("[1, 2]", "must be a mapping of Config's keys, got list"),
    ("train: {steps: [", "not valid YAML"),
)


@pytest.mark.parametrize("text, message", BAD, ids=[text for text, _ in BAD])
def test_mistake_in_a_file_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


BAD_SETTINGS = (
    ("train.steps", "a setting must read section.key=value, got 'train.steps'"),
    ("train.step=3", "unknown key 'step'; did you mean 'steps'"),
    ("train.steps=x", "steps: must be int, got 'x'"),
    ("data.root.deeper=x", "cannot set 'data.root.deeper=x': data.root holds no keys"),
    ("data.root.deeper.still=x", "data.root.deeper holds no keys"),
    ("train.output=[", r"cannot set 'train.output=\['"),
    ("=3", "unknown key ''"),
)


@pytest.mark.parametrize("setting, message", BAD_SETTINGS, ids=[setting for setting, _ in BAD_SETTINGS])
def test_mistake_in_a_setting_is_named(tmp_path, setting, message):
    path = write(tmp_path, "data: {root: here}")
    with pytest.raises(ValueError, match=message):
        load_config(path, [setting])


def test_setting_over_a_file_that_is_no_mapping(tmp_path):
    with pytest.raises(ValueError, match=r"cannot set 'train.steps=3': train holds no keys"):
        load_config(write(tmp_path, "[1, 2]"), ["train.steps=3"])


def test_unknown_name_lists_the_presets(tmp_path):
    with pytest.raises(ValueError, match=r"presets .*demo.*mini.*octavius-2d, .*, got 'dmo'"):
        load_config("dmo")
    with pytest.raises(ValueError, match="must be a YAML file or one of the presets"):
        load_config(tmp_path)


def test_saved_model_config_reads_back():
    config = ModelConfig(
        gate=GateConfig(mode="token"), lora=MoELoRAConfig(rank=5, target_modules=("up_proj", "o_proj"))
    )
    values = json.loads(json.dumps(Config(model=config).to_dict()["model"]))
    assert from_dict(ModelConfig, values, "octavius.json") == config
