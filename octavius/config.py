"""One run as frozen dataclasses, read from a YAML file or a named preset of `octavius/configs/`."""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_lora import MoELoRAConfig

from octavius.inputs.documents import parse_yaml, read_yaml
from octavius.inputs.ranges import Range, check_range

PRESETS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class GateConfig:
    """Who chooses the experts, and from what.

    kind: how the gate starts. `paper` is drawn at random and reads the mean embedding as it is; the others centre and
        scale it by the training questions' statistics: `random` is drawn at random, `clusters` starts from k-means
        clusters of those questions, `tasks` from the task types that the records name.
    mode: `instance` routes a question once; `dense` weighs all experts; `token` routes every token for itself.
    input: the text that the gate reads.
    include_padding: the mean runs over padding too, as upstream's does; for its checkpoints only.
    load_balancing: weight of the load-balancing loss, 0 for none.
    balance_bias: step of the bias in the choice that balances the experts, 0 for none.
    universal: expert 0 serves every question, beside the routed ones.
    """

    kind: Literal["paper", "random", "clusters", "tasks"] = "tasks"
    mode: Literal["instance", "dense", "token"] = "instance"
    input: Literal["question", "system+question"] = "question"
    include_padding: bool = False
    load_balancing: float = 0.0
    balance_bias: float = 0.0
    universal: bool = False


@dataclass(frozen=True)
class CloudConfig:
    """The 3D branch (Object-As-Scene).

    encoder: `small`, trained once by `octavius pretrain-points`; a folder that it wrote; a ULIP or Point-BERT
        checkpoint (.pt); or None, where the data bring the objects' features.
    width: of the features without an encoder; an encoder has its own.
    queries, heads, layers, dropout: of the aggregation.
    """

    encoder: str | None = "small"
    width: int = 768
    queries: int = 16
    heads: int = 8
    layers: int = 1
    dropout: float = 0.1


