"""`MoELoRAConfig`: how many experts of which rank, on which linears."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field


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
