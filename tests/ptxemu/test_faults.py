"""Planted mistakes are found, whatever the order of the warps, and named."""

import re

import numpy as np
import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from ptxemu import Fault, launch, launch_ptx  # noqa: E402
from ptxemu.examples import EXAMPLES  # noqa: E402

SEEDS = (None, *range(20))
EXAMPLE = {example.name: example for example in EXAMPLES}


def without(pattern: str, number: int):
    """Cut one statement out of a PTX text."""

    def rewrite(text: str) -> str:
        found = list(re.finditer(rf"^\s*{pattern}[^;]*;", text, re.M))[number]
        return text[: found.start()] + text[found.end() :]

    return rewrite


def instead(old: str, new: str):
    def rewrite(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return rewrite


def patterns(old: str, new: str):
    """Replace every match of a pattern."""

    def rewrite(text: str) -> str:
        assert re.search(old, text), old
        return re.sub(old, new, text)

    return rewrite


def in_example(name: str, target: int, rewrite):
    return lambda seed: EXAMPLE[name].run(launch, target, emulator={"rewrite": rewrite, "seed": seed})


FEW = instead("cp.async.wait_group \t2", "cp.async.wait_group 4")
LATE = instead("cp.async.wait_group \t2;\n\tbar.sync \t0;", "bar.sync 0; cp.async.wait_group 2;")
UNAWAITED = patterns(r"mbarrier.try_wait[^;]*;", "setp.eq.u32 complete, 0, 0;")
STALE = patterns(r"(?s)mbarrier.try_wait[^;]*;(?!.*mbarrier.try_wait)", "setp.eq.u32 complete, 0, 0;")  # the last one
REWRITES = {  # what is planted in the code of which example and target: the kind of fault
    ("softmax", 80, "no barrier before the last read", without("bar.sync", 1)): "race",
    ("softmax", 80, "no barrier before the next write", without("bar.sync", 2)): "race",
    ("softmax", 80, "no store to shared memory", without(r"@%p\d+ st.shared", 0)): "uninitialised",
    ("transpose f32", 80, "no barrier", without("bar.sync", 0)): "race",
    ("matmul fp16 stages", 80, "no barrier after the wait", without("bar.sync", 1)): "race",
    ("matmul fp16 stages", 80, "no barrier before the refill", without("bar.sync", 2)): "race",
    ("matmul fp16 stages", 80, "no wait", without("cp.async.wait_group", 0)): "asynchronous copy",
    ("matmul fp16 stages", 80, "a wait for too few", FEW): "asynchronous copy",
    ("matmul fp16 stages", 80, "a wait after the barrier", LATE): "race",
    ("matmul fp16 stages", 90, "no barrier after the wait", without("bar.sync", 1)): "race",
    ("matmul fp16 stages", 90, "no barrier before the refill", without("bar.sync", 2)): "race",
    ("matmul fp16 stages", 90, "no wait for the copy", without("cp.async.wait_group", 0)): "asynchronous copy",
    ("matmul fp16 stages", 90, "no wait for wgmma", without("wgmma.wait_group", 0)): "race",
    ("matmul fp16 stages", 90, "no fence of the proxy", without("fence.proxy.async", 0)): "race",
    ("descriptor matmul", 90, "no wait on the mbarrier", UNAWAITED): "asynchronous copy",
    ("descriptor matmul", 90, "too few bytes expected", patterns(" 8192;", " 4096;")): "asynchronous copy",
    ("descriptor matmul", 90, "too many bytes expected", patterns(" 8192;", " 8208;")): "deadlock",
    ("descriptor matmul bf16", 90, "no barrier before the refill", without("bar.sync", 6)): "race",
    ("descriptor in kernel", 90, "no barrier after the mbarrier begins", without("bar.sync", 4)): "race",
    ("descriptor in kernel", 90, "no fence of the proxy", without("fence.proxy.async.shared", 1)): "race",
    ("matmul fp16 stages", 100, "no wait for the copy", without("cp.async.wait_group", 0)): "asynchronous copy",
    ("matmul fp16 stages", 100, "no wait for the store", without("tcgen05.wait::st", 0)): "asynchronous copy",
    ("matmul fp16 stages", 100, "no wait for the load", without("tcgen05.wait::ld", 0)): "race",
    ("matmul fp16 stages", 100, "no fence of the proxy", without("fence.proxy.async", 0)): "race",
    ("matmul fp16 stages", 100, "no barrier before the product", without("bar.sync", 7)): "race",
    ("matmul fp16 stages", 100, "no wait before the refill", UNAWAITED): "race",
    ("matmul fp16 stages", 100, "no wait for the last product", STALE): "race",
    ("matmul fp16 stages", 100, "no commit", without(r"@%p\d+ tcgen05.commit", 0)): "deadlock",
    ("matmul fp16 stages", 100, "too few columns", patterns(r"(tcgen05.alloc[^;]*), 64;", r"\1, 32;")): "out of bounds",
    ("matmul fp16 stages", 100, "no deallocation", without(r"@%p\d+ tcgen05.dealloc", 0)): "operand",
    ("attention causal", 100, "no store to tensor memory", without(r"@%p\d+ tcgen05.st", 0)): "uninitialised",
}  # fmt: skip
CLEAN = sorted({(name, target) for name, target, _, _ in REWRITES})


@pytest.mark.parametrize("planted", REWRITES, ids=[f"{name} sm_{target}: {what}" for name, target, what, _ in REWRITES])
def test_fault_planted_in_triton_code_is_found_in_20_of_20_orders(planted):
    name, target, what, rewrite = planted
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            in_example(name, target, rewrite)(seed)
        assert caught.value.kind == REWRITES[planted], caught.value
        if what != "no deallocation":  # found as the block ends
            place = r"line \d+: .*\((descriptors|elementwise|matmul|rows|standard)\.py:\d+\)"
            assert re.search(place, str(caught.value)), caught.value


@pytest.mark.parametrize("name, target", CLEAN, ids=[f"{name} sm_{target}" for name, target in CLEAN])
def test_the_same_kernel_without_fault_is_accused_in_0_of_20_orders(name, target):
    for seed in SEEDS:
        errors, _ = EXAMPLE[name].run(launch, target, emulator={"seed": seed})
        assert max(errors.values()) <= EXAMPLE[name].tolerance


@triton.jit
def copy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    i = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def add_to_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(out_ptr + i) + tl.load(x_ptr + i))


