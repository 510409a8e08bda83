"""The layer in an unmodified Hugging Face model: it trains, is saved, reloaded to the same bits, and generates."""

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, Routing
from transformers import LlamaForCausalLM

CONFIG = MoELoRAConfig(num_experts=5, top_k=2, rank=3, alpha=6, dropout=0.1, target_modules=("q_proj", "down_proj"))
ROUTING = Routing(torch.tensor([[4, 0], [1, 0], [3, 4]]), torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]]))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def trained(parts, ids):
    """The model, and its losses while it learnt."""
    torch.manual_seed(0)
    model = moe_lora.apply(LlamaForCausalLM.from_pretrained(parts.llm), CONFIG).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, 0.02), []
    for _ in range(25):
        with moe_lora.route(model, ROUTING):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_training_lowers_the_loss_and_moves_the_chosen_experts_only(trained, parts):
    model, losses = trained
    assert losses[-1] < 0.5 * losses[0]
    base = LlamaForCausalLM.from_pretrained(parts.llm).state_dict()
    now = model.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())
    for name, tensor in now.items():
        if name.endswith("lora_b"):
            assert [bool(expert.any()) for expert in tensor] == [True, True, False, True, True]


def test_reloaded_model_gives_identical_logits(trained, parts, ids, tmp_path):
    model, _ = trained
    moe_lora.save(model, tmp_path)
    other = moe_lora.load(LlamaForCausalLM.from_pretrained(parts.llm), tmp_path).eval()
    with moe_lora.route(model, ROUTING), moe_lora.route(other, ROUTING), torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
        options = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        beams = model.generate(ids, **options)
        assert torch.equal(beams, other.generate(ids, **options))
    assert beams.shape[0] == 3 and beams.shape[1] > ids.shape[1]
