"""`attach`: a model that routes itself by the question in each call, in forward, generate, packed batches and files."""

import copy
import json
import pickle
import threading

import moe_lora
import pytest
import torch
from moe_lora import GateConfig, MoELoRAConfig
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)

MARK = 7
CONFIG = MoELoRAConfig(num_experts=4, top_k=2, rank=3, alpha=6, dropout=0.0, target_modules="all-linear")
MARKED = GateConfig(answer_marker=(MARK,))
PROMPTS = torch.randint(8, 50, (3, 6), generator=torch.Generator().manual_seed(1))
ANSWERS = torch.randint(8, 50, (3, 4), generator=torch.Generator().manual_seed(2))
WHOLE = torch.cat([PROMPTS, torch.full((3, 1), MARK), ANSWERS], 1)
LABELS = torch.where(torch.arange(11) < 7, -100, WHOLE)


def bare(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=50, **sizes, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1
    )
    config.use_cache = False
    return LlamaForCausalLM(config)


def spread(model):
    """Makes experts and gate large enough that another choice is seen."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
        if "moe_lora_gate" in name:
            nn.init.normal_(parameter, std=20)
    return model.eval()


def attached(gate=MARKED, config=CONFIG):
    return spread(moe_lora.attach(bare(), config, gate))


def routing_of(model, prompt):
    """What the gate says of one prompt alone."""
    with torch.no_grad():
        return model.moe_lora_gate.routing(model.get_input_embeddings()(prompt))


def routed(model, ids, prompts):
    """Logits of each row by itself, routed from outside by its prompt."""
    rows = []
    for row, prompt in zip(ids, prompts, strict=True):
        with moe_lora.route(model, routing_of(model, prompt[None])):
            rows.append(model(row[None]).logits)
    return torch.cat(rows)


@pytest.fixture(scope="module")
def model():
    return attached()


@pytest.fixture(scope="module")
def right(model):
    """Each row alone; the questions use more than one set of experts."""
    assert len({tuple(sorted(routing_of(model, prompt[None]).experts[0].tolist())) for prompt in PROMPTS}) > 1
    return routed(model, WHOLE, PROMPTS)


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": WHOLE},
        {"input_ids": WHOLE, "labels": LABELS},
        {"input_ids": WHOLE, "labels": WHOLE},
        {"input_ids": WHOLE, "question_mask": torch.arange(11).expand(3, -1) < 6},
    ],
    ids=["marker", "labels", "labels-of-all", "question_mask"],
)
def test_forward_routes_by_the_question(model, right, inputs):
    assert_close(model(**inputs).logits, right)


def test_embeddings_are_read_where_there_are_no_ids(model, right):
    embeds = model.get_input_embeddings()(WHOLE)
    mask = torch.arange(11).expand(3, -1) < 6
    assert_close(model(inputs_embeds=embeds, question_mask=mask).logits, right)
    with pytest.raises(ValueError, match="the answer marker needs input_ids"):
        model(inputs_embeds=embeds)


def test_labels_say_what_the_question_is_without_a_marker():
    model = attached(GateConfig())
    questions = torch.cat([PROMPTS, torch.full((3, 1), MARK)], 1)
    assert_close(model(WHOLE, labels=LABELS).logits, routed(model, WHOLE, questions))


def test_prompt_and_answer_route_as_the_prompt_alone(model):
    alone, seen = routing_of(model, PROMPTS), []

    def note(module, args, output):
        seen.append(moe_lora.Routing(*output[:2]))

    handle = model.moe_lora_gate.register_forward_hook(note)
    with torch.no_grad():
        model(WHOLE)
        model(WHOLE, labels=LABELS)
        model(torch.nn.functional.pad(WHOLE, (3, 2)), attention_mask=torch.nn.functional.pad(WHOLE > 0, (3, 2)))
        model.generate(PROMPTS, max_new_tokens=2)
        model.generate(WHOLE[:, :7], max_new_tokens=2)
    handle.remove()
    assert len(seen) == 5  # once for each call
    for routing in seen:
        assert torch.equal(routing.experts, alone.experts)
        assert torch.equal(routing.gates, seen[0].gates)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(model, right, left):
    lengths, pad = (11, 9, 10), (lambda n: (11 - n, 0)) if left else (lambda n: (0, 11 - n))
    ids = torch.stack([nn.functional.pad(row[:n], pad(n)) for row, n in zip(WHOLE, lengths, strict=True)])
    mask = torch.stack([nn.functional.pad(torch.ones(n), pad(n)) for n in lengths])
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0).long()).logits
    for got, want, n, present in zip(logits, right, lengths, mask, strict=True):
        assert_close(got[present != 0], want[:n])


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "marker"])
def test_packed_document_is_as_it_is_alone(model, right, how, labels):
    lengths = (11, 9, 10)
    ids = torch.cat([row[:n] for row, n in zip(WHOLE, lengths, strict=True)])[None]
    inputs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if how == "cu_seq_lens_q":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 11, 20, 30], dtype=torch.int32)
    if how == "seq_idx":
        inputs["seq_idx"] = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])[None]
    if labels:
        inputs["labels"] = torch.cat([row[:n] for row, n in zip(LABELS, lengths, strict=True)])[None]
    logits = model(ids, **inputs).logits[0].split(lengths)
    for got, want, n in zip(logits, right, lengths, strict=True):
        assert_close(got, want[:n])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generate_routes_by_the_prompt(model, how):
    prompts = PROMPTS[:1] if "prompt_lookup_num_tokens" in how else PROMPTS
    how = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "eos_token_id": None} | how
    got = model.generate(prompts, **how)
    for i, prompt in enumerate(prompts):
        with moe_lora.route(model, routing_of(model, prompt[None])):
            want = model.generate(prompt[None], **how)
        assert torch.equal(got[i * len(want) : (i + 1) * len(want)], want)


def test_generate_with_an_assistant_and_padding(model):
    how = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "eos_token_id": None}
    want = model.generate(PROMPTS[:1], **how)
    assert torch.equal(model.generate(PROMPTS[:1], assistant_model=bare(3).eval(), **how), want)
    padded = nn.functional.pad(PROMPTS, (2, 0))  # transformers takes the mask from the padding
    assert torch.equal(model.generate(padded, **how)[:, 8:], model.generate(PROMPTS, **how)[:, 6:])


def test_generate_in_a_thread_with_a_streamer(model):
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(map(str, ids.tolist() if hasattr(ids, "tolist") else ids)) + " "

    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(PROMPTS[:1], **how)[0, 6:].tolist()
    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    thread = threading.Thread(target=model.generate, args=(PROMPTS[:1],), kwargs=how | {"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(word) for word in text.split()] == want


def test_encoder_and_decoder_are_routed_by_the_encoders_input():
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = spread(moe_lora.attach(T5ForConditionalGeneration(config), CONFIG))
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()
    got = model(PROMPTS, attention_mask=mask, labels=ANSWERS).logits
    for i, n in enumerate((6, 4, 5)):
        with moe_lora.route(model, routing_of(model, PROMPTS[i : i + 1, :n])):
            assert_close(got[i : i + 1], model(PROMPTS[i : i + 1, :n], labels=ANSWERS[i : i + 1]).logits)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    together = model.generate(PROMPTS, attention_mask=mask, **how)
    for i, n in enumerate((6, 4, 5)):
        alone = model.generate(PROMPTS[i : i + 1, :n], **how)[0]
        assert torch.equal(together[i, : len(alone)], alone)


def test_token_gate_routes_every_token_in_forward_and_generate():
    model = attached(GateConfig(mode="token"))
    whole = model(WHOLE).logits
    assert_close(whole[:1], model(WHOLE[:1]).logits)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(PROMPTS, use_cache=True, **how), model.generate(PROMPTS, use_cache=False, **how))


def test_explicit_route_counts_before_the_gate(model, right):
    other = moe_lora.Routing(torch.tensor([[0, 1]]).expand(3, -1), torch.ones(3, 2) / 2)
    with moe_lora.route(model, other):
        logits = model(WHOLE).logits
        assert not torch.allclose(logits, right, atol=1e-3)
        ids = model.generate(PROMPTS, max_new_tokens=3, do_sample=False)
    assert_close(logits, torch.cat([explicit(model, row[None]) for row in WHOLE]))
    assert ids.shape == (3, 9)
    assert_close(model(WHOLE).logits, right)


def explicit(model, ids):
    with moe_lora.route(model, moe_lora.Routing(torch.tensor([[0, 1]]), torch.ones(1, 2) / 2)):
        return model(ids).logits


def test_disable_is_the_base(model, right):
    want = bare().eval()(WHOLE).logits
    with moe_lora.disable(model) as same:
        assert same is model and torch.equal(model(WHOLE).logits, want)
        assert torch.equal(model.generate(PROMPTS, max_new_tokens=3), bare().eval().generate(PROMPTS, max_new_tokens=3))
    assert_close(model(WHOLE).logits, right)


REFUSED = (
    (GateConfig(), {"input_ids": WHOLE}, "which tokens are the question: call the model with question_mask"),
    (GateConfig(), {"input_ids": WHOLE, "labels": WHOLE}, "nothing says which tokens are the question"),
    (MARKED, {"input_ids": PROMPTS}, r"every document must hold the answer marker \(7,\), got none in document 0"),
    (MARKED, {"input_ids": torch.full((1, 3), MARK)}, "every question must have a token, got none in row 0"),
    (MARKED, {"input_ids": WHOLE, "question_mask": WHOLE[:, :5]}, r"question_mask must be \[B, L\] = \(3, 11\)"),
    (MARKED, {"input_ids": WHOLE, "attention_mask": WHOLE[:2]}, r"attention_mask must be \[B, L\] = \(3, 11\)"),
)


@pytest.mark.parametrize("gate, inputs, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_call_without_a_question_is_refused(gate, inputs, message):
    model = attached(gate)
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    question = torch.ones_like(inputs["input_ids"])
    assert model(inputs["input_ids"], question_mask=question).logits.isfinite().all()  # the failed call left nothing


def test_attach_refuses_what_it_cannot_route():
    with pytest.raises(ValueError, match="model must have input embeddings, got Sequential without"):
        moe_lora.attach(nn.Sequential(nn.Linear(3, 3)), CONFIG)
    with pytest.raises(TypeError, match=r"gate must be a moe_lora\.GateConfig, got dict"):
        moe_lora.attach(bare(), CONFIG, {"mode": "dense"})
    with pytest.raises(ValueError, match="answer_marker must be token ids, got '<a>'"):
        GateConfig(answer_marker="<a>")
    with pytest.raises(ValueError, match="mode must be instance, dense or token, got 'dual'"):
        GateConfig(mode="dual")
    with pytest.raises(ValueError, match="lr must be a number of at least 0, got -1"):
        GateConfig(lr=-1)


def test_question_of_all_tokens_where_it_is_asked_for():
    model = attached(GateConfig(question="all"))
    assert_close(model(WHOLE).logits, routed(model, WHOLE, WHOLE))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_training_reaches_experts_and_gate(reentrant):
    model = attached(GateConfig(balance=0.1)).train()
    want = copy.deepcopy(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen = []
    handle = want.moe_lora_gate.register_forward_hook(lambda module, args, output: seen.append(output))
    plain = want(WHOLE, labels=LABELS).loss
    handle.remove()
    plain.backward()
    loss = model(WHOLE, labels=LABELS).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for (name, got), expected in zip(model.named_parameters(), want.parameters(), strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert model.moe_lora_gate.w_gating.grad.abs().sum() > 0
    experts, _, logits = seen[0]
    model.eval()
    balance = 0.1 * moe_lora.load_balancing_loss(logits, experts)
    without = model(WHOLE, labels=LABELS).loss  # in eval there is no balance
    torch.testing.assert_close(plain - without, balance, atol=1e-5, rtol=1e-4)


def test_balance_without_a_loss_is_refused():
    model = attached(GateConfig(answer_marker=(MARK,), balance=0.1)).train()
    with pytest.raises(ValueError, match=r"GateConfig\.balance needs a loss from the model to be added to"):
        model(WHOLE)
    with torch.no_grad():
        model(WHOLE)


def test_parameter_groups_give_the_gate_its_own_rate():
    model = attached(GateConfig(lr=0.5))
    groups = moe_lora.parameter_groups(model, 1e-3, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("experts", 1e-3, 0.1),
        ("gate", 0.5, 0.0),
    ]
    assert groups[1]["params"] == list(model.moe_lora_gate.parameters())
    trains = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in groups for parameter in group["params"]} == trains
    assert moe_lora.parameter_groups(model, 1e-3, gate_lr=2.0)[1]["lr"] == 2.0
    with pytest.raises(ValueError, match=r"must hold one model with experts, got 0"):
        moe_lora.parameter_groups(bare(), 1e-3)


def test_print_trainable_parameters(model, capsys):
    moe_lora.print_trainable_parameters(model)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert capsys.readouterr().out.startswith(f"trainable params: {trains:,d} || all params: ")


def test_model_is_saved_with_its_gate_and_loaded_in_one_call(model, right, tmp_path):
    moe_lora.save(model, tmp_path)
    other = moe_lora.load(bare(), tmp_path).eval()
    assert torch.equal(other(WHOLE).logits, model(WHOLE).logits)
    assert torch.equal(other.generate(PROMPTS, max_new_tokens=4), model.generate(PROMPTS, max_new_tokens=4))
    again = moe_lora.load(attached(), tmp_path)
    assert torch.equal(again.moe_lora_gate.w_gating, model.moe_lora_gate.w_gating)
    card = (tmp_path / "README.md").read_text()
    assert "4 experts of rank 3" in card and "routes itself" in card
    (tmp_path / "README.md").write_text("my own")
    moe_lora.save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


def test_save_pretrained_writes_the_adapter_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "model.safetensors"}
    assert set(sizes) == names
    assert torch.equal(moe_lora.load(bare(), tmp_path).eval()(WHOLE).logits, model(WHOLE).logits)


def test_wrong_base_is_refused(model, tmp_path):
    moe_lora.save(model, tmp_path)
    with pytest.raises(ValueError, match="trained on another base, got a model with other weights: "):
        moe_lora.load(bare(seed=1), tmp_path)
    assert not any(isinstance(module, moe_lora.MoELoRALinear) for module in bare().modules())
    moe_lora.load(bare(seed=1), tmp_path, any_base=True)
    moe_lora.load(bare().bfloat16(), tmp_path)
    wider = bare()
    wider.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="got a model with parameters of other names or shapes"):
        moe_lora.load(wider, tmp_path)
    with pytest.raises(ValueError, match="top_k must be 1 like the model's, got 2"):
        moe_lora.load(moe_lora.attach(bare(), MoELoRAConfig(4, 1, 3, 6, target_modules="all-linear")), tmp_path)
    with pytest.raises(ValueError, match="the model has none, saved is one of mode instance"):
        moe_lora.load(moe_lora.apply(bare(), CONFIG), tmp_path)


def test_damaged_gate_changes_nothing(model, tmp_path):
    moe_lora.save(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"gate": None}))
    other = bare()
    with pytest.raises(ValueError, match="it is cut or replaced"):
        moe_lora.load(other, tmp_path)
    assert not any(isinstance(module, moe_lora.MoELoRALinear) for module in other.modules())


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copy_routes_itself(model, right, how):
    other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert_close(other(WHOLE).logits, right)
    assert other.generate.model is other
    nn.init.zeros_(other.moe_lora_gate.w_gating)
    assert_close(model(WHOLE).logits, right)
    assert torch.equal(other.generate(PROMPTS, max_new_tokens=2)[:, :6], PROMPTS)


def test_compiled_model_routes_itself(right):
    model = attached()
    compiled = torch.compile(model, backend="aot_eager")
    for n in (3, 2):
        assert_close(compiled(WHOLE[:n]).logits, right[:n])
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_close(model(WHOLE).logits, right)


def test_threads_route_themselves_apart(model, right):
    barrier, wrong = threading.Barrier(3), []

    def work(i):
        for _ in range(10):
            barrier.wait()
            with torch.no_grad():
                wrong.append((model(WHOLE[i : i + 1]).logits - right[i : i + 1]).abs().max() > 1e-5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 30 and not any(wrong)


def test_balance_by_bias_moves_in_training_only():
    model = attached(GateConfig(answer_marker=(MARK,), bias_rate=0.01))
    model(WHOLE)
    assert not model.moe_lora_gate.bias.any()
    model.train()(WHOLE)
    assert model.moe_lora_gate.bias.abs().max() == pytest.approx(0.01)


def test_universal_expert_serves_every_question():
    model = attached(GateConfig(answer_marker=(MARK,), universal=True))
    assert (routing_of(model, PROMPTS).experts == 0).any(1).all()
    assert_close(model(WHOLE).logits, routed(model, WHOLE, PROMPTS))
