"""Keys and values of a batch whose rows come and go: one slot a row, each with its own length.

Rows stand at the left of their slot, at positions 0 .. length - 1, so that a row that joins or leaves moves no other;
the rows in use are the first slots. transformers' own static cache has one length for all rows.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

CHUNK = 128  # positions that the slots grow by


class SlotLayer(CacheLayerMixin):
    """Slots of one layer: keys and values [S, Hk, C, d]."""

    def __init__(self, shared: "SlotCache"):
        super().__init__()
        self.shared = shared

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, positions = self.shared.slots, self.shared.capacity
        heads = key_states.shape[1]
        self.keys = key_states.new_zeros(rows, heads, positions, key_states.shape[3])
        self.values = value_states.new_zeros(rows, heads, positions, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [n, Hk, L, d]; returns all that the n rows may read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        n, _, length, _ = key_states.shape
        if self.shared.first is not None:  # new rows, from their first position on
            rows = slice(self.shared.first, self.shared.first + n)
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                kept[rows, :, :length] = new
                kept[rows, :, length:] = 0  # what an earlier row left there may be NaN, and 0 · NaN is NaN
            return key_states, value_states
        at = torch.arange(n, device=key_states.device)
        self.keys[at, :, self.shared.lengths] = key_states[:, :, 0]
        self.values[at, :, self.shared.lengths] = value_states[:, :, 0]
        reach = self.shared.reach
        return self.keys[:n, :, :reach], self.values[:n, :, :reach]

    def resize(self) -> None:
        """Take the shared number of slots and positions; what fits stays."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old: torch.Tensor = getattr(self, name)
            new = old.new_zeros(self.shared.slots, old.shape[1], self.shared.capacity, old.shape[3])
            rows, positions = min(old.shape[0], new.shape[0]), min(old.shape[2], new.shape[2])
            new[:rows, :, :positions] = old[:rows, :, :positions]
            setattr(self, name, new)

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        if self.keys is not None and self.values is not None:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared.reach, 0

    def get_seq_length(self) -> int:
        return 0 if self.shared.first is not None else self.shared.reach - 1

    def get_max_length(self) -> int:
        return self.shared.capacity


class SlotCache(Cache):
    """Slots of all layers.

    Args:
        layers: of the LLM.

    `first` is set while new rows are read, the slot of the first of them; else `lengths` [n] has the rows' lengths and
    `reach` the positions that the longest may read.
    """

    def __init__(self, layers: int):
        self.slots, self.capacity = 0, 0
        self.first: int | None = None
        self.lengths, self.reach = torch.zeros(0, dtype=torch.long), 0
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows and positions; gives room back that is four times too large."""
        positions = -(-positions // CHUNK) * CHUNK
        grow = rows > self.slots or positions > self.capacity
        if grow or (4 * rows <= self.slots and self.slots > 8) or 4 * positions <= self.capacity:
            self.slots = max(self.slots, rows) if grow else max(rows, 1)
            self.capacity = max(self.capacity, positions) if grow else positions
            for layer in self.layers:
                layer.resize()  # type: ignore[union-attr]

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another in all layers."""
        for layer in self.layers:
            layer.move(source, target)  # type: ignore[union-attr]
