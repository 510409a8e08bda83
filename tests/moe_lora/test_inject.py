"""`apply` and `route` on a small Llama: matching, nesting, generation, checkpointing, compile."""

import copy

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALinear, Routing
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

# transformers 5 also calls it activation_checkpointing_enable; the older name is the one that every version has
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IDS = torch.arange(28).view(4, 7) * 5 % 47 + 3
EXPERTS = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1]])
GATES = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])


def llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def applied(targets=ATTENTION, dropout=0.0, layers=2):
    config = MoELoRAConfig(num_experts=4, top_k=2, rank=3, alpha=6, dropout=dropout, target_modules=targets)
    model = moe_lora.apply(llama(layers), config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model, routing, ids=IDS):
    with moe_lora.route(model, routing):
        return model(ids).logits


def names(model):
    return {name for name, module in model.named_modules() if isinstance(module, MoELoRALinear)}


@pytest.mark.parametrize(
    "targets, count",
    [
        (ATTENTION, 8),
        (("self_attn.q_proj",), 2),
        (("model.layers.1.mlp.up_proj",), 1),
        (r"model\.layers\.0\..*proj", 7),
        ("all-linear", 14),
        (("lm_head",), 1),
    ],
    ids=str,
)
def test_apply_replaces_what_matches(targets, count):
    model = applied(targets)
    assert len(names(model)) == count
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{x}" for name in names(model) for x in "ab"}


def test_apply_changes_nothing_yet():
    before = llama()
    want = before(IDS).logits
    model = moe_lora.apply(before, MoELoRAConfig(rank=3))
    assert model is before
    found = logits(model.eval(), Routing(EXPERTS, GATES))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)  # the backend may add in another order


def test_apply_without_match_names_the_linears():
    with pytest.raises(
        ValueError, match=r"got \('query',\); linears: down_proj, gate_proj, .*, lm_head, o_proj, q_proj"
    ):
        moe_lora.apply(llama(), MoELoRAConfig(target_modules=("query",)))
    with pytest.raises(ValueError, match="must match a linear"):
        moe_lora.apply(llama(), MoELoRAConfig(target_modules=("proj",)))


def test_apply_names_a_target_that_matches_nothing():
    with pytest.raises(ValueError, match=r"must match a linear, got none for v_prj; linears: .*q_proj.*v_proj"):
        moe_lora.apply(llama(), MoELoRAConfig(target_modules=("q_proj", "v_prj")))


def test_apply_to_gpt2_says_that_conv1d_is_no_linear():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    found = r"linears: lm_head; not nn\.Linear but transformers.*Conv1D: c_attn, c_fc, c_proj"
    with pytest.raises(ValueError, match=found):
        moe_lora.apply(GPT2LMHeadModel(config), MoELoRAConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"targets must be nn\.Linear, got transformers.*Conv1D at .*c_attn"):
        moe_lora.apply(GPT2LMHeadModel(config), MoELoRAConfig(target_modules=("c_attn",)))


def test_apply_refuses_what_the_layer_would_lose():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="targets must have no hooks, which would be lost, got some at 0"):
        moe_lora.apply(model, MoELoRAConfig(target_modules=("0",)))
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"plain floating point weight, got Parameter torch\.int8 at 0"):
        moe_lora.apply(model, MoELoRAConfig(target_modules=("0",)))


def test_apply_takes_its_own_config_only():
    with pytest.raises(TypeError, match=r"config must be a moe_lora\.MoELoRAConfig, got dict"):
        moe_lora.apply(llama(), {"rank": 4})


def test_apply_twice_is_refused():
    with pytest.raises(ValueError, match=r"no experts yet, got a MoELoRALinear at model\.layers\.0\.self_attn\.q_proj"):
        moe_lora.apply(applied(), MoELoRAConfig())


