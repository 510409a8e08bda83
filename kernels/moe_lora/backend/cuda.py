"""The CUDA backend: one launch for at most 64 rows, without gradients; `csrc/cuda/decode.cu`, float16 and bfloat16.

    h = x A,  y = x Wᵀ + bias + s Σ_k g h B      in one pass over W and the experts in use

The library has a C interface and knows nothing of torch; here are its arguments and how the work is divided. All
buffers are PyTorch's: a call may be captured in a CUDA graph.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.routing import Plan

KERNELS = tuple(
    f"decode_{base}_{lora}_{rows}" for base in ("bf16", "f16") for lora in (base, "f32") for rows in (8, 64)
)
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_ROWS, _MAX_RANK, _MAX_EXPERTS, _MAX_PICKS = 64, 256, 4096, 1024
_COLUMNS, _RANKS = 32, 128  # as in decode.cu


class Sizes(ctypes.Structure):
    """Sizes of a call; the same fields as in decode.cu."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("T", "D", "F", "N", "L", "E", "K", "R", "stride")),
        *((name, ctypes.c_int) for name in ("slabs", "slab", "splits", "span")),
        ("scale", ctypes.c_float),
    ]


class Library:
    """The compiled library on one kind of device."""

    device = "cuda"

    def __init__(self, path: str):
        self.functions = ctypes.CDLL(path)
        self.functions.moe_lora_cuda_error.restype = ctypes.c_char_p

    @cache  # noqa: B019 (there is one library)
    def blocks(self, index: int | None, kernel: int, shared: int) -> int:
        """How many blocks the device holds at a time; raises RuntimeError if it cannot run them."""
        found = ctypes.c_int(0)
        with torch.cuda.device(index):
            self.check(self.functions.moe_lora_decode_blocks(kernel, shared, ctypes.byref(found)))
        return found.value

    def launch(self, kernel: int, tensors: list[Tensor | None], sizes: Sizes, grid: int, shared: int) -> None:
        device = tensors[0].device if tensors[0] is not None else torch.device(self.device)
        pointers = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() if t is not None else None for t in tensors])
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(kernel, tensors, sizes, grid, shared)
        stream = self.stream(device)
        self.check(self.functions.moe_lora_decode(kernel, pointers, ctypes.byref(sizes), grid, shared, stream))

    def stream(self, device: torch.device) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)

    def check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"moe_lora._cuda: {self.functions.moe_lora_cuda_error(error).decode()}")


@cache
def library() -> Library | str:
    """The library, or the reason why there is none that runs here."""
    spec = find_spec("moe_lora._cuda")
    if spec is None or spec.origin is None:
        return "moe_lora._cuda is not built; install with MOE_LORA_BUILD=cuda where nvcc is"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        found = Library(spec.origin)
        found.blocks(torch.cuda.current_device(), 0, 0)
    except (OSError, RuntimeError) as error:
        return str(error)
    return found


def generation() -> object:
    """The library in use."""
    return library()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    found = library()
    return found if isinstance(found, str) else None


