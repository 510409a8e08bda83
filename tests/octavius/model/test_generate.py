"""The model in generation: a batch answers as its members alone, with the routing of training."""

import moe_lora
import pytest
import torch

from tests.support import tiny

MODES = ("instance", "dense", "token")


@pytest.fixture(scope="module")
def models(parts):
    return {mode: tiny.make(parts, gate=tiny.gate(mode=mode)) for mode in MODES}


@pytest.fixture(scope="module")
def records(parts):
    return tiny.records(parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 3])
def test_batch_answers_as_one_by_one(models, records, mode, beams):
    model, options = models[mode], {"max_new_tokens": 9, "num_beams": beams}
    batch = tiny.batch(model, records, answer=False)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 3
    texts, weights = model.generate(**batch, **options)
    alone = [model.generate(**tiny.batch(model, [record], answer=False), **options) for record in records]
    assert texts == [reply[0] for reply, _ in alone] and len(set(texts)) > 3
    torch.testing.assert_close(weights, torch.cat([weight for _, weight in alone]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("include_padding", [False, True])
def test_question_is_routed_as_in_training(parts, records, mode, include_padding):
    model = tiny.make(parts, gate=tiny.gate(mode=mode, include_padding=include_padding))
    trained = model(**tiny.batch(model, records))["gates"]
    _, used = model.generate(**tiny.batch(model, records, answer=False), max_new_tokens=1)
    torch.testing.assert_close(used, trained, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(used.sum(1), torch.ones(len(records)))
    assert ((used > 0).sum(1) == (2 if mode == "instance" else 4)).all()


def recompute(model, batch, steps):
    """Greedy decoding of one prompt without cache: everything, the routing too, is computed anew for every token."""
    embeds, ids = model.embed(batch["input_ids"], batch["features"]), []
    with torch.inference_mode():
        for _ in range(steps):
            gate_mask = torch.nn.functional.pad(batch["gate_mask"], (0, len(ids)))
            routing = model.gate.routing(embeds, gate_mask)
            with moe_lora.route(model.llm, routing):
                ids.append(model.llm(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax())
            embeds = torch.cat((embeds, model.llm.get_input_embeddings()(ids[-1])[None, None]), 1)
            if ids[-1] == model.conversation.eos:
                break
    return torch.stack(ids).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_cached_decoding_equals_recomputation(models, records, mode):
    model = models[mode]
    for record in records[:3]:
        batch = tiny.batch(model, [record], answer=False)
        want = model.conversation.decode(recompute(model, batch, 8))
        assert model.generate(**batch, max_new_tokens=8)[0] == [want]


def test_tokens_of_a_token_gate_differ(models, records):
    """Else the test above would not see a decoding step that is routed like the step before."""
    model = models["token"]
    embeds = model.llm.get_input_embeddings().weight
    experts = model.gate(embeds[None])[0]
    assert len({tuple(row) for row in experts.tolist()}) > 3


def test_answer_depends_on_the_image_and_on_the_experts(parts, models, records):
    model = models["instance"]
    batch = tiny.batch(model, records, answer=False)
    texts, _ = model.generate(**batch, max_new_tokens=9)
    other, _ = model.generate(**batch | {"features": batch["features"].roll(1, 0)}, max_new_tokens=9)
    assert texts != other
    for module in model.llm.modules():
        if isinstance(module, moe_lora.MoELoRALinear):
            module.scale = -module.scale
    try:
        assert model.generate(**batch, max_new_tokens=9)[0] != texts
    finally:
        for module in model.llm.modules():
            if isinstance(module, moe_lora.MoELoRALinear):
                module.scale = -module.scale


@pytest.mark.parametrize("mode", MODES)
def test_generation_leaves_nothing_behind(models, records, mode):
    model = models[mode]
    batch = tiny.batch(model, records[:2])
    before = model(**batch)["loss"]
    model.generate(**tiny.batch(model, records, answer=False), max_new_tokens=3)
    assert torch.equal(model(**batch)["loss"], before)
    assert len(model.llm._forward_pre_hooks) == 1  # of moe_lora.apply
    with pytest.raises(RuntimeError, match="needs a routing"):
        model.llm(inputs_embeds=torch.zeros(1, 3, 64))


def test_sampling_options_reach_transformers(models, records):
    model = models["instance"]
    batch = tiny.batch(model, records[:2], answer=False)
    torch.manual_seed(3)
    drawn = [model.generate(**batch, max_new_tokens=6, do_sample=True, temperature=2.0)[0] for _ in range(2)]
    assert drawn[0] != drawn[1]
    many, _ = model.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert len(many) == 6
