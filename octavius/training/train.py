"""Training on `transformers.Trainer`: bfloat16 compute, float32 trainable weights, batches of like length."""

import ctypes
import json
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import moe_lora
import torch
from moe_lora import storage
from transformers import TrainingArguments, set_seed

from octavius.config import Config
from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import Stores, load_data, loops
from octavius.data.records import Record
from octavius.model.octavius import Octavius
from octavius.training.gate_init import init_gate
from octavius.training.guards import StopOnSignal, check_weights
from octavius.training.point_encoder import ensure_encoder
from octavius.training.projector_init import init_projector, init_scene_projector
from octavius.training.runs import DONE, Start, find_start, notes_of
from octavius.training.stopped import PreemptedError
from octavius.training.trainer import OctaviusTrainer, training_arguments

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
CALIBRATION = 256  # images that the projector's statistics come from


def train(config: Config, resume: bool = False) -> tuple[Octavius, dict[str, Any]]:
    """Train as `config` says; checkpoints, TensorBoard logs and the final model go to `config.train.output`.

    Under torchrun all processes call it and train one model; the first one saves.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in the output folder, if there is one; a finished run is only
            loaded.

    Returns:
        the model, and {"loss": [{"step", "loss"}, ...], "seconds", "tokens_per_second", "steps", "routing"};
            the last says which experts served which task, see `OctaviusTrainer.routing`.
    Raises:
        ValueError: the folder's run was started with other settings.
        BusyError: another run works in the folder.
        PreemptedError: SIGTERM came; all is saved.
        TrainingStoppedError: NaN, Inf, or no label; the last good checkpoint stays.
        DiskFullError: no space is left; the last checkpoint stays.
    """
    set_seed(config.train.seed)
    keep_freed_memory()
    args = training_arguments(config)
    signals = StopOnSignal(args.world_size, args.device)
    with signals.listening(), _first_rank_holds(config, args):
        start = find_start(config, args.world_size) if resume else Start()
        if config.model.clouds and config.model.clouds.encoder:
            ensure_encoder(config.model.clouds.encoder)
        model = Octavius.from_config(config.model)
        if start.report is not None:
            model.load(config.train.output)
            return model, start.report
        records, stores = load_data(config.data, config.data.train, config.data.train_3d, **model.readers(args.device))
        looped = [record for record in records for _ in range(loops(record, config.data))]
        tokens = (model.image_tokens, config.data.max_tokens, True, model.cloud_tokens)
        data = InstructionData(looped, model.conversation, *tokens)
        if start.notes and start.notes["samples"] != len(data):
            raise ValueError(
                f"{config.train.output} was started on {start.notes['samples']} samples, the data now has {len(data)}: "
                "restore them or give another train.output"
            )
        if start.notes:
            moe_lora.import_choices(start.notes["choices"])
        if start.checkpoint is None:
            init_projectors(model, records, stores, config.train.projector_init)
            init_gate(model, data, config.train.seed)
        first = detection_first(looped, config)
        report = fit(model, config, data, stores, start.checkpoint, first, args, signals)
        _save(model, config, args, report, len(data))
    return model, report


def fit(
    model: Octavius,
    config: Config,
    data: InstructionData,
    stores: Stores,
    checkpoint: Path | None = None,
    first: Sequence[int] = (),
    args: TrainingArguments | None = None,
    signals: StopOnSignal | None = None,
) -> dict[str, Any]:
    """Train a model whose projectors and gate are set.

    Args:
        model: it is changed.
        config: its `train` counts; checkpoints and logs go to `train.output`.
        data: the samples.
        stores: what they show.
        checkpoint: where to go on from.
        first: samples that training begins with.
        args: `training_arguments(config)`, where the caller has them.
        signals: what ends training early, with a checkpoint.

    Returns:
        the report that `train` describes.
    """
    if config.train.compile:
        compile_layers(model.llm)
    args = args or training_arguments(config)
    collator = Collator(model.conversation.eos, stores.images, objects=stores.scenes, tasks=True)
    trainer = OctaviusTrainer(model=model, args=args, train_dataset=data, data_collator=collator)
    trainer.closed_form, trainer.gate_rate = config.train.projector_init, config.train.gate_rate
    trainer.first, trainer.notes = first, notes_of(config, args.world_size, len(data))
    if args.process_index:
        torch.manual_seed(config.train.seed + args.process_index)  # ranks draw dropout of their own
    if signals is not None:
        trainer.add_callback(signals)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step = trainer.state.global_step
    if signals is not None and signals.stopped:
        raise PreemptedError(f"SIGTERM came: step {step} is saved in {config.train.output}; go on with --resume")
    check_weights(model, step)
    log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": log,
        "seconds": result.metrics["train_runtime"],
        "tokens_per_second": trainer.tokens / result.metrics["train_runtime"],
        "steps": step,
        "routing": trainer.routing(),
    }


def _save(model: Octavius, config: Config, args: TrainingArguments, report: dict[str, Any], samples: int) -> None:
    """Save the trained model with the run's report; the first rank writes, the others wait."""
    if args.process_index == 0:
        with storage.staged(config.train.output, notes_of(config, args.world_size, samples)) as draft:
            model.write(draft)
            (draft / DONE).write_text(json.dumps(report, indent=1), encoding="utf-8")
    if args.world_size > 1:
        torch.distributed.barrier()


def detection_first(records: list[Record], config: Config) -> list[int]:
    """The detections, drawn from the seed, that fill the first `data.detection_first` batches."""
    detections = [index for index, record in enumerate(records) if record.task_type == "detection"]
    random.Random(config.train.seed).shuffle(detections)
    return detections[: config.data.detection_first * config.train.batch_size]


def _first_rank_holds(config: Config, args: TrainingArguments) -> AbstractContextManager[None]:
    """The output folder's lock, which one process of the run holds for all."""
    return storage.lock(config.train.output) if args.process_index == 0 else nullcontext()


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