def refuses(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    if len(weights) > 1:
        return "it runs one linear at a time"
    (weight,), (lora_a,) = weights, lora_as
    found, (E, D, R), T = library(), lora_a.shape, x.shape[:-1].numel()
    assert isinstance(found, Library)
    if x.device.type != found.device:
        return f"x is on {x.device}, not on a {found.device} device"
    if x.dtype not in _DTYPES:
        return f"x must be float16 or bfloat16, got {x.dtype}"
    if lora_a.dtype not in (x.dtype, torch.float32):
        return f"lora_a must be {x.dtype} like x or float32, got {lora_a.dtype}"
    if not 0 < T <= _MAX_ROWS:
        return f"it is for 1 to {_MAX_ROWS} rows, got {T}"
    if plan.dropout:
        return "it has no dropout"
    if D % 8 or not weight.is_contiguous() or weight.data_ptr() % 16:
        return f"weight must be contiguous, its rows multiples of 16 bytes, got D = {D}, strides {weight.stride()}"
    if R > _MAX_RANK or E > _MAX_EXPERTS or T * plan.experts.shape[1] > _MAX_PICKS:
        limits = f"rank {_MAX_RANK}, {_MAX_EXPERTS} experts, {_MAX_PICKS} rows times experts of a row"
        return f"it is for at most {limits}, got R = {R}, E = {E}, T = {T}, K = {plan.experts.shape[1]}"
    return None


def describe(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan, form: str) -> tuple[str, str]:
    """The kernel that would run, and why."""
    call = _launch_of(x.reshape(-1, x.shape[-1]), weights[0], lora_as[0], plan)
    sizes = call.sizes
    return KERNELS[call.kernel], f"T = {sizes.T} <= {_MAX_ROWS}; {call.grid} blocks, D in {sizes.splits} parts"


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    plan: Plan,
    form: str = "",
) -> tuple[list[Tensor], list[Tensor]]:
    """y [..., F] and h [T, K·R], both in x's dtype, for x [..., D] and a group of one."""
    (weight,), (bias,), (lora_a,), (lora_b,) = weights, biases, lora_as, lora_bs
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    call = _launch_of(rows, weight, lora_a, plan)
    sizes = call.sizes
    y = x.new_empty(*x.shape[:-1], sizes.F)
    h = x.new_empty(sizes.T, sizes.K * sizes.R)
    parts = x.new_empty(call.workspace, dtype=torch.float32)
    lora = [tensor.to(lora_a.dtype).contiguous() for tensor in (lora_a, lora_b)]
    offsets = None if plan.offsets is None else plan.offsets.contiguous()
    route = [plan.experts.contiguous(), plan.gates.float().contiguous(), offsets]
    found = library()
    assert isinstance(found, Library)
    tensors = [rows, weight, None if bias is None else bias.contiguous(), *lora, *route, y, h, parts]
    found.launch(call.kernel, tensors, sizes, call.grid, call.shared)
    return [y], [h]


class Launch(NamedTuple):
    """How a call is divided; `workspace` in float32 numbers, `shared` in bytes."""

    kernel: int
    sizes: Sizes
    grid: int
    shared: int
    workspace: int


def _launch_of(rows: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> Launch:
    found = library()
    assert isinstance(found, Library)
    (T, D), F, (E, _, R), (N, K) = rows.shape, weight.shape[0], lora_a.shape, plan.experts.shape
    single = lora_a.dtype == torch.float32
    kernel = 4 * (rows.dtype == torch.float16) + 2 * single + (T > 8)
    shared = shared_bytes(T, E, K)
    sizes = Sizes(T, D, F, N, T // max(N, 1), E, K, R, rows.stride(0))
    return divide(kernel, sizes, plan.scale, shared, found.blocks(rows.device.index, kernel, shared))


def shared_bytes(T: int, E: int, K: int) -> int:
    sums = max(8 * (256 + 256), 4 * (8 if T <= 8 else 64) * (_COLUMNS + 4))
    return 4 * (sums + _RANKS * _COLUMNS + 2 * T * K + E + min(E, T * K))


def divide(kernel: int, sizes: Sizes, scale: float, shared: int, blocks: int) -> Launch:
    """Columns of y to the device's blocks, with D in parts if they would fill less than half; pieces of the shrink."""
    T, D, F, K, R = sizes.T, sizes.D, sizes.F, sizes.K, sizes.R
    tiles = _cdiv(F, _COLUMNS)
    sizes.span = _up(_cdiv(D, max(1, min(blocks // 2 // tiles, D // 512))), 64)
    sizes.splits = _cdiv(D, sizes.span)
    units = tiles * sizes.splits
    grid = _cdiv(units, _cdiv(units, blocks))
    pieces = min(sizes.E, T * K) * _cdiv(T, 8)  # of one slab; all of y's blocks will read all slabs
    sizes.slab = _up(_cdiv(D, max(1, min(grid // pieces, D // 64, 16))), 8)
    sizes.slabs, sizes.scale = _cdiv(D, sizes.slab), scale
    workspace = sizes.slabs * T * K * R + (sizes.splits * T * F if sizes.splits > 1 else 0)
    return Launch(kernel, sizes, grid, shared, workspace)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _up(n: int, to: int) -> int:
    return _cdiv(n, to) * to
