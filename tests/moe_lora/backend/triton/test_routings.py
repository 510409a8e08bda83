"""The Triton kernels, compiled and executed by the emulator, on routings that hypothesis draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lora.verify import Case, make

from tests.support.tolerance import assert_right

pytest.importorskip("triton")

from moe_lora.backend.triton import launch
from ptxemu.driver import Emulator

FORMS = (  # sizes are fixed, so that each is compiled once; tiles have 16 rows
    (80, "instance", 4, 2, torch.bfloat16),
    (90, "masked", 3, 1, torch.float16),
    (100, "masked", 3, 3, torch.bfloat16),
)


@st.composite
def routings(draw, E: int, K: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Lengths, of instances without rows and of one row too, and experts, some used twice, some by none."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=4).filter(any))
    experts = [tuple(draw(st.lists(st.integers(0, E - 1), min_size=K, max_size=K))) for _ in lengths]
    return tuple(lengths), tuple(experts)


@pytest.mark.parametrize("target, form, E, K, dtype", FORMS, ids=str)
def test_compiled_matches_oracle_on_random_routings(target, form, E, K, dtype, monkeypatch):
    monkeypatch.setattr(launch.Call, "_form", lambda *_: (form, "asked for"))
    monkeypatch.setattr(launch.Call, "_block_t", lambda _: 16)

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(routing=routings(E, K))
    def check(routing):
        lengths, experts = routing
        case = Case(lengths, 24, 40, E, K, 5, packed=True, experts=experts)
        with Emulator(target):
            assert_right(case, make(case, dtype), "triton")

    check()
