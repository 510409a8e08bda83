"""The model in training: embeddings, loss, what trains, and a gate that reads the question alone."""

import moe_lora
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from octavius.language.prompts import IGNORE
from octavius.model.octavius import Octavius
from tests.support import tiny


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make(parts)


@pytest.fixture(scope="module")
def records(parts):
    return tiny.records(parts)


def full_loss(model, batch):
    """The same loss the plain way: all logits of the Hugging Face model, shifted labels, an attention mask."""
    embeds = model.embed(batch["input_ids"], batch["features"])
    routing = model.gate.routing(embeds, batch["gate_mask"])
    with moe_lora.route(model.llm, routing):
        logits = model.llm(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)


def gradients(model, batch):
    model.zero_grad()
    model(**batch)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_embeddings_are_table_markers_and_projected_image(model, records):
    batch = tiny.batch(model, records)
    table = model.llm.get_input_embeddings().weight
    images = model.projector(batch["features"])
    embeds = model.embed(batch["input_ids"], batch["features"])
    for row, ids in enumerate(batch["input_ids"].tolist()):
        seen = 0
        for column, token in enumerate(ids):
            if token < len(table):
                want = table[token]
            elif token < len(table) + 2:
                want = model.markers[token - len(table)]
            else:
                want, seen = images[row, seen], seen + 1
            assert torch.equal(embeds[row, column], want), (row, column, token)
        assert seen == model.tower[0].tokens


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_projector_starts_at_the_size_of_the_texts_embeddings(parts, records, kind):
    model = Octavius.from_config(tiny.model_config(parts, projector=kind))
    text = model.llm.get_input_embeddings().weight.std()
    features = tiny.batch(model, records)["features"]
    model.projector.calibrate(features)
    image = model.projector(features).std()
    assert 0.2 < image / text < 2


def test_calibrated_projector_sees_standardised_channels(parts):
    projector = Octavius.from_config(tiny.model_config(parts)).projector
    scale, shift = 10.0 ** torch.linspace(-1, 3, 32), torch.linspace(-50, 50, 32)
    features = torch.randn(300, 4, 32) * scale + shift
    features[..., 7], features[3, 2, 9] = 2.5, 1e6  # a channel that never changes, and a value far out
    seen = []
    projector.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    projector(features)
    assert torch.equal(seen[0], features)  # before, it is the plain projection
    projector.calibrate(features)
    projector(features)
    assert torch.equal(seen[1][..., 7], torch.zeros(300, 4)) and seen[1][3, 2, 9] == 5
    rest = [channel for channel in range(32) if channel not in (7, 9)]
    means, deviations = seen[1].mean((0, 1))[rest], seen[1].std((0, 1))[rest]
    torch.testing.assert_close(means, torch.zeros(30), atol=1e-2, rtol=0)
    torch.testing.assert_close(deviations, torch.ones(30), atol=0.12, rtol=0)


def test_loss_is_that_of_all_logits(model, records):
    batch = tiny.batch(model, records)
    torch.testing.assert_close(model(**batch)["loss"], full_loss(model, batch), atol=1e-5, rtol=1e-5)


SIZES = {"vocab_size": 345, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(intermediate_size=96, num_key_value_heads=2, **SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(intermediate_size=96, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5, **SIZES)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(intermediate_size=96, logit_scale=3.0, **SIZES)),
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=96, word_embed_proj_dim=64, **SIZES)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_all_logits_in_other_families(parts, model, records, family):
    lora = moe_lora.MoELoRAConfig(rank=3, dropout=0.0, target_modules=("q_proj", "v_proj"))
    llm = FAMILIES[family]().eval()
    other = Octavius(tiny.model_config(parts, lora=lora), llm, model.tokenizer, model.tower[0])
    batch = tiny.batch(other, records[:3])
    torch.testing.assert_close(other(**batch)["loss"], full_loss(other, batch), atol=1e-5, rtol=1e-5)


def test_loss_over_a_given_number_of_tokens(model, records):
    batch = tiny.batch(model, records)
    count = int((batch["labels"] != IGNORE).sum())
    whole = model(**batch)["loss"]
    for divisor in (3, torch.tensor(3)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=divisor)["loss"], whole * count / 3)


def test_no_answer_token_is_no_loss(model, records):
    batch = tiny.batch(model, records[:2], max_tokens=1)  # cut before any answer
    assert (batch["labels"] == IGNORE).all()
    found = gradients(model, batch)
    assert model(**batch)["loss"].item() == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in found.values())


def test_only_experts_gate_projector_and_markers_train(model, records):
    found = gradients(model, tiny.batch(model, records))
    own = {"markers", "gate.w_gating", "projector.positions", "projector.net.0.weight", "projector.net.0.bias"}
    experts = {name for name in found if name.startswith("llm.")}
    assert found.keys() - experts == own
    assert len(experts) == 2 * 2 * 4 and all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in experts)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
    table = model.llm.get_input_embeddings().weight
    assert not table.requires_grad and table.grad is None
    assert not any(parameter.requires_grad for parameter in model.tower[0].parameters())


