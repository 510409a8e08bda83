"""Tensor memory of sm_100: 128 lanes of 512 columns of 32 bits for a block; what is allocated and what is in flight."""

import numpy as np

from ptxemu.fault import Fault
from ptxemu.races import SharedShadow
from ptxemu.tensor_core import LANE

LANES, COLUMNS = 128, 512


class TensorShadow(SharedShadow):
    name = "tensor memory"

    def where(self, g: np.ndarray, bad: np.ndarray) -> str:
        cell = int(g[bad][0]) % (LANES * COLUMNS)
        return f" (lane {cell // COLUMNS}, column {cell % COLUMNS})"


class TensorMemory:
    """Tensor memory of the blocks of a batch: its cells, which columns are allocated, and the products' tickets."""

    def __init__(self, batch):
        blocks = len(batch.blocks)
        self.cells = np.zeros(blocks * LANES * COLUMNS, np.uint32)
        self.owned, self.closed = np.zeros((blocks, COLUMNS), bool), np.zeros(blocks, bool)
        self.clocks, self.tickets = batch.clocks, 0
        self.started: dict[int, int] = {}  # warp: ticket of its last product
        self.shadow = None
        if batch.launch.races:
            self.shadow = TensorShadow(batch.clocks, self.cells.view(np.uint8), 4, batch.launch.seed is not None)

    def place(self, block: np.ndarray, lane: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Cells in the flat memory, which must be allocated."""
        outside = (lane < 0) | (lane >= LANES) | (column < 0) | (column >= COLUMNS)
        wrong = outside | ~self.owned[block, np.where(outside, 0, column)]
        if wrong.any():
            at, lane = (np.broadcast_to(x, wrong.shape)[wrong][0] for x in (column, lane))
            raise Fault("out of bounds", f"tensor memory at lane {lane}, column {at} is not allocated")
        return (block * LANES + lane) * COLUMNS + column

    def end(self) -> None:
        if self.owned.any():
            raise Fault("operand", "a block ends and has not deallocated its tensor memory")


class Queue:
    """Loads and stores of tensor memory in flight: their warps, and what their wait completes."""

    def __init__(self, n: int):
        self.loads: list[tuple[np.ndarray, list[int], np.ndarray, np.ndarray]] = []  # warps, registers, values, places
        self.stores: list[tuple[np.ndarray, np.ndarray]] = []  # warps, places

    def wait_loads(self, s, m) -> None:
        here, flying = warps_of(s, m), self.loads
        self.loads = []
        for warps, registers, values, at in flying:
            done = np.isin(warps, here)
            lanes = (32 * warps[done, None] + LANE).reshape(-1)
            for i, index in enumerate(registers):
                full = s.R[index].copy()
                full[lanes] = values[done, i].reshape(-1)
                s.R[index] = full
            if s.batch.tensor.shadow is not None:
                for warp, held in zip(warps[done], at[done], strict=True):
                    s.batch.tensor.shadow.release(int(s.warp[32 * warp]), held.reshape(-1))
            if not done.all():
                self.loads.append((warps[~done], registers, values[~done], at[~done]))

    def wait_stores(self, s, m) -> None:
        here, flying = warps_of(s, m), self.stores
        self.stores = []
        for warps, at in flying:
            done = np.isin(warps, here)
            if done.any():
                who = np.broadcast_to(s.warp[32 * warps[done], None, None], at[done].shape)
                s.batch.tensor.shadow.land(who.reshape(-1), 4 * at[done].reshape(-1), 4)
            if not done.all():
                self.stores.append((warps[~done], at[~done]))


def warps_of(s, m) -> np.ndarray:
    return np.arange(s.n // 32) if m is None else np.flatnonzero(m.reshape(-1, 32).any(1))
