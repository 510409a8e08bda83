"""The trainer: `transformers.Trainer` that saves what trains, orders its samples by length and logs the balancing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moe_lora
import torch
from transformers import Trainer, TrainingArguments

from octavius.config import Config
from octavius.data.batches import BucketSampler
from octavius.training.optimizer import ExpertAdamW

MEMORY = 0.98  # per batch, of the routing that is logged: about the last fifty batches count
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
        adam_beta2=run.beta2,
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

    With `closed_form` the projectors have parameter groups of their own, at INIT_RATE of the learning rate; the gate
    has `gate_rate` and no weight decay; each expert has optimizer steps of its own. `first` are the samples that
    training begins with, of one task, which balancing would spread over all experts: it comes after.
    It logs the answers' loss and the balancing apart, so that runs with different balancing can be compared, and how
    much the heavier expert tells of the task, I(task; expert) / H(task), where batches have `tasks`.
    """

    tokens = 0
    balancing: float | torch.Tensor = 0.0  # since the last log
    logged: int | None = None  # the step of it
    closed_form = False
    gate_rate: float | None = None
    used: torch.Tensor | None = None  # [2, tasks, E]: weights of the experts, and counts of the heavier one
    first: Sequence[int] = ()

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        args, whole_model = self.args, model or self.model
        assert whole_model is not None
        decayed = set(self.get_decay_parameter_names(whole_model))
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)  # their parameters are parts of the stacks
        groups: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in whole_model.named_parameters():
            if not parameter.requires_grad:
                continue
            rate, decay = args.learning_rate, args.weight_decay if name in decayed else 0.0
            if name.startswith("gate."):
                rate, decay = rate if self.gate_rate is None else self.gate_rate, 0.0
            elif self.closed_form and name.startswith(("projector.", "scene.")):
                rate *= INIT_RATE
            experts = whole and name.endswith((".lora_a", ".lora_b"))
            groups.setdefault((rate, decay, experts), []).append(parameter)
        self.optimizer = ExpertAdamW(
            [
                {"params": params, "lr": rate, "weight_decay": decay, "experts": experts}
                for (rate, decay, experts), params in groups.items()
            ],
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
        )
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens += int(inputs["attention_mask"].sum())
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seen = self.state.global_step * step
        self.model.balanced = seen >= len(self.first)  # type: ignore[union-attr, assignment]
        self.logged = self.state.global_step if self.logged is None else self.logged
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out: Any
        tasks = inputs.pop("tasks", None)
        loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.balancing = self.balancing + out["balancing"]
        if tasks is not None and self.model.training:  # type: ignore[union-attr]
            self._count(tasks, out["gates"])
        return (loss, out) if return_outputs else loss

    def _count(self, tasks: torch.Tensor, gates: torch.Tensor) -> None:
        """Add a batch to `used`: tasks [N], gates [N, E]."""
        if self.used is None:
            self.used = gates.new_zeros(2, len(self.train_dataset.tasks), gates.shape[1])  # type: ignore[union-attr]
        heavier = torch.zeros_like(gates).scatter_(1, gates.argmax(1, keepdim=True), 1.0)
        self.used = MEMORY * self.used
        self.used.index_add_(1, tasks.to(gates.device), torch.stack((gates, heavier)))

    def routing(self) -> dict[str, Any]:
        """Which experts served which task in about the last fifty batches.

        Returns:
            `tasks`; `weights` and `heavier` [tasks, E], the mean weight of each expert and how often it was the
            heaviest; `information`, I(task; heaviest expert) / H(task). Empty where batches had no `tasks`.
        """
        if self.used is None:
            return {}
        used: Any = self.accelerator.gather(self.used[None])
        weights, heavier = used.sum(0)
        return {
            "tasks": self.train_dataset.tasks,  # type: ignore[union-attr]
            "weights": (weights / weights.sum(1, keepdim=True).clamp(min=1e-12)).tolist(),
            "heavier": (heavier / heavier.sum(1, keepdim=True).clamp(min=1e-12)).tolist(),
            "information": moe_lora.mutual_information(heavier),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and isinstance(self.balancing, torch.Tensor) and self.logged is not None:
            # each rank holds its own part, by its share of the answers' tokens
            gathered: Any = self.accelerator.gather(self.balancing)
            balancing = gathered.sum().item() / (self.state.global_step - self.logged)
            logs = {**logs, "loss": logs["loss"] - balancing, "balancing": balancing}
            self.balancing, self.logged = 0.0, self.state.global_step
            if self.used is not None:
                logs["routing_information"] = self.routing()["information"]
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset
        lengths = [len(data[index]["input_ids"]) for index in range(len(data))]  # type: ignore[arg-type, index]
        return BucketSampler(lengths, self.args.train_batch_size, self.args.seed, first=self.first)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save(Path(output_dir or self.args.output_dir))  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load(Path(resume_from_checkpoint))  # type: ignore[union-attr]
