"""`MoELoRALinear`: its parameters, its initialisation, where its routing comes from."""

import copy
import pickle
import threading

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALinear, Routing
from torch import nn

CONFIG = MoELoRAConfig(num_experts=4, top_k=2, rank=3, alpha=6, dropout=0.0)


def layer(D=16, F=8, bias=True, config=CONFIG, dtype=torch.float32):
    made = MoELoRALinear.from_linear(nn.Linear(D, F, bias, dtype=dtype), config)
    nn.init.normal_(made.lora_b)
    return made


def routing(N=3):
    return Routing(torch.stack([torch.randperm(4)[:2] for _ in range(N)]), torch.rand(N, 2))


def test_layer_shares_and_freezes_the_base():
    base = nn.Linear(16, 8)
    made = MoELoRALinear.from_linear(base, CONFIG)
    assert made.weight is base.weight and made.bias is base.bias
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert made.lora_a.shape == (4, 16, 3) and made.lora_b.shape == (4, 3, 8)
    assert (made.in_features, made.out_features, made.scale) == (16, 8, 2.0)
    assert set(made.state_dict()) == {"weight", "bias", "lora_a", "lora_b"}
    assert "num_experts=4, rank=3, scale=2" in repr(made)


def test_layer_starts_as_the_base_with_an_ordinary_loras_a():
    base = nn.Linear(400, 8)
    made = MoELoRALinear.from_linear(base, MoELoRAConfig(rank=64))
    x = torch.randn(3, 5, 400)
    torch.testing.assert_close(made(x, routing()), base(x), rtol=1e-5, atol=1e-6)
    assert 0.049 < made.lora_a.abs().max() <= 0.05
    assert abs(made.lora_a.std().item() - 0.05 / 3**0.5) < 1e-3
    assert not torch.equal(made.lora_a[0], made.lora_a[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layer_keeps_master_weights(dtype):
    made = layer(dtype=dtype)
    assert made.lora_a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = made(torch.randn(3, 5, 16).to(dtype), routing())
    assert y.dtype == dtype
    y.float().sum().backward()
    assert made.lora_a.grad.dtype == made.lora_a.dtype


def test_layer_scales_by_alpha_over_rank():
    made, x, plan = layer(), torch.randn(3, 5, 16), routing()
    want = moe_lora.linear(x, made.weight, made.bias, made.lora_a, made.lora_b, plan, 2.0)
    assert torch.equal(made(x, plan), want)


def test_layer_drops_out_in_training_only():
    made, x, plan = layer(config=MoELoRAConfig(rank=3, dropout=0.5)), torch.randn(3, 5, 16), routing()
    assert not torch.equal(made(x, plan), made(x, plan))
    made.eval()
    assert torch.equal(made(x, plan), made(x, plan))


def test_layer_without_routing_says_so():
    with pytest.raises(RuntimeError, match=r"needs a routing: call the model inside `with moe_lora\.route"):
        layer()(torch.randn(3, 5, 16))


def test_layer_takes_routing_from_argument_before_context():
    made, x, one, two = layer(), torch.randn(3, 5, 16), routing(), routing()
    with moe_lora.route(made, one):
        assert torch.equal(made(x), made(x, one))
        assert torch.equal(made(x, two), moe_lora.linear(x, *made.parameters(), two, 2.0))


@pytest.mark.parametrize("m", [1, 3], ids=str)
def test_layer_takes_multiples_of_the_batch(m):
    made, x, plan = layer(), torch.randn(3, 5, 16), routing()
    expanded = made(x.repeat_interleave(m, 0), plan)
    torch.testing.assert_close(expanded, made(x, plan).repeat_interleave(m, 0))
    with pytest.raises(ValueError, match="3 instances"):
        made(torch.randn(4, 5, 16), plan)


def test_layer_copies_and_pickles():
    made, x, plan = layer(), torch.randn(3, 5, 16), routing()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with moe_lora.route(other, plan), pytest.raises(RuntimeError, match="needs a routing"):
            made(x)
        with moe_lora.route(other, plan):
            assert torch.equal(other(x), made(x, plan))


def test_layer_routing_belongs_to_a_thread():
    made, x, failures, barrier = layer(), torch.randn(3, 5, 16), [], threading.Barrier(4)

    def work():
        plan = routing()
        want = made(x, plan)
        for _ in range(20):
            with moe_lora.route(made, plan):
                barrier.wait()
                if not torch.equal(made(x), want):
                    failures.append(plan)
                barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


BAD = (
    ({"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
    ({"rank": 2.5}, "rank must be an integer of at least 1, got 2.5"),
    ({"top_k": True}, "top_k must be an integer of at least 1, got True"),
    ({"top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
    ({"alpha": 0}, "alpha must be positive, got 0"),
    ({"alpha": float("inf")}, "alpha must be positive, got inf"),
    ({"alpha": "1e1"}, "alpha must be a number, got '1e1'"),
    ({"alpha": torch.tensor(2.0)}, "alpha must be a number, got tensor"),
    ({"dropout": None}, "dropout must be a number, got None"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"target_modules": ()}, r"target_modules must be names of linears or one str, got \(\)"),
    ({"target_modules": (3,)}, "target_modules must be names of linears or one str"),
    ({"target_modules": None}, "target_modules must be names of linears or one str, got None"),
    ({"target_modules": "q_proj("}, r"target_modules must be a regular expression, got 'q_proj\('"),
)


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_config_bad_value_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoELoRAConfig(**arguments)


def test_layer_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"weight must be a tensor \[F, D\], got \(4,\)"):
        MoELoRALinear(torch.zeros(4), None, MoELoRAConfig())
    with pytest.raises(TypeError, match=r"weight must be a tensor .*got Linear"):
        MoELoRALinear(torch.nn.Linear(3, 4), None, MoELoRAConfig())
    with pytest.raises(TypeError, match=r"config must be a moe_lora\.MoELoRAConfig, got dict"):
        MoELoRALinear(torch.zeros(4, 3), None, {"rank": 2})


def test_config_is_hashable_and_takes_a_list():
    assert MoELoRAConfig(target_modules=["a", "b"]) == MoELoRAConfig(target_modules=("a", "b"))
    assert len({MoELoRAConfig(), MoELoRAConfig()}) == 1


def test_nothing_on_another_device_is_read_by_the_host():
    """On the meta device a read raises; so gate, routing and layers are one stream of work."""
    gate = moe_lora.InstanceGate(16, 4, 2).to("meta")
    layer = moe_lora.MoELoRALinear(
        torch.empty(8, 16, device="meta"), None, moe_lora.MoELoRAConfig(4, 2, 2, dropout=0.2)
    )
    routing = gate.routing(torch.empty(3, 5, 16, device="meta"))
    packed = moe_lora.Routing(routing.experts, routing.gates, torch.empty(4, dtype=torch.int32, device="meta"))
    assert layer(torch.empty(3, 7, 16, device="meta"), routing).shape == (3, 7, 8)
    layer(torch.empty(9, 16, device="meta"), packed).sum().backward()


def test_compiled_training_step_with_dropout_has_no_node_on_another_device():
    nodes = []

    def keep(graph, inputs):
        nodes.extend(graph.graph.nodes)
        return graph.forward

    layer = moe_lora.MoELoRALinear(
        torch.empty(8, 16, device="meta"), None, moe_lora.MoELoRAConfig(4, 2, 2, dropout=0.2)
    )
    routing = moe_lora.Routing(torch.empty(3, 2, dtype=torch.int32, device="meta"), torch.empty(3, 2, device="meta"))
    torch._dynamo.reset()
    step = torch.compile(lambda x: layer(x, routing).sum(), backend=keep, fullgraph=True)
    step(torch.empty(3, 7, 16, device="meta"))
    values = [node.meta["example_value"] for node in nodes if "example_value" in node.meta]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert any("randint" in str(node.target) for node in nodes)
    assert tensors and {tensor.device.type for tensor in tensors} == {"meta"}
