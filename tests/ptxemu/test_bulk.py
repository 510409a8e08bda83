"""Bulk copies and mbarriers as CUDA C++ writes them: plain ranges, boxes with swizzle and fill, mistakes."""

import numpy as np
import pytest
from ptxemu import Fault, launch_ptx
from ptxemu.bulk import TensorMap
from ptxemu.module import array_buffer

HEAD = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k(PARAMS) {
  .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
  .shared .align 128 .b8 s[4096];
  .shared .align 8 .b8 bar[8];
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;  setp.eq.u32 %p1, %r1, 0;  mov.u32 %r2, s;  mov.u32 %r3, bar;
  @%p1 mbarrier.init.shared::cta.b64 [%r3], COUNT;
  bar.sync 0;
"""
PLAIN = (
    HEAD.replace("PARAMS", ".param .u64 x, .param .u64 out").replace("COUNT", "65")
    + """
  ld.param.u64 %rd1, [x];
  @!%p1 bra ARRIVE;
  mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r3], 256;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 256, [%r3];
  mbarrier.arrive.shared::cta.b64 _, [%r3];
ARRIVE:
  mbarrier.arrive.release.cta.shared::cta.b64 %rd3, [%r3];
WAIT:
  mbarrier.test_wait.shared::cta.b64 %p2, [%r3], %rd3;
  @!%p2 bra WAIT;
  shl.b32 %r4, %r1, 2;  add.s32 %r4, %r4, %r2;
  ld.shared.b32 %r5, [%r4];  add.u32 %r5, %r5, 1;
  st.shared.b32 [%r4], %r5;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  @!%p1 bra END;
  cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 256;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group.read 0;
END:
  bar.sync 0;
  st.shared.b32 [%r4], 0;
  ret;
}
"""
)
BOX = (
    HEAD.replace("PARAMS", ".param .align 64 .b8 map[128], .param .u64 out, .param .s32 i, .param .s32 j")
    + """
  mov.b64 %rd4, map;  cvta.param.u64 %rd1, %rd4;
  ld.param.u32 %r7, [i];  ld.param.u32 %r8, [j];
  @!%p1 bra WAIT;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;
  cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd1, {%r8, %r7}], [%r3];
WAIT:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;
  @!%p2 bra WAIT;
  mul.lo.u32 %r4, %r1, 16;  mul.wide.u32 %rd5, %r1, 16;  add.s64 %rd2, %rd2, %rd5;  add.s32 %r4, %r4, %r2;
  ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
  st.global.v4.b32 [%rd2], {%r10, %r11, %r12, %r13};
  ret;
}
"""
)
BY_LANES = (
    HEAD.replace("PARAMS", ".param .u64 x, .param .u64 out").replace("COUNT", "64")
    + """
  ld.param.u64 %rd1, [x];
  mul.wide.u32 %rd4, %r1, 4;  add.s64 %rd1, %rd1, %rd4;  add.s64 %rd2, %rd2, %rd4;
  shl.b32 %r4, %r1, 2;  add.s32 %r5, %r4, %r2;
  cp.async.ca.shared.global [%r5], [%rd1], 4;
  cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3];
WAIT:
  mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r3], 0;
  @!%p2 bra WAIT;
  xor.b32 %r6, %r4, 128;  add.s32 %r6, %r6, %r2;
  ld.shared.b32 %r7, [%r6];
  st.global.b32 [%rd2], %r7;
  ret;
}
"""
)
SEEDS = (None, *range(20))


def run(text: str = PLAIN, seed: int | None = None) -> np.ndarray:
    out = np.zeros(64, "u4")
    launch_ptx(text, "k", (1,), (64,), np.arange(64, dtype="u4"), out, seed=seed)
    return out


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_plain_copy_in_and_out(seed):
    assert (run(PLAIN, seed) == np.arange(64) + 1).all()
    assert (run(BY_LANES, seed) == np.arange(64) ^ 32).all()  # what the other warp copied


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("corner", [(0, 0), (4, 16), (16, 64), (-3, -2)])
def test_box_is_swizzled_and_filled(swizzle, corner):
    """Rows of `inner` floats; the 16-byte pieces of a row move by exclusive or with the number of its 128-byte line."""
    x = np.random.default_rng(0).standard_normal((20, 72)).astype("f4")
    inner = {0: 16, 1: 8, 2: 16, 3: 32}[swizzle]
    box, out = (inner, 256 // inner), np.zeros((16, 16), "f4")
    tensor = TensorMap(array_buffer("x", x), (70, 20), (288,), box, 7, swizzle, fill=1)  # two columns are padding
    profile = launch_ptx(BOX.replace("COUNT", "1"), "k", (1,), (64,), tensor, out, *corner, seed=0)
    i, j = corner[0] + np.arange(box[1])[:, None], corner[1] + np.arange(inner)
    inside = (i >= 0) & (i < 20) & (j >= 0) & (j < 70)
    want = np.where(inside, x[np.clip(i, 0, 19), np.clip(j, 0, 69)], np.nan).reshape(64, 4)
    place = np.arange(64)
    place ^= place >> 3 & (0, 1, 3, 7)[swizzle]
    assert np.array_equal(out.reshape(64, 4)[place], want, equal_nan=True)
    assert profile.loads("x").bytes == 4 * inside.sum()


TEST = "mbarrier.test_wait.shared::cta.b64 %p2, [%r3], %rd3"
TRY = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0"
NOINC = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3];"
COPY = "cp.async.ca.shared.global [%r5], [%rd1], 4;"
PARITY = "mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r3], 0;"
FAULTS = {  # kind, kernel, what is replaced
    "no fence of the proxy": ("race", PLAIN, "fence.proxy.async.shared::cta;", ""),
    "no wait before the reuse": ("race", PLAIN, "cp.async.bulk.wait_group.read 0;", ""),
    "no wait": ("asynchronous copy", PLAIN, f"{TEST};\n  @!%p2 bra WAIT;", "bar.sync 0;"),
    "an arrival too few, asked for": ("deadlock", PLAIN, "[%r3], 65", "[%r3], 66"),
    "an arrival too few": ("deadlock", PLAIN.replace(TEST, TRY), "[%r3], 65", "[%r3], 66"),
    "misaligned": ("misaligned", PLAIN, "[%r2], [%rd1], 256", "[%r2+8], [%rd1], 256"),
    "too long": ("out of bounds", PLAIN, "[%rd1], 256", "[%rd1], 272"),
    "no wait for lanes": ("asynchronous copy", BY_LANES, f"{PARITY}\n  @!%p2 bra WAIT;", "bar.sync 0;"),
    "arrival before the copy": ("asynchronous copy", BY_LANES, f"{COPY}\n  {NOINC}", f"{NOINC} {COPY} bar.sync 0;"),
    "arrivals that do not count": ("deadlock", BY_LANES, ".noinc", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_mistake_is_found_in_20_of_20_orders(name):
    kind, text, old, new = FAULTS[name]
    assert old in text
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            run(text.replace(old, new), seed)
        assert caught.value.kind == kind, (seed, caught.value)
