"""Unmodified trainers on unmodified models: three lines to adopt, the loss falls, prompts route as in generation."""

import moe_lora
import pytest
import torch
from moe_lora import GateConfig, MoELoRAConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl==1.16.*)")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pytestmark = pytest.mark.slow

WORDS = ["<pad>", "<eos>", "<answer>", *(f"w{i}" for i in range(37))]
MARK = 2
CONFIG = MoELoRAConfig(4, 2, 4, 8, dropout=0.0, target_modules="all-linear")
MARKED = GateConfig(answer_marker=(MARK,), lr=0.05)
STEPS = 20


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def bare():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), **sizes, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    return LlamaForCausalLM(config)


def llama(gate=MARKED):
    return watched(moe_lora.attach(bare(), CONFIG, gate))


def watched(model):
    """Notes the gates of every call of the gate."""
    seen = []
    model.moe_lora_gate.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model.__dict__["seen"] = seen
    nn.init.normal_(model.moe_lora_gate.w_gating, std=3)
    return model


def texts(count=64):
    """Questions of two tasks that differ in length, and their answers."""
    rows = []
    for i in range(count):
        task, length = i % 2, 2 + i % 5
        question = " ".join([f"w{task}", *(f"w{4 + (i * 7 + j * 3) % 30}" for j in range(length))])
        rows.append({"prompt": f"{question} <answer>", "completion": f" w{2 + task} w{2 + task} w{30 + task}"})
    return rows


def optimizer(model, lr=2e-2):
    return torch.optim.AdamW(moe_lora.parameter_groups(model, lr)), None


def arguments(kind, folder, **how):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
    }
    return kind(str(folder), **defaults | {"save_strategy": "no", "disable_tqdm": True, "bf16": False} | how)


def assert_learns(trainer, model, key="loss"):
    gate, experts = model.moe_lora_gate.w_gating.detach().clone(), copies(model)
    trainer.train()
    losses = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < sum(losses[:5]) * 0.95, losses
    assert not torch.equal(gate, model.moe_lora_gate.w_gating)
    assert any(not torch.equal(before, after) for before, after in zip(experts, copies(model), strict=True))
    return losses


def copies(model):
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith("lora_b")]


def assert_routed_as_prompts(model, prompts, tokenizer, calls):
    """Each routing that a trainer made is the one of a prompt alone."""
    with torch.no_grad():
        alone = []
        for prompt in prompts:
            ids = tokenizer(prompt.removesuffix(" <answer>"), return_tensors="pt").input_ids
            alone.append(model.moe_lora_gate(model.get_input_embeddings()(ids))[1][0])
    known = torch.stack(alone)
    for routed in calls:
        for gates in routed:
            assert (known - gates.detach()).abs().amax(1).min() < 1e-6


def tokenized(tokenizer):
    rows = []
    for text in texts():
        question, answer = tokenizer(text["prompt"]).input_ids, tokenizer(text["completion"]).input_ids
        ids = torch.tensor(question + answer + [1])
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < len(question), -100, ids)})
    return rows


def padded(rows):
    def pad(name, value):
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": pad("labels", -100)}


def test_trainer_trains_checkpoints_and_resumes(tokenizer, tmp_path):
    model = llama()
    data = tokenized(tokenizer)
    how = arguments(TrainingArguments, tmp_path, save_strategy="steps", save_steps=10)
    losses = assert_learns(Trainer(model, how, padded, data, optimizers=optimizer(model)), model)
    checkpoint = tmp_path / "checkpoint-10"
    base = sum(parameter.numel() for parameter in model.parameters())
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 4 * base
    other = llama()
    again = Trainer(other, how, padded, data, optimizers=optimizer(other))
    again.train(resume_from_checkpoint=str(checkpoint))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed[-5:] == pytest.approx(losses[-5:], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(copies(model), copies(other), strict=True))


