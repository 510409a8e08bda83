"""The trainer: `transformers.Trainer` that saves what trains, orders its samples by length and logs the balancing."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import moe_lora
import torch
from moe_lora import storage
from transformers import Trainer, TrainingArguments

from octavius.config import Config
from octavius.data.batches import BucketSampler
from octavius.language.prompts import IGNORE
from octavius.training.guards import Guards, check_weights
from octavius.training.optimizer import ExpertAdamW
from octavius.training.runs import CHECKPOINT, drop_old_checkpoints

MEMORY = 0.98  # per batch, of the routing that is logged: about the last fifty batches count
INIT_RATE = 0.1  # of the learning rate, for projectors that start in closed form, so that they keep it


def training_arguments(config: Config) -> TrainingArguments:
    """`config.train` in Trainer's words; of several processes each joins the others here.

    Raises:
        ValueError: the launcher started more processes than Trainer sees.
    """
    run, started, gpu = config.train, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    workers = 0 if config.data.cache_features or not config.model.tower else run.workers
    args = TrainingArguments(
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
        logging_nan_inf_filter=False,  # Guards stops the run instead
        seed=run.seed,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=gpu,
        use_cpu=not gpu,
        ddp_backend="gloo" if started > 1 and not gpu else None,
        ddp_find_unused_parameters=False,  # the model gives every part a gradient
        report_to=["tensorboard"],
    )
    if started != args.world_size:
        raise ValueError(
            f"the launcher started {started} processes (WORLD_SIZE), Trainer sees {args.world_size}: "
            "start them with torchrun, which sets RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too"
        )
    return args


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
    notes: Mapping[str, Any] = MappingProxyType({})  # for the manifests of the checkpoints
    draft: Path | None = None  # while a checkpoint is written

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.guards = Guards()
        self.add_callback(self.guards)

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
        self.guards.labels = self.guards.labels + num_items_in_batch  # type: ignore[operator]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seen = self.state.global_step * step
        self.model.balanced = seen >= len(self.first)  # type: ignore[union-attr, assignment]
        self.logged = self.state.global_step if self.logged is None else self.logged
        self.guards.loss = super().training_step(model, inputs, num_items_in_batch)
        return self.guards.loss

    def _clip_grad_norm(self, model):
        self.guards.norm = super()._clip_grad_norm(model)
        return self.guards.norm

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
        if "loss" in logs:
            self.guards.check_labels(self.state.global_step)
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
        samples = [data[index] for index in range(len(data))]  # type: ignore[arg-type, index]
        if all(label == IGNORE for sample in samples for label in sample["labels"]):
            raise ValueError(
                f"none of the {len(samples)} samples has a token to learn: data.max_tokens cuts every answer away, or "
                "the template does not match the tokenizer"
            )
        lengths = [len(sample["input_ids"]) for sample in samples]
        return BucketSampler(lengths, self.args.train_batch_size, self.args.seed, first=self.first)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.draft is None else str(self.draft)

    def _save_checkpoint(self, model, trial) -> None:
        """Have Trainer write into a staged folder, every rank its part, and the first rank commit it."""
        check_weights(self.model, self.state.global_step)  # type: ignore[arg-type]
        output, name = Path(str(self.args.output_dir)), f"{CHECKPOINT}-{self.state.global_step}"
        self.draft = output / f".{name}.staged"
        try:
            with self.together(output / name):
                super()._save_checkpoint(model, trial)
            with self.together(output / name):
                if self.args.should_save:
                    # with the kernels that ran: a resumed run computes the same bits by them
                    notes = {**self.notes, "choices": moe_lora.export_choices()}
                    storage.commit(self.draft / name, output / name, notes)
                    drop_old_checkpoints(output, self.state.global_step)
        finally:
            if self.args.should_save:
                shutil.rmtree(self.draft, ignore_errors=True)
            self.draft = None

    @contextmanager
    def together(self, path: Path) -> Iterator[None]:
        """Run a block on all ranks; if it fails on one, it fails on all, and none waits for ever."""
        failure: Exception | None = None
        try:
            with storage.disk_errors(path):
                yield
        except Exception as error:
            failure = error
        failed: Any = torch.tensor([float(failure is not None)], device=self.args.device)
        failed = self.accelerator.gather(failed)
        if failure is not None:
            raise failure
        if failed.any():
            raise OSError(f"{path} could not be written by another rank; see its message")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.model.write(folder)  # type: ignore[union-attr, operator]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load(Path(resume_from_checkpoint))  # type: ignore[union-attr]
