"""Training on `transformers.Trainer`: bfloat16 compute, float32 trainable weights, batches of like length."""

import ctypes
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from octavius import assets, minilamm
from octavius.align import align
from octavius.config import Config
from octavius.data import BucketSampler, Collator, InstructionData, Record, drop_bad_pictures, read_records
from octavius.encoders import FeatureStore
from octavius.model import Octavius

MINI_LAMM = "mini-lamm:"
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
CALIBRATION = 256  # pictures that the projector's statistics come from


def data_folder(root: str) -> Path:
    """The folder that `data.root` names; embedded data is built there first if it is missing."""
    if not root.startswith(MINI_LAMM):
        return Path(root)
    size = root.removeprefix(MINI_LAMM)
    return minilamm.build(assets.default_cache() / "mini-lamm" / size, size=size)


def load_data(model: Octavius, config: Config, file: str) -> tuple[list[Record], FeatureStore]:
    """Records of one JSON file whose pictures can be read, and the features of those pictures."""
    records = read_records(data_folder(config.data.root) / file, config.data.images)
    store = FeatureStore(model.tower[0], assets.default_cache() / "features" if config.data.cache_features else None)
    return drop_bad_pictures(records, store.prepare([record.image for record in records])), store


def train(config: Config, resume: bool = False) -> tuple[Octavius, dict[str, Any]]:
    """Train as `config` says; checkpoints, TensorBoard logs and the final model go to `config.train.output`.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in the output folder, if there is one.

    Returns:
        the model, and {"loss": [{"step", "loss"}, ...], "seconds", "tokens_per_second", "steps"}.
    """
    set_seed(config.train.seed)
    keep_freed_memory()
    model = Octavius.from_config(config.model)
    records, store = load_data(model, config, config.data.train)
    data = InstructionData(records, model.conversation, store.tower.tokens, config.data.max_tokens)
    output = Path(config.train.output)
    last = resume and any(output.glob("checkpoint-*"))
    if not last:
        model.projector.calibrate(store([record.image for record in records[:: max(1, len(records) // CALIBRATION)]]))
        if config.train.align:
            table = model.llm.get_input_embeddings().weight
            align(model.projector, records, store, model.conversation.tokens, table)
    if config.train.compile:
        compile_layers(model)
    trainer = OctaviusTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=data,
        data_collator=Collator(model.conversation.eos, store),
    )
    result = trainer.train(resume_from_checkpoint=True if last else None)
    model.save(output)
    log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "loss": log,
        "seconds": result.metrics["train_runtime"],
        "tokens_per_second": trainer.tokens / result.metrics["train_runtime"],
        "steps": trainer.state.global_step,
    }
    (output / "train.json").write_text(json.dumps(report, indent=1))
    return model, report


def compile_layers(model: Octavius) -> None:
    """Have torch.compile fuse each decoder layer, for batches of any length."""
    for layer in model.llm.base_model.layers:
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
    """Trainer that saves and loads what trains, not the frozen LLM, and counts the tokens that it trains on."""

    tokens = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset
        lengths = [len(data[index]["input_ids"]) for index in range(len(data))]  # type: ignore[arg-type, index]
        return BucketSampler(lengths, self.args.train_batch_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save(Path(output_dir or self.args.output_dir))  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load(Path(resume_from_checkpoint))  # type: ignore[union-attr]
