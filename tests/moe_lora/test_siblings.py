"""Siblings that share x in a model: `apply` finds them, and computed together they give what each gives alone."""

import copy
import pickle
import threading

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, Routing, siblings
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# transformers 5 also calls it activation_checkpointing_enable; the older name is the one that every version has
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

QKV = ("q_proj", "k_proj", "v_proj")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
IDS = torch.arange(28).view(4, 7) * 5 % 47 + 3
ROUTING = Routing(
    torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
)


def llama(group=True, targets=TARGETS, dropout=0.0, layers=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **heads, use_cache=False))
    moe_lora.apply(model, MoELoRAConfig(4, 2, 3, 6, dropout, targets), group=group)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def step(model, routing=ROUTING):
    with moe_lora.route(model, routing):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def groups(monkeypatch):
    """How many members each group had that ran in a model."""
    found, real = [], siblings.linear_group

    def counted(x, weights, *rest):
        weights = list(weights)
        found.append(len(weights))
        return real(x, weights, *rest)

    monkeypatch.setattr(siblings, "linear_group", counted)
    return found


def test_apply_groups_siblings_and_changes_neither_names_nor_results(groups, tmp_path):
    together, alone = llama(), llama(group=False)
    assert list(together.state_dict()) == list(alone.state_dict())
    for got, want in zip(step(together), step(alone), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)  # the backend may add in another order
    assert groups == [3, 2] * 2
    moe_lora.save(together, tmp_path)
    for group in (True, False):
        loaded = moe_lora.load(llama(group), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), together.parameters(), strict=True))


@pytest.mark.parametrize("targets, sizes", [(("q_proj", "v_proj"), []), (("q_proj", "up_proj", "gate_proj"), [2, 2])])
def test_apply_groups_only_whole_groups(targets, sizes, groups):
    step(llama(targets=targets))
    assert groups == sizes


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_grouped_model_generates_the_same(how, groups):
    how = {"max_new_tokens": 5, "pad_token_id": 0, "use_cache": True} | how
    found = []
    for group in (True, False):
        model = llama(group)
        torch.manual_seed(3)
        with moe_lora.route(model, ROUTING):
            found.append(model.generate(IDS, **how))
    assert torch.equal(*found) and len(groups) >= 4 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_grouped_model_checkpointed_gives_the_same_gradients(reentrant, groups):
    want, model = step(llama(dropout=0.2).eval()), llama(dropout=0.2)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    first = step(model)
    plain = llama(dropout=0.2).train()
    torch.manual_seed(1)
    for got, expected in zip(first, step(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert len(want) == len(first) and not torch.equal(want[0], first[0])
    assert groups == [3, 2] * 2 + [3, 2] * 4 + [3, 2] * 2


def operations(found):
    """A compiler that runs the graph as it is and notes how many groups and single linears it has."""

    def compiler(graph, _):
        targets = [str(node.target) for node in graph.graph.nodes]
        found.append([sum(target.endswith(name) for target in targets) for name in ("linear_group", "moe_lora.linear")])
        return graph.forward

    return compiler


def test_grouped_model_compiles_whole():
    model, found = llama(), []
    compiled = torch.compile(model, fullgraph=True, backend=operations(found))
    for routing in (ROUTING, Routing(ROUTING.experts.flip(0), ROUTING.gates)):
        with moe_lora.route(compiled, routing), torch.no_grad():
            torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    assert found == [[0, 12]]
    assert model.model.layers[0].self_attn.q_proj.slot.siblings is None


@pytest.mark.parametrize("whole", [True, False], ids=["model", "decoder-layers"])
def test_grouped_model_compiled_gives_the_same_gradients(whole):
    model = llama()
    want = step(copy.deepcopy(model))
    for layer in [] if whole else model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager") if whole else model
    for got, expected in zip(step(compiled), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_grouped_model_checkpointed_and_compiled():
    model = llama().train()
    want = step(copy.deepcopy(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    for got, expected in zip(step(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_decoder_layers_compile_once_for_all():
    """Numbers of hooks, which differ from layer to layer, must not be in what torch.compile guards."""
    torch.compiler.reset()
    model, found = llama(layers=6), []
    compiler = operations(found)
    for layer in model.model.layers:
        layer.compile(backend=compiler, fullgraph=True, dynamic=True)
    for L in (5, 7):
        with moe_lora.route(model, ROUTING), torch.no_grad():
            model(IDS[:, :L])
    assert found == [[0, 6]]


def test_compiled_siblings_run_alone():
    torch.manual_seed(0)
    model, found = (
        moe_lora.apply(Attention(lambda x: x.mul_(2)), MoELoRAConfig(4, 2, 3, dropout=0, target_modules=QKV)),
        [],
    )
    compiled = torch.compile(model, fullgraph=True, backend=operations(found))
    with moe_lora.route(model, ROUTING), torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(4, 5, 8)), model(torch.ones(4, 5, 8)))
    assert found == [[0, 3]]


def test_grouped_model_copies_and_pickles(groups):
    model = llama()
    want = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(step(other), want, strict=True))
    assert groups == [3, 2] * 6


def test_grouped_layer_works_alone_and_keeps_nothing(groups):
    model = llama()
    attention, x = model.model.layers[0].self_attn, torch.randn(4, 7, 16)
    with moe_lora.route(model, ROUTING):
        y = attention.k_proj(x)
        want = moe_lora.linear(x, attention.k_proj.weight, None, *list(attention.k_proj.parameters())[1:], ROUTING, 2.0)
        assert torch.equal(y, want) and not groups
        model(IDS)
    assert attention.k_proj.slot.siblings is None
    with moe_lora.route(model, ROUTING), pytest.raises(ValueError, match="lora_b must be"):
        attention.v_proj.lora_b = nn.Parameter(torch.empty(4, 3, 9))
        model(IDS)
    assert attention.k_proj.slot.siblings is None


class Attention(nn.Module):
    """q, k, v of something that `between` does to x."""

    is_causal = True

    def __init__(self, between):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, F) for F in (8, 4, 4))
        self.between = between

    def forward(self, x):
        q = self.q_proj(x)
        x = self.between(x)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], -1)


