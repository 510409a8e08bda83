"""The mask: the documented function bit for bit, and good as randomness."""

import pytest
import torch
from moe_lora import dropout

WORD = 0xFFFFFFFF


def mix(z):
    z &= WORD
    z ^= z >> 16
    z = z * 0x7FEB352D & WORD
    z ^= z >> 15
    z = z * 0x846CA68B & WORD
    return z ^ z >> 16


def word(seed, j):
    """The definition in the module's docstring, with Python's integers."""
    low, high = seed & WORD, seed >> 32 & WORD
    a = low ^ mix(high + 0x9E3779B9)
    b = high ^ mix(a + 0x85EBCA6B)
    a ^= mix(b + 0xC2B2AE35)
    b ^= mix((j >> 32) + 0x27D4EB2F)
    z = ((j & WORD) + a) & WORD
    z ^= z >> 16
    z = z * 0x7FEB352D & WORD
    z ^= z >> 15
    z = (z + b) & WORD
    z = z * 0x846CA68B & WORD
    return z ^ z >> 16


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 5, 2**33 + 2**32 - 2], ids=str)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789123456789], ids=str)
def test_words_are_the_documented_function(seed, first):
    words = dropout._random_words(seed, 9, torch.device("cpu"), first)
    assert [int(w) & WORD for w in words] == [word(seed, first + i) for i in range(9)]


def test_words_do_not_depend_on_the_block(monkeypatch):
    want = dropout._random_words(7, 1000, torch.device("cpu"))
    monkeypatch.setattr(dropout, "_CPU_BLOCK", 64)
    assert torch.equal(dropout._random_words(7, 1000, torch.device("cpu")), want)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 8), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mask_takes_halves_of_words(shape, dtype):
    keep = dropout.keep_mask(torch.tensor(11), torch.empty(shape, dtype=dtype), 0.4)
    limit = dropout.threshold(0.4)

    def kept(c):
        half = word(11, c >> 1) >> 16 * (c & 1) & 0xFFFF
        return (half ^ 0x8000) >= limit  # as signed: half - 65536·(half >= 32768) >= limit - 32768

    assert keep.dtype == dtype and keep.shape == shape
    assert keep.flatten().tolist() == [float(kept(c)) for c in range(shape[0] * shape[1])]


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999999], ids=str)
def test_mask_drops_its_share_and_scale_makes_up_for_it(p):
    x = torch.empty(2000, 500)
    kept = dropout.keep_mask(torch.tensor(3), x, p).mean().item()
    share = 1 - dropout.threshold(p) / 65536
    assert abs(share - (1 - p)) <= 2**-16
    assert abs(kept - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5
    assert dropout.keep_scale(p) == pytest.approx(1 / share)
    assert dropout.keep_scale(0.0) == 1.0


@pytest.mark.parametrize("dims", [0, 1], ids=["rows", "columns"])
def test_mask_is_even_over_rows_and_columns(dims):
    keep = dropout.keep_mask(torch.tensor(5), torch.empty(1024, 1024), 0.25)
    means = keep.mean(dims)
    z = (means - 0.75) / (0.75 * 0.25 / 1024) ** 0.5
    assert abs(z.std().item() - 1) < 0.12 and z.abs().max() < 5


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 512, 1024, 65536], ids=str)
def test_mask_has_no_memory(lag):
    keep = dropout.keep_mask(torch.tensor(9), torch.empty(1024, 1024), 0.5).flatten() - 0.5
    correlation = (keep[lag:] * keep[:-lag]).mean().item() * 4
    assert abs(correlation) < 5 / (keep.numel() - lag) ** 0.5


@pytest.mark.parametrize("other", [1, 2**32, 2**62, -(2**63), -1], ids=str)
def test_mask_of_another_seed_is_another(other):
    x = torch.empty(1024, 512)
    one, two = (dropout.keep_mask(torch.tensor(seed), x, 0.5) - 0.5 for seed in (0, other))
    assert abs((one * two).mean().item() * 4) < 5 / x.numel() ** 0.5


def test_seed_none_follows_the_default_generator():
    torch.manual_seed(4)
    first, second = dropout.as_seed(None), dropout.as_seed(None)
    torch.manual_seed(4)
    assert first != second and dropout.as_seed(None) == first


def test_seed_number_and_tensor_are_the_same():
    assert dropout.as_seed(-5) == dropout.as_seed(torch.tensor(-5)) == -5
    with pytest.raises(ValueError, match=r"seed must be a 0-dim int64 tensor, got \(1,\)"):
        dropout.as_seed(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed must be a 0-dim int64 tensor"):
        dropout.as_seed(torch.tensor(1.0))
