"""The launches of the Triton kernels: for a call its kernels, grids and arguments, prepared once and kept.

A `Call` is kept for each set of shapes, strides, dtypes, alignments and settings. Its first launch of a kernel goes
through Triton, which compiles; the later ones go straight to what that compiled, with the tensors in their places. The
kernels are in `kernels.py`, their tiles in `tiles.py`. triton is imported at the first launch.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lora.backend.triton.tiles import Device, FusedGrid, Sizes, Tiling, cdiv
from moe_lora.dropout import keep_scale, threshold
from moe_lora.routing import Plan

_MOST_CALLS = 4096
_EMPTY = nullcontext()


class Route(NamedTuple):
    """Who uses what, of one call: contiguous tensors (offsets are experts where there are none), and the seed."""

    experts: Tensor
    gates: Tensor
    offsets: Tensor
    seed: Tensor | int
    stream: Any = None


class Bound:
    """A compiled kernel with its grid and all arguments but the leading ones, the tensors and the seed."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], rest: tuple):
        from triton import knobs

        self.compiled, self.grid, self.rest = compiled, (*grid, 1, 1)[:3], rest
        self.run, self.function, self.packed = compiled.run, compiled.function, compiled.packed_metadata
        self.hooks, self.enter, self.leave = knobs.runtime, *_hooks(knobs.runtime)

    def __call__(self, leading: tuple, stream: Any) -> None:
        arguments, metadata = (*leading, *self.rest), None
        if self.enter.calls:  # profilers
            metadata = self.compiled.launch_metadata(self.grid, stream, *arguments)
        self.run(
            *self.grid, stream, self.function, self.packed, metadata, self.enter, self.leave, *arguments
        )  # fmt: skip


def _hooks(runtime: Any) -> tuple[Any, Any]:
    return runtime.launch_enter_hook, runtime.launch_exit_hook


