"""Training on `transformers.Trainer`: bfloat16 compute, float32 trainable weights, batches of like length."""

import ctypes
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from octavius.assets import registry
from octavius.config import Config
from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import Stores, load_data, loops
from octavius.data.records import Record
from octavius.model.octavius import Octavius
from octavius.training.gate_init import init_gate
from octavius.training.point_encoder import ensure_encoder
from octavius.training.projector_init import init_projector, init_scene_projector
from octavius.training.trainer import OctaviusTrainer, training_arguments

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
DONE = "train.json"  # what a finished run leaves
CALIBRATION = 256  # images that the projector's statistics come from


def train(config: Config, resume: bool = False) -> tuple[Octavius, dict[str, Any]]:
    """Train as `config` says; checkpoints, TensorBoard logs and the final model go to `config.train.output`.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in the output folder, if there is one; a finished run is only loaded.

    Returns:
        the model, and {"loss": [{"step", "loss"}, ...], "seconds", "tokens_per_second", "steps", "routing"};
            the last says which experts served which task, see `OctaviusTrainer.routing`.
    """
    set_seed(config.train.seed)
    keep_freed_memory()
    with registry.filling():
        if config.model.clouds and config.model.clouds.encoder:
            ensure_encoder(config.model.clouds.encoder)
        model = Octavius.from_config(config.model)
    output = Path(config.train.output)
    if resume and (output / DONE).exists():
        report = json.loads((output / DONE).read_text())
        if report["steps"] >= config.train.steps:
            model.load(output)
            return model, report
    records, stores = load_data(config.data, config.data.train, config.data.train_3d, **model.readers())
    looped = [record for record in records for _ in range(loops(record, config.data))]
    tokens = (model.image_tokens, config.data.max_tokens, True, model.cloud_tokens)
    data = InstructionData(looped, model.conversation, *tokens)
    last = resume and any(output.glob("checkpoint-*"))
    if not last:
        init_projectors(model, records, stores, config.train.projector_init)
        init_gate(model, data, config.train.seed)
    first = detection_first(looped, config)
    report = fit(model, config, data, stores, resume=last, first=first)
    model.save(output)
    (output / DONE).write_text(json.dumps(report, indent=1))
    return model, report


def fit(
    model: Octavius,
    config: Config,
    data: InstructionData,
    stores: Stores,
    resume: bool = False,
    first: Sequence[int] = (),
) -> dict[str, Any]:
    """Train a model whose projectors and gate are set.

    Args:
        model: it is changed.
        config: its `train` counts; checkpoints and logs go to `train.output`.
        data: the samples.
        stores: what they show.
        resume: go on from the newest checkpoint.
        first: samples that training begins with.

    Returns:
        the report that `train` describes.
    """
    if config.train.compile:
        compile_layers(model.llm)
    trainer = OctaviusTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=data,
        data_collator=Collator(model.conversation.eos, stores.images, objects=stores.scenes, tasks=True),
    )
    trainer.closed_form, trainer.gate_rate = config.train.projector_init, config.train.gate_rate
    trainer.first = first
    result = trainer.train(resume_from_checkpoint=True if resume else None)
    log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": log,
        "seconds": result.metrics["train_runtime"],
        "tokens_per_second": trainer.tokens / result.metrics["train_runtime"],
        "steps": trainer.state.global_step,
        "routing": trainer.routing(),
    }


def detection_first(records: list[Record], config: Config) -> list[int]:
    """The detections, drawn from the seed, that fill the first `data.detection_first` batches."""
    detections = [index for index, record in enumerate(records) if record.task_type == "detection"]
    random.Random(config.train.seed).shuffle(detections)
    return detections[: config.data.detection_first * config.train.batch_size]


def init_projectors(model: Octavius, records: list[Record], stores: Stores, closed_form: bool) -> None:
    """Set the projectors before training: statistics of what they read, and with `closed_form` the closed form."""
    words = model.conversation.tokens, model.llm.get_input_embeddings().weight
    with_images = [record for record in records if record.image]
    if stores.images and with_images:
        some = with_images[:: max(1, len(with_images) // CALIBRATION)]
        model.projector.calibrate(stores.images([record.image for record in some if record.image]))
        if closed_form:
            init_projector(model.projector, with_images, stores.images, *words)
    if stores.scenes and closed_form:
        init_scene_projector(model.scene, records, stores.scenes, *words)


def compile_layers(llm: Any) -> None:
    """Have torch.compile fuse each decoder layer, for batches of any length."""
    for layer in llm.base_model.layers:
        layer.compile(dynamic=True)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step, instead of returning it to Linux and faulting it in again.

    For tensors on a CPU, whose activations are freed and allocated anew in every step. Elsewhere than on glibc it does
    nothing.
    """
    if torch.cuda.is_available() or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