@dataclass(frozen=True)
class ModelConfig:
    """The parts. `llm` and `tower` are names of `octavius assets`, Hugging Face names, or folders.

    tower: None for a model that reads no images; clouds: None for one that reads no point clouds.
    """

    llm: str = "smollm2"
    llm_layers: int | None = None  # keep only the first so many decoder layers, for small experiments
    tower: str | None = "efficientnet-lite0"
    clouds: CloudConfig | None = None
    tower_layer: int = -2  # of a ViT: which hidden state becomes the tokens
    tower_merge: int = 1  # of a ViT: join merge×merge neighbouring tokens into one
    projector: Literal["linear", "mlp"] = "linear"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attn_implementation: str | None = None  # None: flash_attention_2 on a GPU that has it, grouped on a CPU
    system: bool = False  # begin with the task type's system message
    gate: GateConfig = field(default_factory=GateConfig)
    lora: MoELoRAConfig = field(
        default_factory=lambda: MoELoRAConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the records are. `mini-lamm:SIZE`, `mini-scan2inst:SIZE` build the embedded data; else a root is a folder.

    root, root_3d: of images and of clouds; None for none. loop, loop_3d: how often an epoch passes over each;
    loop_detection: over the images' detections, whose long answers are learnt last; detection_first: so many batches
    of them come before all else.
    train_3d: a JSON file, or upstream's .pickle.
    """

    root: str | None = "mini-lamm:demo"
    root_3d: str | None = None
    loop: int = 1
    loop_3d: int = 1
    loop_detection: int = 1
    detection_first: int = 0
    train: str = "train.json"
    train_3d: str = "train.json"
    images: str | None = None  # folder that the records' image paths start from; None: beside the JSON file
    max_tokens: int = 400  # text after the image is cut to this many tokens
    cache_features: bool = True  # compute each image's tower features once and keep them on disk


@dataclass(frozen=True)
class TrainConfig:
    """One training run on `transformers.Trainer`.

    gate_rate: the gate's learning rate; None for the experts'. The gate has no weight decay.
    beta2: of AdamW. With 0.999 an expert that starts late keeps long what its first gradients were.
    """

    output: str = "runs/octavius"
    steps: int = -1  # optimizer steps; -1 trains `epochs` epochs
    epochs: float = 2.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 5e-4
    gate_rate: float | None = None
    weight_decay: float = 1e-3
    beta2: float = 0.95
    warmup: float = 0.05  # fraction of the steps
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    projector_init: bool = False  # set the projectors in closed form before training, see projector_init.py
    compile: bool = False  # torch.compile the decoder layers: pays from about five minutes of training
    workers: int = 2  # processes that decode images; features from the cache need none
    save_steps: int = 200
    log_steps: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


COUNT, AMOUNT, FRACTION = Range(1), Range(0), Range(0, 1)
RANGES: dict[type, dict[str, Range]] = {  # of every numeric field, checked when a configuration is read
    GateConfig: {"load_balancing": AMOUNT, "balance_bias": AMOUNT},
    CloudConfig: {
        "width": COUNT,
        "queries": COUNT,
        "heads": COUNT,
        "layers": COUNT,
        "dropout": Range(0, 1, below=True),
    },
    ModelConfig: {"llm_layers": COUNT, "tower_layer": Range(-200, 200), "tower_merge": COUNT},  # a tower knows its own
    DataConfig: {
        **dict.fromkeys(("loop", "loop_3d", "loop_detection", "detection_first"), AMOUNT),
        "max_tokens": COUNT,
    },
    TrainConfig: {
        **dict.fromkeys(("steps", "batch_size", "gradient_accumulation", "save_steps", "log_steps"), COUNT),
        "steps": Range(1, also=(-1,)),
        "epochs": Range(0, above=True),
        "learning_rate": Range(0, above=True),
        "gate_rate": Range(0, above=True),
        "beta2": Range(0, 1, below=True),
        "weight_decay": AMOUNT,
        "warmup": FRACTION,
        "workers": AMOUNT,
        "max_grad_norm": AMOUNT,
        "seed": Range(0, 2**32 - 1),
    },
}


def load_config(source: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run.

    Args:
        source: a YAML file, or the name of a preset (`demo`, `mini-2d`, ...).
        overrides: `section.key=value` settings that win over the file; values are YAML.

    Raises:
        ValueError: no such file or preset, not YAML, an unknown key (the nearest known one is named), a wrong type, a
            number out of its range.
    """
    path = Path(source)
    if not path.is_file() and (PRESETS / f"{source}.yaml").is_file():
        path = PRESETS / f"{source}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise ValueError(f"config must be a YAML file or one of the presets {names}, got {str(source)!r}")
    values = read_yaml(path) or {}
    for item in overrides or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"a setting must read section.key=value, got {item!r}")
        try:
            _assign(values, key.split("."), parse_yaml(value, key))
        except (ValueError, TypeError) as error:
            raise ValueError(f"cannot set {item!r}: {error}") from error
    return from_dict(Config, values, str(path))


def from_dict(cls: type, values: Any, where: str) -> Any:
    """Build the dataclass `cls` from nested dictionaries; unknown keys and wrong types are errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a mapping of {cls.__name__}'s keys, got {type(values).__name__}")
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in kinds:
            nearest = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")
        arguments[key] = _convert(kinds[key], value, f"{where}: {key}")
        if (allowed := RANGES.get(cls, {}).get(key)) and arguments[key] is not None:
            check_range(arguments[key], allowed, f"{where}: {key}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{where}: must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        if isinstance(value, dict):  # its own error says more than that no type fits
            options = [option for option in options if dataclasses.is_dataclass(option)] or options
            if len(options) == 1:
                return _convert(options[0], value, where)
        for option in options:
            if option is not type(None):
                try:
                    return _convert(option, value, where)
                except ValueError:
                    continue
        raise ValueError(f"{where}: must be {kind}, got {value!r}")
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: must be a list, got {value!r}")
        return origin(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-4 as a string
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: must be {kind.__name__}, got {value!r}")
    return value


def _assign(values: dict, keys: list[str], value: Any) -> None:
    *sections, last = keys
    for key in sections:
        values = values.setdefault(key, {}) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise TypeError(f"{'.'.join(sections) or 'the file'} holds no keys")
    values[last] = value
