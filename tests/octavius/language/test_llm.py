"""The LM's logits at chosen positions are its own, or the LM is refused."""

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from octavius.language.llm import answer_logits, check_logits

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_answer_logits_are_the_models_own():
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    check_logits(llm)
    ids = torch.randint(0, 61, (3, 7))
    with torch.no_grad():
        hidden = llm.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(answer_logits(llm, hidden[1, 2:5]), llm(input_ids=ids).logits[1, 2:5])


def test_other_logits_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="GraniteForCausalLM computes others"):
        check_logits(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval())
