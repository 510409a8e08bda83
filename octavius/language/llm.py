"""The causal LM: loading it, and its logits where answers are."""

import os
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_flash_attn_2_available

from octavius.assets import registry
from octavius.config import ModelConfig
from octavius.language.attention import NAME as GROUPED


def load_llm(config: ModelConfig) -> tuple[Any, Any]:
    """The causal LM and its tokenizer, in the configured dtype and with the attention that suits the machine."""
    source = str(registry.need(config.llm)) if config.llm in registry.ASSETS else config.llm
    attention = config.attn_implementation
    if attention is None and torch.cuda.is_available():
        attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    elif attention is None:
        attention = GROUPED
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True, highlight=False).print(f"attention: {attention} on {where}")
    dtype = getattr(torch, config.dtype)
    layers = {} if config.llm_layers is None else {"num_hidden_layers": config.llm_layers}
    llm: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention, **layers)
    # Of a batch's last positions, a strided view, matmul would copy the vocabulary's weights once per row.
    llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return llm, AutoTokenizer.from_pretrained(source)


def answer_logits(llm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Last hidden states [n, D] of some positions → float32 logits [n, vocab], with what some families do to them.

    The LM's own forward would compute them at every position of the batch, or at the same ones in all rows.
    """
    logits = llm.get_output_embeddings()(hidden).float()
    if cap := getattr(llm.config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    if scale := getattr(llm.config, "logit_scale", None):  # Cohere
        logits = logits * scale
    return logits


@torch.no_grad()
def check_logits(llm: Any) -> None:
    """Raise ValueError unless `answer_logits` gives what the LM itself gives."""
    ids = torch.arange(2, device=llm.get_input_embeddings().weight.device)[None]
    hidden = llm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    own, ours = llm(input_ids=ids, use_cache=False).logits.float(), answer_logits(llm, hidden)
    if not torch.allclose(own, ours, rtol=0.02, atol=0.02 * own.abs().max().item()):
        raise ValueError(
            f"llm must be a causal LM whose logits are its output layer's, capped or scaled as in Gemma or Cohere; "
            f"{type(llm).__name__} computes others (largest difference {(own - ours).abs().max():.3g})"
        )