@pytest.mark.parametrize(
    "target, kind",
    [("out_proj", "NonDynamicallyQuantizableLinear"), ("1", "ReLU"), ("self_attn", "MultiheadAttention")],
)
def test_apply_to_another_kind_of_module_is_refused_whole(target, kind):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=rf"targets must be nn.Linear, got .*{kind} at"):
        moe_lora.apply(model, MoELoRAConfig(target_modules=("2", target)))
    assert not names(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_apply_refuses_code_that_goes_round_the_layers():
    model = llama()
    model.config.pretraining_tp = 2
    with pytest.raises(ValueError, match=r"pretraining_tp must be 1.*set model\.config\.pretraining_tp = 1"):
        moe_lora.apply(model, MoELoRAConfig())


def test_apply_keeps_a_shared_linear_shared():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"] = model["a"]
    moe_lora.apply(model, MoELoRAConfig(target_modules=("a", "b")))
    assert model["a"] is model["b"] and isinstance(model["a"], MoELoRALinear)


def test_every_instance_has_its_own_experts():
    model = applied().eval()
    together = logits(model, Routing(EXPERTS, GATES))
    for i in range(4):
        alone = logits(model, Routing(EXPERTS[i : i + 1], GATES[i : i + 1]), IDS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_route_nests_and_ends():
    model, one, two = applied().eval(), Routing(EXPERTS, GATES), Routing(EXPERTS.flip(0), GATES)
    want = [logits(model, routing) for routing in (one, two)]
    with moe_lora.route(model, one):
        assert torch.equal(logits(model, two), want[1])
        assert torch.equal(model(IDS).logits, want[0])
        with pytest.raises(KeyError), moe_lora.route(model, two):
            raise KeyError
        assert torch.equal(model(IDS).logits, want[0])
    with pytest.raises(RuntimeError, match="needs a routing"):
        model(IDS)


def test_route_keeps_models_apart():
    first, second = applied().eval(), applied("all-linear").eval()
    one, two = Routing(EXPERTS, GATES), Routing(EXPERTS.flip(0), GATES)
    want = [logits(first, one), logits(second, two)]
    with moe_lora.route(first, one), moe_lora.route(second, two):
        assert torch.equal(first(IDS).logits, want[0])
        assert torch.equal(second(IDS).logits, want[1])
    with pytest.raises(ValueError, match=r"one call of moe_lora.apply, got 2 parts applied apart; route each"):
        logits(nn.ModuleList([first, second]), one)
    with pytest.raises(ValueError, match=r"got no experts; call moe_lora.apply first"):
        logits(llama(), one)
    with pytest.raises(TypeError, match=r"routing must be a moe_lora\.Routing, got Tensor"):
        logits(first, GATES)


def test_route_through_a_wrapper_and_a_copy():
    model, routing = applied().eval(), Routing(EXPERTS, GATES)
    want = logits(model, routing)
    with moe_lora.route(nn.ModuleDict({"inner": model}), routing):
        assert torch.equal(model(IDS).logits, want)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, routing), want)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generate_equals_one_by_one(how):
    model = applied().eval()
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True} | how
    with moe_lora.route(model, Routing(EXPERTS, GATES)):
        together = model.generate(IDS, **how)
    for i in range(4):
        with moe_lora.route(model, Routing(EXPERTS[i : i + 1], GATES[i : i + 1])):
            alone = model.generate(IDS[i : i + 1], **how)
        assert torch.equal(together[i * len(alone) : (i + 1) * len(alone)], alone)


def test_generate_samples_expanded():
    model = applied().eval()
    with moe_lora.route(model, Routing(EXPERTS, GATES)):
        out = model.generate(IDS, max_new_tokens=3, do_sample=True, num_return_sequences=3, pad_token_id=0)
    assert out.shape[0] == 12


def step(model, gates):
    """Loss and all gradients of one training step whose gates come out of a graph; backward is outside the route."""
    leaf = gates.clone().requires_grad_()
    torch.manual_seed(7)
    with moe_lora.route(model, Routing(EXPERTS, leaf * 2)):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["after-apply", "before-apply"])
def test_gradient_checkpointing_gives_the_same_gradients(dropout, reentrant, before):
    want = step(applied(dropout=dropout).train(), GATES)
    model = llama()
    if before:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    moe_lora.apply(model, MoELoRAConfig(4, 2, 3, 6, dropout, ATTENTION))
    model.load_state_dict(applied().state_dict())
    if not before:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for got, expected in zip(step(model.train(), GATES), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-5)


def test_gradient_checkpointing_with_fixed_gates_reaches_every_layer():
    model = applied().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with moe_lora.route(model, Routing(EXPERTS, GATES)):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith("lora_a"))


def test_gradient_checkpointing_of_two_steps_keeps_their_routings_apart():
    model = applied().train()
    want = [step(copy.deepcopy(model), gates)[2:] for gates in (GATES, GATES.flip(0))]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for gates in (GATES, GATES.flip(0)):
        with moe_lora.route(model, Routing(EXPERTS, gates * 2)):
            losses.append(model(IDS, labels=IDS).loss)
    sum(losses).backward()
    for parameter, one, two in zip((p for p in model.parameters() if p.requires_grad), *want, strict=True):
        torch.testing.assert_close(parameter.grad, one + two, atol=1e-7, rtol=1e-5)


def test_compiled_model_reads_the_route_without_recompiling():
    model, graphs = applied(dropout=0.1, layers=1).eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for seed in range(3):
        torch.manual_seed(seed)
        routing = Routing(torch.stack([torch.randperm(4)[:2] for _ in range(4)]), torch.rand(4, 2))
        with moe_lora.route(compiled, routing):
            torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    assert len(graphs) == 1


def test_route_within_a_compiled_forward():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
            moe_lora.apply(self.net, MoELoRAConfig(rank=2, dropout=0.0, target_modules="all-linear"))
            self.gate = moe_lora.InstanceGate(6, 4)

        def forward(self, x):
            with moe_lora.route(self.net, self.gate.routing(x)):
                return self.net(x)

    torch.manual_seed(0)
    eager = Gated()
    for parameter in eager.parameters():
        nn.init.normal_(parameter)
    whole = copy.deepcopy(eager)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (3, 5):
        x = torch.randn(N, 2, 6)
        eager(x).square().sum().backward()
        compiled(x).square().sum().backward()
    for one, other in zip(eager.parameters(), whole.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def test_compiled_training_step_gives_the_same_gradients():
    model = applied(layers=1).train()
    want = step(copy.deepcopy(model), GATES)
    got = step(torch.compile(model, fullgraph=True, backend="aot_eager"), GATES)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_checkpointed_and_compiled_training_step():
    model = applied(layers=1).train()
    want = step(copy.deepcopy(model), GATES)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = step(torch.compile(model, backend="aot_eager"), GATES)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
