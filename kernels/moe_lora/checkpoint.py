"""Save and load the experts of a model, and its gate: adapter_model.safetensors and adapter_config.json, like PEFT's.

The weights file repeats the config in its metadata, so that a config and weights of two different saves are told apart.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lora import fingerprint, storage
from moe_lora.calls import GATE_NAME, calls_of, give_gate
from moe_lora.card import write_card
from moe_lora.config import GateConfig, MoELoRAConfig
from moe_lora.inject import apply, find_targets
from moe_lora.layers import MoELoRALinear

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PEFT_TYPE = "MOE_LORA"
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# What must agree between a folder and a model that has experts already; the rest does not change the function.
_FUNCTION = ("num_experts", "top_k", "rank", "alpha")


@dataclass(frozen=True)
class _Adapter:
    """What adapter_config.json holds."""

    config: MoELoRAConfig
    gate: GateConfig | None
    base: dict[str, Any]
    name: str


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes the experts of `model`, its gate if it has one (`attach`), their configs and what the base is known by.

    Each file is replaced whole or not at all. The names are those of the bare model, without what torch.compile, DDP
    and the like put in front. If the parameters are sharded by FSDP2, every rank must call this; the first one writes.

    Args:
        model: a model with experts, or one that holds it.
        folder: made if it is not there; a model card, README.md, is written if there is none.
    Raises:
        ValueError: the model has no experts, or such of different configs, or they are not whole (DeepSpeed's ZeRO-3).
    """
    layers = _layers(model)
    if not layers:
        raise ValueError("model must have experts to save, got none; call moe_lora.apply first")
    configs = list(dict.fromkeys(layer.config for layer in layers.values()))
    if len(configs) > 1:
        raise ValueError(f"model must have experts of one config to save, got {configs}; save each part by itself")
    gate = _gate(model)
    parameters = _tensors(layers) | _gate_tensors(model)
    for key, tensor in parameters.items():
        if hasattr(tensor, "ds_id") or tensor.is_meta:
            raise ValueError(
                f"{key} must be whole to be saved, got a parameter without data; with DeepSpeed's ZeRO-3, save within "
                "deepspeed.zero.GatheredParameters(model.parameters())"
            )
    name = getattr(getattr(_root(model), "config", None), "_name_or_path", None) or ""
    text = _config_text(_Adapter(configs[0], gate, fingerprint.take(_base(model)), name))
    tensors = {key: _whole(tensor.detach()).cpu().contiguous() for key, tensor in parameters.items()}
    card = {"config": configs[0], "gate": gate, "base": name, "trains": sum(t.numel() for t in tensors.values())}
    if not any(_sharded(tensor) for tensor in parameters.values()):
        _write(Path(folder), tensors, text)
        write_card(Path(folder), **card)
        return
    try:
        if torch.distributed.get_rank() == 0:
            _write(Path(folder), tensors, text)
            write_card(Path(folder), **card)
    finally:
        torch.distributed.barrier()


class SavePretrained:
    """`model.save_pretrained` of a model that routes itself: writes the adapter alone, as `save` does.

    What the Trainer of transformers looks for on resuming, model.safetensors, is a second name of the same weights.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory: str | os.PathLike, is_main_process: bool = True, **_: Any) -> None:
        if not is_main_process:
            return
        folder = Path(save_directory)
        save(self.model, folder)
        second = folder / "model.safetensors"
        second.unlink(missing_ok=True)
        try:
            os.link(folder / WEIGHTS_NAME, second)
        except OSError:  # a file system without links
            shutil.copyfile(folder / WEIGHTS_NAME, second)


def _config_text(adapter: _Adapter) -> str:
    values = {
        "peft_type": _PEFT_TYPE,
        **asdict(adapter.config),
        "gate": None if adapter.gate is None else asdict(adapter.gate),
        "base": adapter.base,
        "base_model_name_or_path": adapter.name,
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _write(folder: Path, tensors: dict[str, Tensor], text: str) -> None:
    with storage.staged(folder) as draft:
        save_file(tensors, draft / WEIGHTS_NAME, metadata={"config": text})
        (draft / CONFIG_NAME).write_text(text, encoding="utf-8")


def load(model: nn.Module, folder: str | os.PathLike, any_base: bool = False) -> nn.Module:
    """Loads what `save` wrote; a model without experts is given them, and their gate, first.

    Checks all before it changes anything. A model that has experts keeps its own dropout and its own `GateConfig`, and
    each parameter its dtype, device and sharding.

    Args:
        model: the bare model, with its weights, or one with experts of the same numbers, rank and alpha.
        folder: what `save` was given.
        any_base: load over other base weights than the experts were trained on, too.
    Returns:
        The model.
    Raises:
        ValueError: a file is missing, damaged or foreign, or does not fit the model (says where), or the model has no
            data yet.
    """
    folder = storage.check(folder, (WEIGHTS_NAME, CONFIG_NAME))
    adapter, text = _read_config(folder / CONFIG_NAME)
    config = adapter.config
    tensors = _read_weights(folder / WEIGHTS_NAME, text)
    layers = _layers(model)
    if layers:
        own = next(iter(layers.values())).config
        for name in _FUNCTION:
            if getattr(own, name) != getattr(config, name):
                raise ValueError(f"{name} must be {getattr(own, name)} like the model's, got {getattr(config, name)}")
        _check_gate(_gate(model), adapter.gate)
        expected = {key: tensor.shape for key, tensor in (_tensors(layers) | _gate_tensors(model)).items()}
        frozen = {name: layer.weight for name, layer in layers.items()}
    else:
        expected, frozen = _expected(model, adapter)
    gates = {key for key in tensors if key.startswith(f"{GATE_NAME}.")} if not layers else set()
    _check_tensors({key: tensors[key] for key in tensors.keys() - gates}, expected)
    for name, weight in frozen.items():
        if weight.is_meta:
            raise ValueError(f"{name} must have data, got the meta device; load the model's own weights first")
    other = None if any_base else fingerprint.difference(adapter.base, _base(model))
    if other:
        raise ValueError(
            f"the experts were trained on {adapter.name or 'another base'}, got a model with {other}; load that base, "
            "or pass any_base=True"
        )
    if not layers:
        apply(model, config)
        if adapter.gate is not None:
            give_gate(model, config, adapter.gate)
            model.__dict__["save_pretrained"] = SavePretrained(model)
        layers = _layers(model)
        _check_tensors({key: tensors[key] for key in gates}, {k: t.shape for k, t in _gate_tensors(model).items()})
    with torch.no_grad():
        for key, tensor in (_tensors(layers) | _gate_tensors(model)).items():
            tensor.copy_(_like(tensor, tensors[key]))
    return model


def _expected(model: nn.Module, adapter: _Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shapes of the experts that a bare model would get, and its linears' weights, by name."""
    config, expected, frozen = adapter.config, {}, {}
    names: dict[nn.Linear, str] = {}
    for name, base in find_targets(model, config).items():
        names.setdefault(base, _bare_name(model, name))  # one linear may have two names
    for base, name in names.items():
        expected[f"{name}.lora_a"] = (config.num_experts, base.in_features, config.rank)
        expected[f"{name}.lora_b"] = (config.num_experts, config.rank, base.out_features)
        frozen[name] = base.weight
    return expected, frozen


