"""Training on `transformers.Trainer`: bfloat16 compute, float32 trainable weights, batches of like length."""

import ctypes
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from octavius import assets, minilamm, rooms
from octavius.align import align, align_scenes
from octavius.config import Config, DataConfig
from octavius.data import (
    BucketSampler,
    Collator,
    InstructionData,
    Record,
    Stores,
    drop_bad_pictures,
    make_records,
    read_records,
)
from octavius.encoders import FeatureStore
from octavius.model import Octavius
from octavius.objects import ObjectStore
from octavius.upstream3d import read_layout, read_pickle

EMBEDDED = {"mini-lamm": minilamm.build, "mini-scan2inst": rooms.build}
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
DONE = "train.json"  # what a finished run leaves
ALIGNED_RATE = 0.1  # of the learning rate, for projectors that start in closed form, so that they keep it
CALIBRATION = 256  # pictures that the projector's statistics come from


def data_folder(root: str) -> Path:
    """The folder that a root names; embedded data is built there first if it is missing."""
    name, colon, size = root.partition(":")
    if not colon or name not in EMBEDDED:
        return Path(root)
    return EMBEDDED[name](assets.default_cache() / name / size, size=size)


def load_data(model: Octavius, config: Config, file: str, file_3d: str | None = None) -> tuple[list[Record], Stores]:
    """Records whose pictures and clouds can be read, and the features of those.

    Args:
        file: of pictures, under `data.root`.
        file_3d: of clouds, under `data.root_3d`; named like the other when None.
    """
    with assets.filling():
        return _load_data(model, config.data, file, file_3d)


def _load_data(model: Octavius, data: DataConfig, file: str, file_3d: str | None) -> tuple[list[Record], Stores]:
    records, scenes = [], {}
    if data.root:
        records += read_records(data_folder(data.root) / file, data.images)
    if data.root_3d:
        found, scenes = read_scenes(data_folder(data.root_3d) / (file_3d or file))
        records += found
    folder = assets.default_cache() / "features" if data.cache_features else None
    stores = Stores(
        FeatureStore(model.tower[0], folder) if model.tower[0] else None,
        ObjectStore(model.encoder[0], folder, scenes) if model.settings.clouds else None,
    )
    return drop_bad_pictures(records, stores.prepare(records)), stores


def read_scenes(file: Path) -> tuple[list[Record], dict]:
    """Records about clouds and the objects that are known already: ours, or upstream's JSON or pickle.

    Upstream's JSON has no `pcl`: its features lie in the folders around it.
    """
    if file.suffix == ".pickle":
        items, scenes = read_pickle(file)
        return make_records(items, file, Path()), scenes
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text and '"pcl"' not in text and '"scene_id"' in text:
        root = file.parent.parent if file.parent.name == "meta_file" else file.parent
        items, scenes = read_layout(file, root)
        return make_records(items, file, Path()), scenes
    return read_records(file), {}


def train(config: Config, resume: bool = False) -> tuple[Octavius, dict[str, Any]]:
    """Train as `config` says; checkpoints, TensorBoard logs and the final model go to `config.train.output`.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in the output folder, if there is one; a finished run is only loaded.

    Returns:
        the model, and {"loss": [{"step", "loss"}, ...], "seconds", "tokens_per_second", "steps"}.
    """
    set_seed(config.train.seed)
    keep_freed_memory()
    with assets.filling():
        model = Octavius.from_config(config.model)
    output = Path(config.train.output)
    if resume and (output / DONE).exists():
        report = json.loads((output / DONE).read_text())
        if report["steps"] >= config.train.steps:
            model.load(output)
            return model, report
    records, stores = load_data(model, config, config.data.train, config.data.train_3d)
    looped = [record for record in records for _ in range(loops(record, config.data))]
    tokens = (model.image_tokens, config.data.max_tokens, True, model.cloud_tokens)
    data = InstructionData(looped, model.conversation, *tokens)
    last = resume and any(output.glob("checkpoint-*"))
    if not last:
        start(model, records, stores, config.train.align)
    if config.train.compile:
        compile_layers(model.llm)
    trainer = OctaviusTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=data,
        data_collator=Collator(model.conversation.eos, stores.pictures, objects=stores.scenes),
    )
    trainer.aligned = config.train.align
    detections = [index for index, record in enumerate(looped) if record.task_type == "detection"]
    random.Random(config.train.seed).shuffle(detections)
    trainer.first = detections[: config.data.detection_first * config.train.batch_size]
    result = trainer.train(resume_from_checkpoint=True if last else None)
    model.save(output)
    log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "loss": log,
        "seconds": result.metrics["train_runtime"],
        "tokens_per_second": trainer.tokens / result.metrics["train_runtime"],
        "steps": trainer.state.global_step,
    }
    (output / DONE).write_text(json.dumps(report, indent=1))
    return model, report