@pytest.mark.parametrize(
    "between",
    [lambda x: x, lambda x: x.mul_(2), lambda x: x + 1, lambda x: x.view(x.shape)],
    ids=["same", "in-place", "other", "alias"],
)
def test_siblings_get_what_each_gives_alone(between, groups):
    found = []
    for group in (True, False):
        torch.manual_seed(0)
        config = MoELoRAConfig(4, 2, 3, dropout=0, target_modules=QKV)
        model = moe_lora.apply(Attention(between), config, group=group and (Attention,))
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            nn.init.normal_(layer.lora_b)
        with moe_lora.route(model, ROUTING), torch.no_grad():
            found.append(model(torch.ones(4, 5, 8)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert groups == [3]


def test_siblings_run_alone_where_they_cannot_be_seen_together(groups):
    config, x = MoELoRAConfig(4, 2, 3, dropout=0, target_modules=QKV), torch.ones(4, 5, 8)
    model = moe_lora.apply(Attention(lambda x: x), config, group=(Attention,))
    with moe_lora.route(model, ROUTING):
        with torch.inference_mode():
            model(torch.ones(4, 5, 8))
        model.k_proj.train(False)
        model(x)
        model.k_proj.train()
        model.v_proj.double()
        with pytest.raises(TypeError, match="weight must be"):
            model(x)
    assert groups == []
    acausal = Attention(lambda x: x)
    acausal.is_causal = False
    with moe_lora.route(moe_lora.apply(acausal, config, group=(Attention,)), ROUTING):
        acausal(x)
    assert groups == []


def test_siblings_of_many_threads_stay_apart(groups):
    config = MoELoRAConfig(4, 2, 3, dropout=0, target_modules=QKV)
    model = moe_lora.apply(Attention(lambda x: x), config, group=(Attention,))
    barrier, wrong = threading.Barrier(4), []

    def work(seed):
        x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(seed))
        with moe_lora.route(model, ROUTING), torch.no_grad():
            want = model(x)
            for _ in range(20):
                barrier.wait()
                wrong.append(not torch.equal(model(x), want))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80 and not any(wrong) and set(groups) == {3}