def test_trainer_routes_prompts(tokenizer, tmp_path):
    model = llama()
    gate = model.moe_lora_gate.w_gating.detach().clone()
    frozen = torch.optim.SGD(moe_lora.parameter_groups(model, 0.0, gate_lr=0.0))
    Trainer(
        model,
        arguments(TrainingArguments, tmp_path, max_steps=3),
        padded,
        tokenized(tokenizer),
        optimizers=(frozen, None),
    ).train()
    assert len(model.seen) == 3 and torch.equal(gate, model.moe_lora_gate.w_gating)
    calls = list(model.seen)
    assert_routed_as_prompts(model, [text["prompt"] for text in texts()], tokenizer, calls)


def test_seq2seq_trainer_trains_and_predicts_with_generate(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = watched(moe_lora.attach(T5ForConditionalGeneration(config), CONFIG, GateConfig(lr=0.05)))
    rows = [
        {
            "input_ids": torch.tensor(tokenizer(text["prompt"]).input_ids),
            "labels": torch.tensor([*tokenizer(text["completion"]).input_ids, 1]),
        }
        for text in texts()
    ]
    how = arguments(Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True, generation_max_length=5)
    trainer = Seq2SeqTrainer(model, how, padded, rows, rows[:8], optimizers=optimizer(model))
    assert_learns(trainer, model)
    predicted = trainer.predict(rows[:8]).predictions
    assert predicted.shape[0] == 8 and predicted.max() < 40


SFT = (
    ("plain", {}, False),
    ("packed", {"packing": True, "max_length": 32}, False),
    ("completion-only", {"completion_only_loss": True}, True),
    ("padding-free", {"padding_free": True, "max_length": None}, False),
)


@pytest.mark.parametrize("how, prompts", [case[1:] for case in SFT], ids=[case[0] for case in SFT])
@pytest.mark.parametrize("trains", [True, False], ids=["learns", "routes"])
def test_sft_trainer(tokenizer, tmp_path, how, prompts, trains):
    model = llama()
    rows = texts() if prompts else [{"text": text["prompt"] + text["completion"]} for text in texts()]
    config = arguments(trl.SFTConfig, tmp_path, gradient_checkpointing=False, **how)
    optimizers = optimizer(model) if trains else (torch.optim.SGD(moe_lora.parameter_groups(model, 0.0)), None)
    if not trains:
        for group in optimizers[0].param_groups:
            group["lr"] = 0.0
    trainer = trl.SFTTrainer(
        model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, optimizers=optimizers
    )
    if trains:
        assert_learns(trainer, model)
    else:
        trainer.train()
        if how.get("padding_free") or how.get("packing"):
            assert any(gates.shape[0] > 1 for gates in model.seen)
        assert_routed_as_prompts(model, [text["prompt"] for text in texts()], tokenizer, list(model.seen))


def test_dpo_trainer(tokenizer, tmp_path):
    model = llama()
    rows = [{"prompt": text["prompt"], "chosen": text["completion"], "rejected": " w20 w21 w22"} for text in texts()]
    trainer = trl.DPOTrainer(
        model,
        ref_model=bare(),
        args=arguments(trl.DPOConfig, tmp_path, gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=optimizer(model),
    )
    assert_learns(trainer, model)


def test_grpo_trainer(tokenizer, tmp_path):
    model = llama()
    rows = [{"prompt": text["prompt"]} for text in texts()]

    def reward(completions, **_):
        """The share of words below w15."""
        return [sum(int(word[1:]) < 15 for word in text.split() if word[0] == "w") / 6 for text in completions]

    how = {"num_generations": 8, "per_device_train_batch_size": 16, "max_completion_length": 6}
    how |= {"gradient_checkpointing": False, "temperature": 1.0}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments(trl.GRPOConfig, tmp_path, **how),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=optimizer(model),
    )
    before = copies(model)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == STEPS and sum(rewards[-5:]) > sum(rewards[:5])
    assert any(not torch.equal(one, other) for one, other in zip(before, copies(model), strict=True))


def test_pipeline_generates_what_the_model_does(tokenizer):
    model = llama().eval()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [text["prompt"] for text in texts(4)]
    how = {"max_new_tokens": 4, "do_sample": False}
    for prompt, answer in zip(prompts, generator(prompts, **how), strict=True):
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), **how)
        want = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert answer[0]["generated_text"].replace(" ", "") == want.replace(" ", "")
