"""The Triton kernels under Triton's interpreter; `test_triton_backend.py` runs this file with TRITON_INTERPRET=1.

Not in bfloat16: the interpreter multiplies its raw bits as integers.
"""

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_lora.backend.triton import launch, tiles
from moe_lora.verify import Case, make

from tests.moe_lora.test_linear import CASES
from tests.support import groups
from tests.support.tolerance import assert_right

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"
FORM = launch.Call._form


@pytest.mark.parametrize("form", ["instance", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case((9, 9), 1, 1, 4, 2, 1)], ids=str)
def test_interpreted_matches_oracle(case, dtype, form, monkeypatch, nan_empty):
    monkeypatch.setattr(launch.Call, "_form", lambda *_: (form, "asked for"))
    assert_right(case, make(case, dtype), "triton")


@pytest.mark.parametrize("form", ["instance", "masked"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_interpreted_groups_match_oracle(number, form, monkeypatch, nan_empty):
    monkeypatch.setattr(launch.Call, "_form", lambda *_: (form, "asked for"))
    case, widths = CASES[number], ((8, 30), (17,))[number % 2]
    groups.assert_group_right(case, groups.make(case, widths, torch.float16), "triton")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_interpreted_one_launch_matches_oracle_on_random_shapes(data, dropout, monkeypatch):
    """One program that walks over all tiles: the interpreter runs programs one after the other."""
    E, packed = data.draw(st.integers(1, 7)), data.draw(st.booleans())
    K, N = data.draw(st.integers(1, min(E, 3))), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=N, max_size=N)) if packed else [70 + 50 * N] * N
    D, F, R = 8 * data.draw(st.integers(1, 12)), 8 * data.draw(st.integers(1, 40)), data.draw(st.integers(1, 32))
    experts = data.draw(st.lists(st.tuples(*[st.integers(0, E - 1)] * K), min_size=N, max_size=N))
    case, fused = Case((*lengths, 65), D, F, E, K, R, dropout, True, experts=(*experts, experts[0])), []
    device, run = tiles.Device(None, "cuda", 100, 1 << 30, 1), launch.Call.fused
    monkeypatch.setattr(launch, "device_of", lambda _: device)
    monkeypatch.setattr(launch.Call, "_form", lambda *_: ("instance", "asked for"))
    monkeypatch.setattr(launch.Call, "fused", lambda *call, **more: fused.append(1) or run(*call, **more))
    assert_right(case, make(case, torch.float16), "triton")
    monkeypatch.undo()
    assert len(fused) == (1 if dropout else 2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_interpreted_matches_oracle_on_random_shapes(data):
    E = data.draw(st.integers(1, 7))
    K, N = data.draw(st.integers(1, min(E, 3))), data.draw(st.integers(1, 5))
    packed = data.draw(st.booleans())
    rows = st.integers(0, 40)
    lengths = data.draw(st.lists(rows, min_size=N, max_size=N)) if packed else [data.draw(st.integers(1, 24))] * N
    # a gradient of one element may be the small difference of large sums: no scale to measure its error by
    D, F, R = data.draw(st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(1, 20)))
    experts = data.draw(st.lists(st.tuples(*[st.integers(0, E - 1)] * K), min_size=N, max_size=N))
    p, form = data.draw(st.sampled_from([0.0, 0.4])), data.draw(st.sampled_from(["instance", "masked"]))
    case = Case(tuple(lengths), D, F, E, K, R, p, packed, experts=tuple(experts))
    launch.Call._form = lambda *_: (form, "asked for")
    try:
        assert_right(case, make(case, torch.float32), "triton")
    finally:
        launch.Call._form = FORM