class Call(Tiling):
    """The launches of one call; made by `prepared`, which keeps it."""

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan, device: Device | None = None, narrow: bool = False):
        (T, _), (N, K), (E, D, R) = rows.shape, plan.experts.shape, lora_a.shape
        sizes = Sizes(T, N, K, E, R, D, plan.offsets is not None)
        super().__init__(sizes, rows.dtype, device or device_of(rows.device), narrow)
        self.dropout, self.scale = plan.dropout, plan.scale * keep_scale(plan.dropout)
        self.bound, self.notes = dict[str, Bound](), dict[Any, Any]()

    def kept(self, key: Any, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` returns, made once."""
        if key not in self.notes:
            self.notes[key] = make(*arguments)
        return self.notes[key]

    def shrink(self, name: str, x: Tensor, loras: Sequence[Tensor], route: Route, dropout: bool) -> list[Tensor]:
        """h [T, K·R] of x [T, D] and each lora [E, D, R], or ds of dy and B transposed."""
        hs = [x.new_empty(self.T, self.K * self.R) for _ in loras]
        if not hs[0].numel():
            return hs
        D, members = x.shape[1], len(loras)
        grid = self.kept(name, self.shrink_grid, D, members)
        outs = hs if grid.splits == 1 else [x.new_empty(grid.splits, *h.shape, dtype=torch.float32) for h in hs]
        leading = (x, *_three(loras), *_three(outs), route.experts, route.offsets, route.seed if dropout else 0)
        if not self._again(name, leading, route):
            numbers = (
                threshold(self.dropout) if dropout else 0,
                self.T, self.N, self.L, self.N.bit_length(), D, self.E, grid.splits,
                x.stride(0), loras[0].stride(0), loras[0].stride(2), loras[0].stride(1),
            )  # fmt: skip
            constants = {
                "C": grid.C, "INSTANCE": self.instance, "EVEN_D": D % grid.BLOCK_D == 0, "BLOCK_T": grid.BLOCK_T,
                "BLOCK_D": grid.BLOCK_D, **self._constants(dropout, D),
            }  # fmt: skip
            options = self.shrink_options(grid, members, loras[0].itemsize)
            self._first(name, _kernels().shrink_kernel, grid[:3], leading, numbers, constants, options)
        return hs if grid.splits == 1 else self._summed(name, outs, hs, route)

    def expand(
        self,
        name: str,
        xs: Sequence[Tensor],
        weights: Sequence[Tensor],
        bias: Tensor | None,
        loras: Sequence[Tensor],
        hs: Sequence[Tensor],
        y: Tensor,
        route: Route,
        dropout: bool,
    ) -> None:
        """Writes y [T, F] of x [T, D], weight [D, F], lora [E, R, F] and h; or dx, the sum over dy, W, A transposed and
        ds of each member."""
        if not y.numel():
            return
        leading = (
            *_three(xs), *_three(weights), xs[0] if bias is None else bias, *_three(loras), *_three(hs), y,
            route.experts, route.gates, route.offsets, route.seed if dropout else 0,
        )  # fmt: skip
        if self._again(name, leading, route):
            return
        Ds, F, lora = [weight.shape[0] for weight in weights], weights[0].shape[1], loras[0]
        tile = self.expand_tile(F, sum(Ds), len(xs))
        tiles = self.tiles(tile.BLOCK_T)
        numbers = (
            threshold(self.dropout) if dropout else 0, self.scale,
            self.T, self.N, self.L, self.N.bit_length(), *_three(Ds), F, self.E, tiles, self.groups(),
            *_three([x.stride(0) for x in xs]), *weights[0].stride(), *lora.stride(),
        )  # fmt: skip
        constants = {
            "MEMBERS": len(xs), "C": self.step, "INSTANCE": self.instance, "BIAS": bias is not None,
            "EVEN_D": all(D % tile.BLOCK_D == 0 for D in Ds), "BAND": 8, "BLOCK_T": tile.BLOCK_T,
            "BLOCK_F": tile.BLOCK_F, "BLOCK_D": tile.BLOCK_D, **self._constants(dropout, F),
        }  # fmt: skip
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        options |= self.registers() if self._consumer() or (len(xs) > 1 and tile.BLOCK_F < 256) else {}
        grid = (tiles * cdiv(F, tile.BLOCK_F),)
        self._first(name, _kernels().expand_kernel, grid, leading, numbers, constants, options)

    def ranks(
        self,
        name: str,
        bias: Tensor | None,
        loras: Sequence[Tensor],
        hs: Sequence[Tensor],
        y: Tensor,
        route: Route,
        dropout: bool,
    ) -> None:
        """Writes bias and low-rank part, all of y [T, F] but the product with the weight; or of dx, of all members."""
        if not y.numel():
            return
        leading = (
            hs[0] if bias is None else bias, *_three(loras), *_three(hs), y,
            route.experts, route.gates, route.offsets, route.seed if dropout else 0,
        )  # fmt: skip
        if self._again(name, leading, route):
            return
        F, tile = y.shape[-1], self.rank_tile()
        tiles = self.tiles(tile.BLOCK_T)
        numbers = (
            threshold(self.dropout) if dropout else 0, self.scale,
            self.T, self.N, self.L, self.N.bit_length(), F, self.E, tiles, self.groups(), *loras[0].stride(),
        )  # fmt: skip
        constants = {
            "MEMBERS": len(hs), "C": self.step, "INSTANCE": self.instance, "BIAS": bias is not None, "BAND": 8,
            "BLOCK_T": tile.BLOCK_T, "BLOCK_F": tile.BLOCK_F, **self._constants(dropout, F),
        }  # fmt: skip
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        grid = (tiles * cdiv(F, tile.BLOCK_F),)
        self._first(name, _kernels().ranks_kernel, grid, leading, numbers, constants, options)

    def fused(
        self,
        name: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loras: tuple[Tensor, Tensor],
        y: Tensor,
        grid: FusedGrid,
        route: Route,
        dropout: bool,
    ) -> Tensor:
        """Writes y [T, F] of x [T, D], weight [D, F] and loras [E, D, R] and [E, R, F]; returns h."""
        h, tile, tiles = x.new_empty(self.T, self.K * self.R), grid.tile, self.tiles(grid.tile.BLOCK_T)
        rows, transposed = (weight.t(), True) if weight.stride(0) == 1 else (weight, False)
        ready = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        box = [tile.BLOCK_F, tile.BLOCK_D] if transposed else [tile.BLOCK_D, tile.BLOCK_F]
        leading = (
            _descriptor(x, [tile.BLOCK_T, tile.BLOCK_D]), _descriptor(rows, box), x if bias is None else bias,
            *loras, h, y, ready, route.experts, route.gates, route.offsets, route.seed if dropout else 0,
        )  # fmt: skip
        if self._again(name, leading, route):
            return h
        (D, F), (shrink, lora) = weight.shape, loras
        numbers = (
            threshold(self.dropout) if dropout else 0, self.scale, self.T, self.N, self.L, self.N.bit_length(),
            D, F, self.E, tiles, self.groups(), shrink.stride(0), shrink.stride(2), shrink.stride(1), *lora.stride(),
        )  # fmt: skip
        constants = {
            "C": grid.C, "PARTS": grid.parts, "STEP": self.step, "BIAS": bias is not None, "TRANSPOSED": transposed,
            "EVEN_D": D % tile.BLOCK_D == 0, "BAND": 8, "BLOCK_T": tile.BLOCK_T, "BLOCK_F": tile.BLOCK_F,
            "BLOCK_D": tile.BLOCK_D, **self._constants(dropout, D),
        }  # fmt: skip
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "launch_cooperative_grid": True}
        self._first(name, _kernels().fused_kernel, (grid.programs,), leading, numbers, constants, options)
        return h

    def expert_grads(
        self, name: str, hs: Sequence[Tensor], x: Tensor, loras: Sequence[Tensor], route: Route, transposed: bool
    ) -> list[Tensor]:
        """dB like lora [E, R, D] of h and dy; transposed, dA like lora [E, D, R] of ds and x, of each member."""
        D, members = x.shape[1], len(loras)
        grads = [torch.empty(lora.shape, dtype=lora.dtype, device=lora.device) for lora in loras]
        grid, outs = self.kept(name, self.grad_grid, D, members), grads
        if grid.splits > 1:
            outs = [x.new_empty(grid.splits, *grad.shape, dtype=torch.float32) for grad in grads]
        leading = (
            *_three(hs), x, *_three(outs), route.experts, route.gates, route.offsets, route.seed if transposed else 0,
        )  # fmt: skip
        if not self._again(name, leading, route):
            stride_e, stride_r, stride_d = grads[0].stride(0), *grads[0].stride()[1:][:: -1 if transposed else 1]
            numbers = (
                threshold(self.dropout) if transposed else 0, self.scale,
                self.T, self.N, self.L, self.N.bit_length(), D, self.E, grid.splits,
                x.stride(0), stride_e, stride_r, stride_d,
            )  # fmt: skip
            constants = {
                "C": grid.C, "INSTANCE": self.instance, "BLOCK_T": grid.BLOCK_T, "BLOCK_D": grid.BLOCK_D,
                **self._constants(transposed, D),
            }  # fmt: skip
            options = self.grad_options(grid, members)
            self._first(name, _kernels().expert_grad_kernel, grid[:3], leading, numbers, constants, options)
        return grads if grid.splits == 1 else self._summed(name, outs, grads, route)

    def gate_grad(self, name: str, ds: Tensor, h: Tensor, route: Route) -> Tensor:
        dgates = torch.empty(route.gates.shape, dtype=route.gates.dtype, device=route.gates.device)
        leading = (ds, h, dgates, route.offsets)
        if self.N and not self._again(name, leading, route):
            constants = {
                "K": self.K, "R": self.R, "RANK": self.rank, "PACKED": self.packed, "BLOCK_T": self.gate_rows(),
            }  # fmt: skip
            numbers, kernel = (self.scale, self.L), _kernels().gate_grad_kernel
            self._first(name, kernel, (self.N, self.K), leading, numbers, constants, {"num_warps": 4})
        return dgates

    def _summed(self, name: str, parts: Sequence[Tensor], outs: list[Tensor], route: Route) -> list[Tensor]:
        for m, (part, out) in enumerate(zip(parts, outs, strict=True)):
            if not self._again(f"{name} sum {m}", (part, out), route):
                grid, numbers = (cdiv(out.numel(), 1024),), (out.numel(), part.shape[0])
                self._first(f"{name} sum {m}", _kernels().sum_kernel, grid, (part, out), numbers, {"BLOCK": 1024}, {})
        return outs

    def _again(self, name: str, leading: tuple, route: Route) -> bool:
        """Launches what an earlier launch of this name compiled, if there was one."""
        bound = self.bound.get(name)
        if bound is None:
            return False
        bound(leading, route.stream)
        return True

    def _first(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, ...],
        leading: tuple,
        numbers: tuple,
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        """Launches through Triton and keeps what that compiled."""
        compiled = kernel[grid](*leading, *numbers, **constants, **options)
        if compiled is not None and not interpreted():
            rest = [constants[constant] for constant in kernel.arg_names[len(leading) + len(numbers) :]]
            self.bound[name] = Bound(compiled, grid, (*numbers, *rest))

    def _constants(self, dropout: bool, D: int) -> dict[str, Any]:
        exact = torch.get_float32_matmul_precision() == "highest" or self.device.backend == "hip"
        dropout = dropout and self.dropout > 0
        return {
            "K": self.K, "R": self.R, "RANK": self.rank, "PACKED": self.packed, "DROPOUT": dropout,
            "PAIRED": D % 2 == 0, "WIDE": dropout and self.T * D > 2**33, "PRECISION": "ieee" if exact else "tf32",
        }  # fmt: skip


_calls: dict[tuple, Call] = {}


def prepared(
    what: str, rows: Tensor, lora_a: Tensor, plan: Plan, tensors: Sequence[Tensor | None]
) -> tuple[Call, Route]:
    """The call of these tensors, kept from an earlier one like it, and who uses what.

    Args:
        what: direction and form; one that ends with "narrow" takes smaller tiles.
        tensors: all that the kernels of this call are given from outside.
    """
    seed, kind = _seed(plan, rows.device)
    experts, gates = plan.experts.contiguous(), plan.gates.contiguous()
    offsets = experts if plan.offsets is None else plan.offsets.contiguous()
    if interpreted():
        route = Route(experts, gates, offsets, seed)
        return Call(rows, lora_a, plan, narrow=what.endswith("narrow")), route
    route = Route(experts, gates, offsets, seed, _stream())
    key = (
        what, generation(), rows.device, plan.scale, plan.dropout, kind, plan.offsets is None,
        torch.get_float32_matmul_precision(), *[_trait(tensor) for tensor in (*tensors, rows, lora_a, *route[:3])],
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= _MOST_CALLS or (_calls and next(iter(_calls))[1] is not key[1]):
            _calls.clear()
        call = _calls[key] = Call(rows, lora_a, plan, narrow=what.endswith("narrow"))
    return call, route


def dropped(x: Tensor, plan: Plan, in_place: bool = False) -> Tensor:
    """x [T, D] where dropout keeps it, else 0; one pass."""
    from moe_lora.backend.triton.dropout import drop_kernel

    kernel: Any = drop_kernel
    (T, D), (seed, _) = x.shape, _seed(plan, x.device)
    keeps = in_place and x.is_contiguous()
    out = x if keeps else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with on(x.device):
            kernel[(cdiv(T, 8), cdiv(D, 256))](
                x, out, seed, threshold(plan.dropout), T, D, x.stride(0), x.stride(1),
                PAIRED=D % 2 == 0, WIDE=T * D > 2**33, BLOCK_T=8, BLOCK_D=256,
            )  # fmt: skip
    return out


def _trait(tensor: Tensor | None) -> tuple | None:
    """What a launch's compilation and arguments depend on."""
    return tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15)


def _seed(plan: Plan, device: torch.device) -> tuple[Tensor | int, str]:
    """The seed and how a kernel takes it: one on the device as a pointer, so that a captured graph reads it anew; one
    on the CPU as a number of the width that it needs, without a copy to the device."""
    if plan.seed is None or not plan.dropout:
        return 0, "none"
    if plan.seed.device == device and device.type != "cpu":
        return plan.seed, "pointer"
    number = int(plan.seed.item())
    return number, "short" if -(2**31) <= number < 2**31 else "long"


@cache
def _kernels() -> ModuleType:
    from moe_lora.backend.triton import kernels  # imports triton

    return kernels


@cache
def _knobs() -> Any:
    from triton import knobs

    return knobs


@cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


def interpreted() -> bool:
    return _knobs().runtime.interpret


def generation() -> Any:
    """The driver in use; another one means other devices. None while triton has not been imported."""
    runtime = sys.modules.get("triton.runtime")
    return getattr(getattr(runtime, "driver", None), "_active", None)


def _stream() -> Any:
    active = _driver().active
    return active.get_current_stream(active.get_current_device())


def device_of(device: torch.device) -> Device:
    if interpreted():
        return Device(None, "interpreter", 80, 1 << 30, 1)
    active: Any = _driver().active
    with on(device):
        return _properties(active, active.get_current_device())


@cache
def _properties(active: Any, index: int) -> Device:
    target, properties = active.get_current_target(), active.utils.get_device_properties(index)
    return Device(
        active.get_active_torch_device().type,
        target.backend,
        target.arch if isinstance(target.arch, int) else 80,  # AMD's are names; all that triton knows have bfloat16
        properties["max_shared_mem"],
        properties["multiprocessor_count"],
    )


def on(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _EMPTY
    return torch.cuda.device(device)


def _descriptor(tensor: Tensor, box: list[int]) -> Any:
    """A tensor descriptor, without the checks of its constructor: `fused_grid` has made them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    made: Any = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = tensor, tensor.shape, tensor.stride(), box
    made.padding, made.round_f32_to_tf32 = "zero", False
    return made


def _three(values: Sequence[Any]) -> list[Any]:
    """A launch's arguments for each of three members; None for those that are not."""
    return [values[0], None, None] if len(values) == 1 else [*values, None, None][:3]