@triton.jit
def pass_on_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + (tl.program_id(0) + 1) * BLOCK + i, tl.load(x_ptr + tl.program_id(0) * BLOCK + i))


def copied(n: int, grid: int, constants: dict):
    def run(seed):
        x, out = torch.zeros(n), torch.zeros(n)
        launch(copy_kernel, (grid,), x, out, emulator={"seed": seed}, **constants)

    return run


def accumulated(seed):
    x, out = torch.zeros(128), torch.empty(128)
    launch(add_to_kernel, (1,), x, out, BLOCK=128, emulator={"seed": seed, "uninitialised": [out]})


def passed_on(seed):
    launch(pass_on_kernel, (2,), torch.zeros(3 * 64), BLOCK=64, emulator={"seed": seed})


def split_k(seed):
    EXAMPLE["matmul split k"].run(launch, 80, emulator={"seed": seed, "schedules": 3})


KERNELS = {  # name: kind, what the message says, what runs
    "read past the end": (
        "out of bounds",
        "after the end of x_ptr",
        copied(250, 1, {"BLOCK": 256, "STRIDE": 256}),
    ),
    "overlapping blocks": (
        "blocks",
        "two blocks write one address",
        copied(384, 2, {"BLOCK": 256, "STRIDE": 128}),
    ),
    "block reads what another writes": ("blocks", "in x_ptr", passed_on),
    "uninitialised output": ("uninitialised", "out_ptr is read", accumulated),
    "float atomics": ("schedule", "c_ptr", split_k),
}


@pytest.mark.parametrize("name", KERNELS)
def test_faulty_kernel_is_found_in_20_of_20_orders(name):
    kind, text, run = KERNELS[name]
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            run(seed)
        assert caught.value.kind == kind and text in str(caught.value), caught.value


