"""No kernel moves more sectors or makes more bank conflicts than the committed table allows."""

import pytest

pytest.importorskip("triton")

import torch

from tests.support import traffic

CHANGE = "look at the difference, then `python -m tests.support.traffic`"


def assert_not_worse(found: list[traffic.Row], table: list[traffic.Row]) -> None:
    assert [row[:3] for row in found] == [row[:3] for row in table], f"other launches: {CHANGE}"
    for row, allowed in zip(found, table, strict=True):
        assert not row.worse(allowed), f"{row} is worse than {allowed}: {CHANGE}"


def table(variant: traffic.Variant, target: str) -> list[traffic.Row]:
    return [row for row in traffic.read() if row[:2] == (target, str(variant))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, target", [(variant, target) for variant in traffic.VARIANTS for target in variant.targets], ids=str
)
def test_triton_kernels_are_not_worse_than_the_table(variant, target):
    assert_not_worse(traffic.rows(variant, target), table(variant, target))


@pytest.mark.parametrize("target", traffic.CUDA)
def test_decode_is_not_worse_than_the_table(target):
    found = [traffic.decode_row(shape, target) for shape in traffic.DECODE]
    assert_not_worse(found, [row for row in traffic.read() if row[0] == target and row[2].startswith("decode")])


def test_scattered_experts_are_worse_than_the_table(monkeypatch):
    variant, randn = traffic.VARIANTS[2], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size: randn(*size[::-1]).permute(*range(len(size))[::-1]))
    monkeypatch.setattr(traffic, "profiles", traffic.profiles.__wrapped__)
    with pytest.raises(AssertionError, match="worse"):
        assert_not_worse(traffic.rows(variant, "sm_80"), table(variant, "sm_80"))
