"""The trainer: `transformers.Trainer` that saves what trains, orders its samples by length and logs the balancing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from octavius.config import Config
from octavius.data.batches import BucketSampler

INIT_RATE = 0.1  # of the learning rate, for projectors that start in closed form, so that they keep it


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

    With `closed_form` the projectors have parameter groups of their own, at INIT_RATE of the learning rate; `first` are
    the samples that training begins with, of one task, which balancing would spread over all experts: it comes after.
    It logs the answers' loss and the balancing apart, so that runs with different balancing can be compared.
    """

    tokens = 0
    balancing: float | torch.Tensor = 0.0  # since the last log
    logged: int | None = None  # the step of it
    closed_form = False
    first: Sequence[int] = ()

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        names = ("projector.", "scene.") if self.closed_form else ()
        slow = {id(p) for name, p in self.model.named_parameters() if name.startswith(names)}  # type: ignore[union-attr]
        for group in list(optimizer.param_groups):
            some = [p for p in group["params"] if id(p) in slow]
            if some:
                group["params"] = [p for p in group["params"] if id(p) not in slow]
                optimizer.add_param_group({**group, "params": some, "lr": INIT_RATE * group["lr"]})
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
