"""Counters equal what is computed by hand."""

from pathlib import Path

import numpy as np
from ptxemu import launch_ptx

MODULE = (Path(__file__).parent / "data/kernels.ptx").read_text()
COPY = """.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(.param .u64 x, .param .u64 y, .param .u32 stride) {
  .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<5>;
  ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; ld.param.u32 %r1, [stride];
  mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;
  mad.lo.s32 %r5, %r2, %r3, %r4; mul.lo.s32 %r6, %r5, %r1;
  mul.wide.s32 %rd3, %r6, WIDTH; mul.wide.s32 %rd4, %r5, WIDTH; add.s64 %rd5, %rd1, %rd3; add.s64 %rd6, %rd2, %rd4;
  ld.global.TYPE [%rd5];
  st.global.TYPE [%rd6];
  ret;
}
"""


def copy(type: str, width: int, stride: int, start: int = 0):
    registers = "{%f1, %f2, %f3, %f4}" if width == 16 else "%f1"
    text = COPY.replace("WIDTH", str(width)).replace("ld.global.TYPE [%rd5]", f"ld.global.{type} {registers}, [%rd5]")
    text = text.replace("st.global.TYPE [%rd6]", f"st.global.{type} [%rd6], {registers}")
    x = np.arange(start + 2 * 64 * stride * width // 4, dtype="f4")
    y = np.zeros(2 * 64 * width // 4, "f4")
    return launch_ptx(text, "copy", (2,), (64,), x[start:], y, stride)


def test_copy_of_consecutive_words():
    profile = copy("f32", 4, 1)  # 4 warps of 32 words: 128 bytes are 4 sectors
    for traffic in (profile.loads("x"), profile.stores("y")):
        assert (traffic.requests, traffic.sectors, traffic.bytes) == (4, 16, 512)
        assert traffic.sectors_per_request == 4 and traffic.efficiency == 1
    assert profile.instructions == 4 * 15 and profile.executed("ld.global") == 4


def test_copy_that_starts_between_sectors():
    assert copy("f32", 4, 1, start=1).loads("x").sectors == 4 * 5


def test_copy_with_a_stride():
    profile = copy("f32", 4, 8)  # each word in a sector of its own
    assert profile.loads("x").sectors_per_request == 32 and profile.loads("x").efficiency == 1 / 8
    assert copy("f32", 4, 3).loads("x").sectors_per_request == 12


def test_copy_of_vectors():
    traffic = copy("v4.f32", 16, 1).loads("x")  # 512 bytes a request
    assert (traffic.requests, traffic.sectors_per_request, traffic.efficiency) == (4, 16, 1)


def transpose(name: str):
    n = 64
    return launch_ptx(MODULE, name, (2, 2), (32, 8), np.zeros((n, n), "f4"), np.zeros((n, n), "f4"), n)


def test_transpose_with_and_without_padding():
    requests = 4 * 8 * 4  # blocks, warps, rows of a warp
    padded, unpadded = transpose("transpose_padded"), transpose("transpose_unpadded")
    for profile in (padded, unpadded):
        assert profile.shared("write").wavefronts == requests and profile.shared("write").conflicts == 0
        assert profile.loads().sectors == profile.stores().sectors == requests * 4
        assert profile.barriers == 4 * 8
    assert padded.shared("read").wavefronts == requests and padded.shared("read").conflicts == 0
    assert unpadded.shared("read").wavefronts == 32 * requests and unpadded.shared("read").conflicts == 31 * requests
    assert (padded.shared_bytes, unpadded.shared_bytes) == (32 * 33 * 4, 32 * 32 * 4)


def test_matmul():
    import pytest

    pytest.importorskip("triton")
    from ptxemu import launch
    from ptxemu.examples import EXAMPLES

    example = next(e for e in EXAMPLES if e.name == "matmul 3 stages")  # 128³ in tiles of 64 × 64 × 32
    products = {  # of 16 x 8 x 16 in a warp; of 64 x 64 x 16 in 4 warps; of as many, started by one warp
        80: ("mma", 8 * 16 * 8),
        90: ("wgmma.mma_async", 4 * 4 * 4 * 2),  # blocks, warps, tiles of 32 in K, halves of them
        100: ("tcgen05.mma", 4 * 4 * 2),
    }
    for target, (name, count) in products.items():
        _, profile = example.run(launch, target)
        assert profile.executed(name) == count and profile.flops["bf16 mma"] == 2 * 128**3
        assert sum(profile.executed(other) for other, _ in products.values()) == count
        for name in ("a_ptr", "b_ptr"):  # each of 4 blocks reads half of a matrix, in pieces of 16 bytes a lane
            traffic = profile.loads(name)
            assert traffic.bytes == 4 * 64 * 128 * 2 and traffic.efficiency == 1 and traffic.sectors_per_request == 16
        assert profile.stores("c_ptr").bytes == 128 * 128 * 4 and profile.stores("c_ptr").efficiency == 1
        assert profile.shared().conflicts == 0


def test_report_names_tensors_and_lines():
    profile = transpose("transpose_unpadded")
    assert "param_0" in str(profile) and "3968" in str(profile)
    assert "ld.shared" in profile.hot(1)
