"""`QuantizedWeight`, and `linear` on it: as on the weight that it stands for, with the bits kept for the backward."""

import moe_lora
import pytest
import torch
from moe_lora import QuantizedWeight
from moe_lora.verify import Case, make

BACKENDS = [name for name in ("cpu", "reference") if moe_lora.backends()[name] is None]
KINDS = [(8, None), (8, 16), (4, 32), (4, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (40, 40)], ids=str)
@pytest.mark.parametrize("bits, group", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_on_a_quantized_weight_is_linear_on_what_it_stands_for(backend, bits, group, lengths, dtype):
    inputs = make(Case(lengths, 64, 33, 4, 2, 4), dtype)
    quantized = QuantizedWeight.quantize(inputs.weight, bits, group)
    results = []
    for weight in (quantized, quantized.dequantize(dtype)):
        y = moe_lora.linear(*inputs._replace(weight=weight)[:6], 0.7, 0.0, None, backend)
        results.append([y, *torch.autograd.grad(y, list(inputs.leaves().values()), inputs.dy)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("bits, group", KINDS)
def test_quantize_rounds_to_half_a_step(bits, group):
    weight = torch.randn(7, 128)
    weight[3] = 0
    quantized = QuantizedWeight.quantize(weight, bits, group)
    assert (quantized.bits, quantized.shape, quantized.group) == (bits, (7, 128), group or 128)
    step = quantized.scales.repeat_interleave(quantized.group, 1)
    assert ((quantized.dequantize(torch.float32) - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_weight_is_kept_for_the_backward_as_it_is(bits):
    inputs = make(Case((40, 40), 64, 48, 4, 2, 4), torch.float32)
    quantized, saved = QuantizedWeight.quantize(inputs.weight, bits, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        moe_lora.linear(*inputs._replace(weight=quantized)[:6])
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in saved]
    assert (tuple(quantized.data.shape), quantized.data.dtype) in shapes
    assert ((48, 64), torch.float32) not in shapes


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_from_gguf_reads_what_gguf_itself_reads(kind):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    weight = torch.randn(6, 96)
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    truth = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    read = QuantizedWeight.from_gguf(torch.from_numpy(blocks), kind, (6, 96))
    assert read.group == 32 and torch.equal(read.dequantize(torch.float32), truth)


@pytest.mark.parametrize(
    ("data", "scales", "error", "message"),
    [
        (torch.zeros(4, 8), torch.ones(4, 1), TypeError, "data must be int8"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1, dtype=torch.int8), TypeError, "scales must be floating"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 3), ValueError, "groups that divide D = 8"),
        (torch.zeros(4, 4, dtype=torch.uint8), torch.ones(3, 1), ValueError, "with F = 4"),
    ],
)
def test_quantized_weight_says_what_is_wrong(data, scales, error, message):
    with pytest.raises(error, match=message):
        QuantizedWeight(data, scales)


def test_linear_says_what_is_wrong_with_a_quantized_weight():
    inputs = make(Case((3, 3), 16, 8, 4, 2, 2), torch.float32)
    wrong = QuantizedWeight.quantize(torch.randn(8, 32))
    with pytest.raises(ValueError, match=r"weight must be \[F, D\] with D = 16 like x, got \(8, 32\)"):
        moe_lora.linear(*inputs._replace(weight=wrong)[:6])
    with pytest.raises(ValueError, match="group must divide D = 16"):
        QuantizedWeight.quantize(inputs.weight, 4, 12)
    with pytest.raises(ValueError, match="kind must be Q8_0 or Q4_0, got 'Q5_1'"):
        QuantizedWeight.from_gguf(torch.zeros(34, dtype=torch.uint8), "Q5_1", (1, 32))
