"""Save and load the experts of a model: a folder with adapter_model.safetensors and adapter_config.json, like PEFT's.

The weights file repeats the config in its metadata, so that a config and weights of two different saves are told apart.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lora import storage
from moe_lora.config import MoELoRAConfig
from moe_lora.inject import apply, find_targets
from moe_lora.layers import MoELoRALinear

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PEFT_TYPE = "MOE_LORA"
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# What must agree between a folder and a model that has experts already; the rest does not change the function.
_FUNCTION = ("num_experts", "top_k", "rank", "alpha")


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes the experts of `model` and their config with `storage`: all of it is replaced, or nothing.

    The names are those of the bare model, without what torch.compile, DDP and the like put in front. The gate is a
    module of its own and is not among them. If the parameters are sharded by FSDP2, every rank must call this; the
    first one writes.

    Args:
        model: a model with experts, or one that holds it.
        folder: made if it is not there.
    Raises:
        ValueError: the model has no experts, or such of different configs.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError("model must have experts to save, got none; call moe_lora.apply first")
    configs = list(dict.fromkeys(layer.config for layer in layers.values()))
    if len(configs) > 1:
        raise ValueError(f"model must have experts of one config to save, got {configs}; save each part by itself")
    text = json.dumps({"peft_type": _PEFT_TYPE, **asdict(configs[0])}, indent=2, sort_keys=True) + "\n"
    parameters = _tensors(layers)
    tensors = {key: _whole(tensor.detach()).cpu().contiguous() for key, tensor in parameters.items()}
    if not any(_sharded(tensor) for tensor in parameters.values()):
        _write(Path(folder), tensors, text)
        return
    try:
        if torch.distributed.get_rank() == 0:
            _write(Path(folder), tensors, text)
    finally:
        torch.distributed.barrier()


def _write(folder: Path, tensors: dict[str, Tensor], text: str) -> None:
    with storage.staged(folder) as draft:
        save_file(tensors, draft / WEIGHTS_NAME, metadata={"config": text})
        (draft / CONFIG_NAME).write_text(text, encoding="utf-8")


def load(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Loads what `save` wrote; a model without experts is given them first. Checks all before it changes anything.

    A model that has experts keeps its own dropout, and each parameter its dtype, device and sharding.

    Args:
        model: the bare model, with its weights, or one with experts of the same numbers, rank and alpha.
        folder: what `save` was given.
    Returns:
        The model.
    Raises:
        ValueError: a file is missing, damaged or foreign, or does not fit the model (says where), or the model has no
            data yet.
    """
    folder = storage.check(folder, (WEIGHTS_NAME, CONFIG_NAME))
    config, text = _read_config(folder / CONFIG_NAME)
    tensors = _read_weights(folder / WEIGHTS_NAME, text)
    layers = _layers(model)
    if layers:
        own = next(iter(layers.values())).config
        for name in _FUNCTION:
            if getattr(own, name) != getattr(config, name):
                raise ValueError(f"{name} must be {getattr(own, name)} like the model's, got {getattr(config, name)}")
        expected = {key: tensor.shape for key, tensor in _tensors(layers).items()}
        frozen = {name: layer.weight for name, layer in layers.items()}
    else:
        expected, frozen = {}, {}
        names: dict[nn.Linear, str] = {}
        for name, base in find_targets(model, config).items():
            names.setdefault(base, _bare_name(model, name))  # one linear may have two names
        for base, name in names.items():
            expected[f"{name}.lora_a"] = (config.num_experts, base.in_features, config.rank)
            expected[f"{name}.lora_b"] = (config.num_experts, config.rank, base.out_features)
            frozen[name] = base.weight
    _check_tensors(tensors, expected)
    for name, weight in frozen.items():
        if weight.is_meta:
            raise ValueError(f"{name} must have data, got the meta device; load the model's own weights first")
    if not layers:
        apply(model, config)
        layers = _layers(model)
    with torch.no_grad():
        for key, tensor in _tensors(layers).items():
            tensor.copy_(_like(tensor, tensors[key]))
    return model


def _layers(model: nn.Module) -> dict[str, MoELoRALinear]:
    """Layers by their name in the bare model."""
    return {
        _bare_name(model, name): module for name, module in model.named_modules() if isinstance(module, MoELoRALinear)
    }


def _bare_name(model: nn.Module, name: str) -> str:
    """The name without what torch.compile, activation checkpointing, FSDP, DDP and DeepSpeed put in between."""
    kept, module = [], model
    for part in name.split("."):
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


def _read_config(path: Path) -> tuple[MoELoRAConfig, str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(values, dict) or values.pop("peft_type", None) != _PEFT_TYPE:
        raise ValueError(f"{path} must have peft_type {_PEFT_TYPE}, as moe_lora.save writes it")
    names = {field.name for field in fields(MoELoRAConfig)}
    if set(values) != names:
        raise ValueError(f"{path} must have the keys {sorted(names)}, got {sorted(values)}")
    try:
        return MoELoRAConfig(**values), text
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