def _root(model: nn.Module) -> nn.Module:
    """The model that the experts were applied to, where there is one; else what is given."""
    try:
        return calls_of(model)[0]
    except ValueError:
        return model


def _gate(model: nn.Module) -> GateConfig | None:
    try:
        return calls_of(model)[1].gate
    except ValueError:  # parts applied apart, or a layer by itself
        return None


def _gate_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the gate that is inside the model."""
    gate = getattr(_root(model), GATE_NAME, None)
    return {} if gate is None else {f"{GATE_NAME}.{key}": tensor for key, tensor in gate.state_dict().items()}


def _check_gate(own: GateConfig | None, saved: GateConfig | None) -> None:
    kinds = ["none" if gate is None else f"one of mode {gate.mode}" for gate in (own, saved)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the model's own gate must be like the saved one: the model has {kinds[0]}, saved is {kinds[1]}"
        )


def _base(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the base by name."""
    return {
        _bare_name(model, name): parameter
        for name, parameter in model.named_parameters()
        if GATE_NAME not in name.split(".") and not name.endswith((".lora_a", ".lora_b"))
    }


def _layers(model: nn.Module) -> dict[str, MoELoRALinear]:
    """Layers by their name in the bare model."""
    return {
        _bare_name(model, name): module for name, module in model.named_modules() if isinstance(module, MoELoRALinear)
    }


def _bare_name(model: nn.Module, name: str) -> str:
    """The name without what torch.compile, activation checkpointing, FSDP, DDP and DeepSpeed put in between."""
    kept, module = [], model
    for part in name.split("."):
        if part in module._parameters:
            kept.append(part)
            break
        parallel = type(module).__module__.startswith(("torch.nn.parallel.", "deepspeed."))
        if part not in _WRAPPED and not (part == "module" and parallel):
            kept.append(part)
        module = module._modules[part]
        assert module is not None
    return ".".join(kept)


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, of FSDP2


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if _sharded(tensor) else tensor


def _like(tensor: Any, whole: Tensor) -> Tensor:
    if not _sharded(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor  # here, since it takes long and few need it

    return distribute_tensor(whole.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)


def _tensors(layers: dict[str, MoELoRALinear]) -> dict[str, Tensor]:
    return {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in ("lora_a", "lora_b")}


def _read_config(path: Path) -> tuple[_Adapter, str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(values, dict) or values.pop("peft_type", None) != _PEFT_TYPE:
        raise ValueError(f"{path} must have peft_type {_PEFT_TYPE}, as moe_lora.save writes it")
    names = {field.name for field in fields(MoELoRAConfig)} | {"gate", "base", "base_model_name_or_path"}
    if set(values) != names:
        raise ValueError(f"{path} must have the keys {sorted(names)}, got {sorted(values)}")
    gate, base, name = (values.pop(key) for key in ("gate", "base", "base_model_name_or_path"))
    if not isinstance(base, dict) or set(base) != {"structure", "values"} or not isinstance(base["values"], dict):
        raise ValueError(f"{path} must have a base with structure and values, got {base!r}")
    try:
        return _Adapter(MoELoRAConfig(**values), None if gate is None else GateConfig(**gate), base, name), text
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a valid config: {error}") from error


def _read_weights(path: Path, config_text: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from error
    try:
        same = json.loads(metadata.get("config", "null")) == json.loads(config_text)
    except json.JSONDecodeError:
        same = False
    if not same:
        raise ValueError(f"{path} must be from the same save as {CONFIG_NAME}, got another config in its metadata")
    return tensors


def _check_tensors(tensors: dict[str, Tensor], expected: dict) -> None:
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"the weights must be those of the model's experts, got {len(missing)} missing {missing[:3]} and "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise ValueError(f"{key} must be {tuple(shape)}, got {tuple(tensors[key].shape)}")
        if not tensors[key].is_floating_point():
            raise ValueError(f"{key} must be floating point, got {tensors[key].dtype}")