def test_every_answer_token_counts_the_same(model, records):
    """The batch's loss is the mean over tokens, not over records; what is padded on the right does not count."""
    batch = tiny.batch(model, records)
    parts = [tiny.batch(model, [record]) for record in records]
    counts = [int((part["labels"] != IGNORE).sum()) for part in parts]
    assert len(set(counts)) > 2
    alone = [model(**part) for part in parts]
    total = sum(out["loss"] * count for out, count in zip(alone, counts, strict=True))
    together = model(**batch)
    torch.testing.assert_close(together["loss"], total / sum(counts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together["gates"], torch.cat([out["gates"] for out in alone]))


def padded(batch, model, extra=5):
    """More padding on the right."""
    fill = {"input_ids": model.conversation.eos, "labels": IGNORE, "gate_mask": 0, "attention_mask": 0}
    longer = {key: torch.nn.functional.pad(batch[key], (0, extra), value=value) for key, value in fill.items()}
    return batch | longer


@pytest.mark.parametrize("mode", ["instance", "dense", "token"])
@pytest.mark.parametrize("include_padding", [False, True])
def test_more_padding_changes_nothing(parts, records, mode, include_padding):
    gate = tiny.gate(mode=mode, include_padding=include_padding, load_balancing=0.7)
    model = tiny.make(parts, gate=gate)
    batch = tiny.batch(model, records[:3])
    one, other = model(**batch), model(**padded(batch, model))
    torch.testing.assert_close(one["loss"], other["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one["gates"], other["gates"], atol=1e-6, rtol=1e-5)


def test_gate_reads_the_mean_of_the_question(model, records):
    batch = tiny.batch(model, records)
    table = model.llm.get_input_embeddings().weight
    for row, record in enumerate(records):
        ids = model.tokenizer(f" {record.turns[0][0]}", add_special_tokens=False).input_ids
        probs = (table[ids].mean(0) @ model.gate.w_gating).softmax(0)
        top, experts = probs.topk(2)
        want = torch.zeros(4).scatter(0, experts, top / top.sum())
        torch.testing.assert_close(model(**batch)["gates"][row], want, atol=1e-5, rtol=1e-4)


def test_include_padding_is_upstreams_mean_over_the_longest_question(parts, records):
    model = tiny.make(parts, gate=tiny.gate(include_padding=True))
    table, eos = model.llm.get_input_embeddings().weight, model.conversation.eos
    questions = [model.tokenizer(f" {r.turns[0][0]}", add_special_tokens=False).input_ids for r in records]
    longest = max(map(len, questions))
    rows = torch.stack([table[[*ids, *[eos] * (longest - len(ids))]].mean(0) for ids in questions])
    top, experts = (rows @ model.gate.w_gating).softmax(1).topk(2)
    want = torch.zeros(len(records), 4).scatter(1, experts, top / top.sum(1, keepdim=True))
    torch.testing.assert_close(model(**tiny.batch(model, records))["gates"], want, atol=1e-5, rtol=1e-4)


def test_gate_reads_the_system_message_on_demand(parts, records):
    gates = {}
    for text in ("question", "system+question"):
        model = tiny.make(parts, system=True, gate=tiny.gate(input=text))
        gates[text] = model(**tiny.batch(model, records))["gates"]
    assert not torch.allclose(gates["question"], gates["system+question"], atol=1e-3)


@pytest.mark.parametrize("mode", ["dense", "token"])
def test_other_gates_train(parts, records, mode):
    model = tiny.make(parts, gate=tiny.gate(mode=mode))
    batch = tiny.batch(model, records)
    gates = model(**batch)["gates"]
    torch.testing.assert_close(gates.sum(1), torch.ones(len(records)))
    assert (gates > 0).all() if mode == "dense" else (gates > 0).sum(1).max() > 2
    found = gradients(model, batch)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    before = model(**batch)["loss"].item()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02).step()
    assert model(**batch)["loss"].item() < before


@pytest.mark.parametrize("mode", ["instance", "token"])
def test_load_balancing_is_added(parts, records, mode):
    """The balance uses the experts' running share, which only training moves, and padding never."""
    plain, balanced = (tiny.make(parts, gate=tiny.gate(mode=mode, load_balancing=weight)) for weight in (0.0, 0.25))
    batch = tiny.batch(plain, records)
    embeds, mask = plain.embed(batch["input_ids"], batch["features"]), None
    if mode == "token":
        mask = batch["attention_mask"].flatten()
    experts, _, logits = plain.gate(embeds, batch["gate_mask"])
    before = torch.tensor([0.4, 0.3, 0.2, 0.1])
    after = 0.98 * before + 0.02 * moe_lora.expert_share(experts, 4, mask)
    assert not torch.allclose(after, before, atol=1e-4)
    balanced.share.copy_(before)
    for training, share in ((False, before), (True, after)):
        extra = 0.25 * moe_lora.load_balancing_loss(logits, experts, mask, share)
        torch.testing.assert_close(balanced.train(training)(**batch)["loss"], plain(**batch)["loss"] + extra)
        torch.testing.assert_close(balanced.share, share)
    gradient = gradients(balanced.eval(), batch)["gate.w_gating"]
    assert not torch.allclose(gradient, gradients(plain, batch)["gate.w_gating"])


@pytest.mark.parametrize("mode", ["instance", "token"])
def test_activation_checkpointing_gives_the_same_gradients(parts, records, mode):
    lora = moe_lora.MoELoRAConfig(num_experts=4, rank=3, dropout=0.2)
    one, other = (tiny.make(parts, gate=tiny.gate(mode=mode), lora=lora).train() for _ in range(2))
    other.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    batch, found = tiny.batch(one, records), []
    for model in (one, other):
        torch.manual_seed(4)
        found.append(gradients(model, batch))
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_attention_passes_through(parts, records):
    losses = []
    for name in ("eager", "sdpa", None):
        model = tiny.make(parts, attn_implementation=name)
        if name:
            assert model.llm.config._attn_implementation == name
        losses.append(model(**tiny.batch(model, records))["loss"].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_bfloat16_model_keeps_float32_weights_to_train(parts, records):
    model = tiny.make(parts, dtype="bfloat16")
    assert model.llm.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(**tiny.batch(model, records))
    assert out["loss"].dtype == torch.float32
    exact = tiny.make(parts)
    assert out["loss"].item() == pytest.approx(exact(**tiny.batch(exact, records))["loss"].item(), rel=0.05)
