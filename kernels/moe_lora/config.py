"""`MoELoRAConfig`: how many experts of which rank, on which linears; `GateConfig`: how a model routes itself."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MoELoRAConfig:
    """What `apply` puts where.

    Args:
        num_experts, top_k, rank: E, K, R.
        alpha: the update is scaled by alpha / rank.
        dropout: probability on the input of the experts, in training only.
        target_modules: names of linears, matched as the whole name or its end after a dot, each of which must match;
            or one str, a regular expression for the whole name; or "all-linear", every nn.Linear but the output
            embedding.
    Raises:
        ValueError: a number is out of its range or none, or target_modules is empty or no regular expression.
    """

    num_experts: int = 4
    top_k: int = 2
    rank: int = 32
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = field(default=("q_proj", "k_proj", "v_proj", "o_proj"))

    def __post_init__(self):
        targets = self.target_modules
        if isinstance(targets, Iterable) and not isinstance(targets, str):
            object.__setattr__(self, "target_modules", tuple(targets))
        for name in ("num_experts", "top_k", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        self._check_target_modules()

    def _check_target_modules(self) -> None:
        targets = self.target_modules
        if (
            not isinstance(targets, str | tuple)
            or not targets
            or not all(isinstance(name, str) and name for name in targets)
        ):
            raise ValueError(f"target_modules must be names of linears or one str, got {targets!r}")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules must be a regular expression, got {targets!r}: {error}") from error


@dataclass(frozen=True)
class GateConfig:
    """How a model that has its gate inside routes itself; see `attach`.

    Args:
        mode: "instance", "dense" or "token", as in `InstanceGate`.
        answer_marker: token ids that begin an answer, such as those of "<|im_start|>assistant"; the question ends
            before their first occurrence. Empty: there is no marker.
        question: "auto" reads the question from the call, and refuses if nothing says what it is; "all" takes all
            tokens.
        universal: expert 0 serves every instance, as in `InstanceGate`.
        balance: weight of `load_balancing_loss`, added to the model's loss in training.
        bias_rate: step of `InstanceGate.balance` after each batch of training; it balances without a loss.
        lr: learning rate of the gate, for `parameter_groups`; None means the experts'.
    Raises:
        ValueError: a value is none of these.
    """

    mode: Literal["instance", "dense", "token"] = "instance"
    answer_marker: tuple[int, ...] = ()
    question: Literal["auto", "all"] = "auto"
    universal: bool = False
    balance: float = 0.0
    bias_rate: float = 0.0
    lr: float | None = None

    def __post_init__(self):
        if self.mode not in ("instance", "dense", "token"):
            raise ValueError(f"mode must be instance, dense or token, got {self.mode!r}")
        if self.question not in ("auto", "all"):
            raise ValueError(f"question must be auto or all, got {self.question!r}")
        marker = self.answer_marker
        if isinstance(marker, str) or not isinstance(marker, Iterable):
            raise ValueError(f"answer_marker must be token ids, got {marker!r}; tokenize it without special tokens")
        object.__setattr__(self, "answer_marker", tuple(marker))
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in self.answer_marker):
            raise ValueError(f"answer_marker must be token ids, got {marker!r}")
        for name in ("balance", "bias_rate", "lr"):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
