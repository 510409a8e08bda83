"""A model that routes itself, trained by an unmodified Trainer, saved, loaded in one call: `python examples/adopt.py`.

The model is tiny and made here, so that it runs anywhere in seconds; any causal model of transformers takes its place.
"""

import tempfile

import moe_lora
import torch
from moe_lora import GateConfig, MoELoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ANSWER = 1  # the token that begins an answer


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, max_position_embeddings=64, pad_token_id=0))


def samples(count):
    """Two tasks, each with an answer of its own; the first token of the question says which task it is."""
    rows = []
    for i in range(count):
        words = torch.randint(4, 64, (5,))
        answer = torch.arange(5) + (10 if i % 2 else 30)
        ids = torch.cat([torch.tensor([2 + i % 2]), words, torch.tensor([ANSWER]), answer])
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < 7, -100, ids)})
    return rows


def main(steps=60):
    config = MoELoRAConfig(num_experts=4, top_k=2, rank=8, alpha=16, target_modules="all-linear")
    model = moe_lora.attach(base(), config, GateConfig(answer_marker=(ANSWER,)))  # 1. the gate is inside
    optimizer = torch.optim.AdamW(moe_lora.parameter_groups(model, lr=1e-2, gate_lr=1e-1))  # 2. its own rate
    moe_lora.print_trainable_parameters(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, logging_steps=10, report_to=[], use_cpu=True
        )
        trainer = Trainer(model, arguments, train_dataset=samples(512), optimizers=(optimizer, None))
        trainer.train()  # 3. nothing else changes
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        moe_lora.save(model, folder)
        loaded = moe_lora.load(base(), folder).eval()
    prompt = samples(1)[0]["input_ids"][None, :7]
    answers = [one.generate(prompt, max_new_tokens=5, do_sample=False).tolist() for one in (model.eval(), loaded)]
    print("the loaded model answers the same:", answers[0] == answers[1])
    return losses, answers


if __name__ == "__main__":
    main()