MODULE = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out) {
  .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
  .shared .align 16 .b8 s[1024];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;  and.b32 %r2, %r1, 31;  mul.wide.u32 %rd2, %r1, 4;  add.s64 %rd3, %rd1, %rd2;
  setp.lt.u32 %p1, %r2, 16;  setp.lt.u32 %p2, %r1, 32;  setp.eq.u32 %p3, %r1, 77;
  mov.u32 %r3, s;  shl.b32 %r4, %r1, 2;  add.s32 %r5, %r3, %r4;
  BODY
  st.global.b32 [%rd3], %r6;
  ret;
}
"""
OTHER = "xor.b32 %r7, %r4, 128; add.s32 %r7, %r7, %r3; ld.shared.b32 %r6, [%r7];"  # of the next warp
FILL = "mov.b32 %r6, 0; st.shared.b32 [%r5], %r6; bar.sync 0;"
STATEMENTS = {
    "clean": (None, "st.shared.b32 [%r5], %r1; bar.sync 0;" + OTHER),
    "clean shuffle of half a warp": (None, "mov.b32 %r6, 0; @%p1 shfl.sync.bfly.b32 %r6, %r1, 8, 31, 0xffff;"),
    "clean branches that meet": (None, "@%p1 bra A; mov.b32 %r6, 1; bra B; A: mov.b32 %r6, 2; B: bar.sync 0;"),
    "clean barrier of two warps": (None, "mov.b32 %r6, 0; @%p2 bra A; bar.sync 1, 96; A: bar.sync 0;"),
    "barrier in half a warp": ("barrier", "mov.b32 %r6, 0; @%p1 bar.sync 0;"),
    "barrier on one side of a branch": ("barrier", "mov.b32 %r6, 0; @%p1 bra A; bar.sync 0; A: "),
    "two barriers for one": ("barrier", "mov.b32 %r6, 0; @%p2 bra A; bar.sync 0; bra B; A: bar.sync 0; B: "),
    "barrier of more than there are": ("barrier", "mov.b32 %r6, 0; bar.sync 1, 256;"),
    "shuffle, full mask": ("shuffle", "mov.b32 %r6, 0; @%p1 shfl.sync.bfly.b32 %r6, %r1, 8, 31, -1; bar.sync 0;"),
    "shuffle from beyond the mask": ("shuffle", "mov.b32 %r6, 0; @%p1 shfl.sync.bfly.b32 %r6, %r1, 16, 31, 0xffff;"),
    "shared memory that nobody wrote": ("uninitialised", "ld.shared.b32 %r6, [%r5];"),
    "shared memory past the end": ("out of bounds", "mov.b32 %r6, 0; st.shared.b32 [%r5+700], %r6;"),
    "shared memory misaligned": ("misaligned", "mov.b32 %r6, 0; st.shared.b32 [%r5+2], %r6;"),
    "neighbour read without barrier": ("race", FILL + "st.shared.b32 [%r5], %r1;" + OTHER),
    "two warps write one word": ("race", "mov.b32 %r6, 0; st.shared.b32 [%r3], %r1;"),
    "atomic beside a store": ("race", FILL + "st.shared.b32 [%r5], %r1; red.shared.add.u32 [%r3], 1;"),
    "trap": ("trap", "mov.b32 %r6, 0; @!%p3 bra A; trap; A: "),
    "global memory misaligned": ("misaligned", "mov.b32 %r6, 0; add.s64 %rd3, %rd3, 2;"),
    "store without address": ("out of bounds", "mov.b32 %r6, 0; mov.b64 %rd3, 0;"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATEMENTS)
def test_fault_in_written_ptx_is_found_in_20_of_20_orders(name):
    kind, body = STATEMENTS[name]
    for seed in SEEDS:
        out = np.zeros(128, np.uint32)
        if kind is None:
            launch_ptx(MODULE.replace("BODY", body), "k", (1,), (128,), out, seed=seed)
            continue
        with pytest.raises(Fault) as caught:
            launch_ptx(MODULE.replace("BODY", body), "k", (1,), (128,), out, seed=seed)
        assert caught.value.kind == kind, caught.value


def test_clean_kernels_give_the_same_bytes_in_every_schedule():
    for name in ("softmax", "matmul fp16 stages", "attention", "sort", "atomics"):
        EXAMPLE[name].run(launch, 80, emulator={"schedules": 4})


def test_autotuning_is_refused():
    configs = [triton.Config({"BLOCK": n}) for n in (64, 128)]
    tuned = triton.autotune(configs, key=[])(EXAMPLE["scan"].kernel)
    with pytest.raises(RuntimeError, match="no clock"):
        launch(tuned, (1,), torch.zeros(128), torch.zeros(128))
