"""Grouped attention is the model's own attention, in training and in generation, or refuses."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavius.language.attention import grouped_attention

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def pair(heads):
    """The same model with eager and with grouped attention."""
    torch.manual_seed(0)
    models = [
        LlamaForCausalLM._from_config(LlamaConfig(**SIZES, num_key_value_heads=heads), attn_implementation=name)
        for name in ("eager", "grouped")
    ]
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("left", [False, True])
def test_logits_and_gradients_are_eagers(heads, left):
    ids = torch.randint(0, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, : 4 if left else 9] = 0 if left else 1
    mask[1, 6:] = 1 if left else 0
    found = []
    for model in pair(heads):
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_eagers(beams):
    ids = torch.randint(1, 61, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    eager, grouped = (
        model.eval().generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=beams, pad_token_id=0
        )
        for model in pair(2)
    )
    assert torch.equal(eager, grouped)


def test_dropout_only_in_training():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    module = torch.nn.Module()
    _, dropped = grouped_attention(module.train(), q, k, k, None, 0.3, dropout=0.5)
    _, kept = grouped_attention(module.eval(), q, k, k, None, 0.3, dropout=0.5)
    assert 0.2 < (dropped == 0).float().mean() < 0.8 and (kept > 0).all()


def test_another_familys_term_is_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="must get no softcap: use eager"):
        grouped_attention(torch.nn.Module(), q, q, q, None, 0.5, softcap=30.0)
