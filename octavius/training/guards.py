"""What ends a run before it does harm: numbers that are not finite, steps without a label, a signal to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from octavius.training.stopped import PreemptedError, TrainingStoppedError


def check_weights(model: nn.Module, step: int) -> None:
    """Raise TrainingStoppedError if a weight that trains is NaN or Inf; it names the first."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([p.detach() for _, p in named])])  # type: ignore[reportPrivateImportUsage]
    if norms.isfinite().all():
        return
    for name, p in named:  # a norm may overflow where every number is finite
        if not torch.isfinite(p).all():
            raise TrainingStoppedError(
                f"step {step}: the weight {name} is not finite, so nothing is saved; start again from the last "
                "checkpoint with a lower train.learning_rate"
            )


class Guards(TrainerCallback):
    """Stops a run at the first gradient that is not finite, and at a window of steps without a label.

    All ranks have the same gradients and counts, so they stop together.
    """

    def __init__(self) -> None:
        self.norm: float | torch.Tensor | None = None  # of the gradient, before it is clipped
        self.loss: float | torch.Tensor = 0.0  # of this rank, of the last batch
        self.labels: float | torch.Tensor = 0  # since the last check

    def on_pre_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        """Look at the gradient before the optimizer does."""
        norm = self.norm
        if norm is None:  # nothing clipped it
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(gradients)]))  # type: ignore[reportPrivateImportUsage]
        self.norm = None
        if not torch.isfinite(torch.as_tensor(norm)):
            raise TrainingStoppedError(
                f"step {state.global_step + 1}: the gradient's norm is {float(norm)} with a loss of "
                f"{float(self.loss):.4g}; the last good checkpoint stays: "
                "lower train.learning_rate, or look at the data"
            )

    def check_labels(self, step: int) -> None:
        """Raise TrainingStoppedError if no batch since the last check had a label."""
        if float(self.labels) == 0:
            raise TrainingStoppedError(
                f"step {step}: no token of the batches since the last log carries a label, so nothing is learnt; "
                "data.max_tokens cuts the answers away, or the template does not match the tokenizer"
            )
        self.labels = 0


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which SIGTERM came to any rank, with a checkpoint."""

    def __init__(self, world_size: int, device: torch.device):
        self.came, self.stopped, self.world_size, self.device = False, False, world_size, device
        self.running = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGTERM; before the first step there is nothing to save, and it raises PreemptedError at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: Any) -> None:
        self.came = True
        if not self.running:
            raise PreemptedError("SIGTERM came before the first step; start again with --resume")

    def on_train_begin(self, args, state, control, **kwargs):
        self.running = True

    def on_step_end(self, args, state, control, **kwargs):
        """Agree with the other ranks, and have Trainer save and stop."""
        came = self.came
        if self.world_size > 1:
            flag = torch.tensor([float(came)], device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            came = bool(flag.item())
        if came and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.running = False