def loops(record: Record, data: DataConfig) -> int:
    """How often an epoch passes over a record."""
    if record.cloud:
        return data.loop_3d
    return data.loop_detection if record.task_type == "detection" else data.loop


def start(model: Octavius, records: list[Record], stores: Stores, aligned: bool) -> None:
    """Set the projectors before training: statistics of what they read, and with `aligned` the closed form."""
    words = model.conversation.tokens, model.llm.get_input_embeddings().weight
    pictured = [record for record in records if record.image]
    if stores.pictures and pictured:
        some = pictured[:: max(1, len(pictured) // CALIBRATION)]
        model.projector.calibrate(stores.pictures([record.image for record in some if record.image]))
        if aligned:
            align(model.projector, pictured, stores.pictures, *words)
    if stores.scenes and aligned:
        align_scenes(model.scene, records, stores.scenes, *words)


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


def training_arguments(config: Config) -> TrainingArguments:
    """`config.train` in Trainer's words."""
    run = config.train
    return TrainingArguments(
        output_dir=run.output,
        max_steps=run.steps,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        warmup_steps=run.warmup,
        lr_scheduler_type=run.schedule,
        max_grad_norm=run.max_grad_norm,
        activation_checkpointing=run.gradient_checkpointing,
        logging_steps=run.log_steps,
        save_steps=run.save_steps,
        save_total_limit=2,
        seed=run.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["tensorboard"],
    )


class OctaviusTrainer(Trainer):
    """Trainer that saves and loads what trains, not the frozen LLM, and counts the tokens that it trains on.

    With `aligned` the projectors have parameter groups of their own, at ALIGNED_RATE of the learning rate; `first` are
    the samples that training begins with, of one task, which balancing would spread over all experts: it comes after.
    It logs the answers' loss and the balancing apart, so that runs with different balancing can be compared.
    """

    tokens = 0
    balancing: float | torch.Tensor = 0.0  # since the last log
    logged: int | None = None  # the step of it
    aligned = False
    first: Sequence[int] = ()

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        names = ("projector.", "scene.") if self.aligned else ()
        slow = {id(p) for name, p in self.model.named_parameters() if name.startswith(names)}  # type: ignore[union-attr]
        for group in list(optimizer.param_groups):
            some = [p for p in group["params"] if id(p) in slow]
            if some:
                group["params"] = [p for p in group["params"] if id(p) not in slow]
                optimizer.add_param_group({**group, "params": some, "lr": ALIGNED_RATE * group["lr"]})
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens += int(inputs["attention_mask"].sum())
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seen = self.state.global_step * step
        self.model.balanced = seen >= len(self.first)  # type: ignore[union-attr, assignment]
        self.logged = self.state.global_step if self.logged is None else self.logged
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out: Any
        loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.balancing = self.balancing + out["balancing"]
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and isinstance(self.balancing, torch.Tensor) and self.logged is not None:
            # each rank holds its own part, by its share of the answers' tokens
            gathered: Any = self.accelerator.gather(self.balancing)
            balancing = gathered.sum().item() / (self.state.global_step - self.logged)
            logs = {**logs, "loss": logs["loss"] - balancing, "balancing": balancing}
            self.balancing, self.logged = 0.0, self.state.global_step
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset
        lengths = [len(data[index]["input_ids"]) for index in range(len(data))]  # type: ignore[arg-type, index]
        return BucketSampler(lengths, self.args.train_batch_size, self.args.seed, first=self.first)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save(Path(output_dir or self.args.output_dir))  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load(Path(resume_from_checkpoint))  # type: ignore[union-attr]
