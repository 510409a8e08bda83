"""CUDA C++ through nvcc: the kernels of ptx/data/*.cu agree with numpy, from committed and from fresh PTX."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptxemu import Fault, launch_ptx
from ptxemu.bulk import TensorMap
from ptxemu.module import array_buffer

DATA = Path(__file__).parent / "data"
TARGETS = ("committed", "sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module", params=TARGETS)
def module(request, tmp_path_factory) -> str:
    if request.param == "committed":
        return (DATA / "kernels.ptx").read_text()
    return compiled("kernels.cu", request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=("committed", "sm_90"))
def copies(request, tmp_path_factory) -> str:
    """The module of asynchronous copies."""
    if request.param == "committed":
        return (DATA / "tma.ptx").read_text()
    return compiled("tma.cu", request.param, tmp_path_factory)


def compiled(name: str, target: str, tmp_path_factory) -> str:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    out = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    subprocess.run(["nvcc", "-ptx", f"-arch={target}", "-O3", "-std=c++17", DATA / name, "-o", out], check=True)
    return out.read_text()


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bf16 values, as float32."""
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def raw(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("n", [64, 70])
def test_transpose(module, n):
    x = np.random.default_rng(0).standard_normal((n, n)).astype("f4")
    for name in ("transpose_padded", "transpose_unpadded"):
        y, blocks = np.zeros((n, n), "f4"), -(-n // 32)
        launch_ptx(module, name, (blocks, blocks), (32, 8), x, y, n, schedules=3)
        assert (y == x.T).all()


def test_block_sum(module):
    x, total = np.random.default_rng(0).standard_normal(5000).astype("f4"), np.zeros(1, "f4")
    launch_ptx(module, "block_sum", (3,), (128,), x, total, len(x))
    assert abs(total[0] - x.astype("f8").sum()) < 1e-4


def test_histogram_in_dynamic_shared_memory(module):
    x, bins = np.random.default_rng(0).integers(0, 1000, 3000).astype("i4"), np.zeros(64, "i4")
    launch_ptx(module, "count_bins", (1,), (128,), x, bins, len(x), shared=256, schedules=3)
    assert (bins == np.bincount(x & 63, minlength=64)).all()
    with pytest.raises(Fault, match="out of bounds: shared memory has 128 bytes"):
        launch_ptx(module, "count_bins", (1,), (128,), x, bins, len(x), shared=128)


def test_mma_of_one_warp(module):
    rng = np.random.default_rng(0)
    a, b = (bf16(rng.standard_normal(shape)) for shape in ((16, 16), (16, 8)))
    c = np.zeros((16, 8), "f4")
    profile = launch_ptx(module, "mma_tile", (1,), (32,), raw(a), raw(b), c)
    assert (c == (a.astype("f8") @ b).astype("f4")).all()
    assert profile.flops == {"bf16 mma": 2 * 16 * 8 * 16}


def test_packed_bf16_is_rounded_once(module):
    rng = np.random.default_rng(0)
    x, y, z = (bf16(rng.standard_normal(200)) for _ in range(3))
    out = raw(z)
    launch_ptx(module, "packed_fma", (1,), (128,), raw(x), raw(y), out, 100)
    want = np.maximum(bf16(x.astype("f8") * y + z), -1)
    assert (out == raw(want.astype("f4"))).all()


def test_functions_with_local_memory_and_constants(module):
    n = 70
    x = np.random.default_rng(0).standard_normal(n).astype("f4")
    y = np.zeros((3, n), "f4")
    launch_ptx(module, "functions", (3,), (32,), x, y, n, 3)
    v, i = x.astype("f8"), np.arange(n)
    angle = (x * np.float32(1e5)).astype("f8")
    want = [
        np.sin(angle) + v * ((i + 3) & 7) * np.array([0.5, 1, 1.5, 2])[i & 3],
        np.exp(v) + np.log(abs(v)) + abs(v) ** 1.5,
        np.tanh(v) + v / 3 + np.sqrt(abs(v)) + 1 / np.sqrt(abs(v)) + np.vectorize(math.erf)(v),
    ]
    assert np.abs(y - want).max() < 4e-6


def test_votes_and_bits(module):
    x = np.random.default_rng(0).integers(-99, 99, 64).astype("i4")
    y = np.zeros((5, 64), "u4")
    launch_ptx(module, "votes", (1,), (64,), x, y)
    for warp in range(2):
        v = x[32 * warp : 32 * warp + 32]
        got, weight = y[:, 32 * warp : 32 * warp + 32], 1 << np.arange(32, dtype=np.uint64)
        assert (got[0] == (weight * (v > 0)).sum()).all()
        assert (got[1] == ((v > 90).any() | (v > -90).all() << 1)).all()
        assert (got[2] == [(weight * (v & 3 == k & 3)).sum() for k in v]).all()
        assert (got[3] == [bits(int(k) & 0xFFFFFFFF) ^ int(v.sum()) & 0xFFFFFFFF for k in v]).all()
        assert (got[4] == [dot_and_shift(int(k)) for k in v]).all()


def bits(u: int) -> int:
    both = (u | (~u & 0xFFFFFFFF) << 32).to_bytes(8, "little")
    permuted = int.from_bytes([both[k] for k in (1, 6, 4, 2)], "little")
    return u.bit_count() ^ 32 - u.bit_length() ^ int(f"{u:032b}"[::-1], 2) ^ permuted


def dot_and_shift(k: int) -> int:
    a, b = (np.array([n], "i8").astype("i4").view("i1").astype(int) for n in (k, k * 77))
    u = k & 0xFFFFFFFF
    shifted = (~u & 0xFFFFFFFF) << 9 | u >> 23
    return int((a * b).sum() + 5) & 0xFFFFFFFF ^ shifted & 0xFFFFFFFF ^ u * 12345 >> 32


def test_printf_warns_and_trap_is_found(module):
    x = np.ones(100, "f4")
    launch_ptx(module, "check", (1,), (128,), x, 100)
    x[77] = np.nan
    with pytest.warns(UserWarning, match="printf"), pytest.raises(Fault, match="trap: the kernel trapped"):
        launch_ptx(module, "check", (1,), (128,), x, 100)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_tiles_through_tensor_maps(copies, seed):
    x, y = np.random.default_rng(0).standard_normal((40, 72)).astype("f4"), np.zeros((40, 72), "f4")
    maps = [TensorMap(array_buffer(name, a), (70, 40), (288,), (32, 16), 7) for name, a in (("from", x), ("to", y))]
    profile = launch_ptx(copies, "double_tiles", (3, 3), (128,), *maps, seed=seed)
    assert (y[:, :70] == 2 * x[:, :70]).all() and (y[:, 70:] == 0).all()
    assert profile.loads("from").bytes == profile.stores("to").bytes == 40 * 70 * 4


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_copies_of_threads_that_an_mbarrier_awaits(copies, seed):
    x, y = np.arange(96, dtype="f4"), np.zeros(96, "f4")
    launch_ptx(copies, "reverse", (1,), (96,), x, y, shared=384, seed=seed)
    assert (y == x[::-1]).all()
    with pytest.raises(Fault, match="asynchronous copy"):
        text = re.sub(r"cp.async.mbarrier[^;]*;", "", copies)
        launch_ptx(text, "reverse", (1,), (96,), x, y, shared=384, seed=seed)


def test_it_needs_numpy_alone():
    text = "import sys, ptxemu; assert not {'torch', 'triton', 'moe_lora', 'octavius'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_clusters_are_refused():
    from ptxemu import Unknown

    head, _, rest = (DATA / "kernels.ptx").read_text().partition(".entry votes(")
    params, _, body = rest.partition("{")
    with pytest.raises(Unknown, match="clusters of blocks"):
        text = f"{head}.entry votes({params}.explicitcluster .reqnctapercluster 2, 1, 1 {{{body}"
        launch_ptx(text, "votes", (2,), (32,), np.zeros(32, "i4"), np.zeros((5, 32), "u4"))


def test_unknown_instruction_is_named():
    from ptxemu import Unknown

    text = (DATA / "kernels.ptx").read_text().replace("popc.b32", "frobnicate.b32")
    with pytest.raises(Unknown, match=r"unknown instruction, line \d+: frobnicate.b32"):
        launch_ptx(text, "votes", (1,), (32,), np.zeros(32, "i4"), np.zeros((5, 32), "u4"))
