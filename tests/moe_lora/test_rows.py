"""Nothing silently wrong: what does not fit is refused, and what runs equals each instance alone."""

import copy
import random

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, Routing
from torch import nn
from torch.autograd import forward_ad
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

CONFIG = MoELoRAConfig(4, 2, 3, 6, dropout=0.0, target_modules="all-linear")
IMAGE, COUNTS = 49, (1, 3, 2, 2)
EXPERTS = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
GATES = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])


def spread(model):
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def routing(rows=range(4)):
    return Routing(EXPERTS[list(rows)], GATES[list(rows)])


def llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=50, **sizes, num_key_value_heads=2, pad_token_id=0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def conversation(counts=COUNTS):
    """Ids with four tokens for each image, their mask, and the images."""
    generator, length = torch.Generator().manual_seed(1), 4 * max(counts) + 5
    ids, mask = torch.zeros(len(counts), length, dtype=torch.long), torch.zeros(len(counts), length, dtype=torch.long)
    for row, count in enumerate(counts):
        text = torch.randint(3, 40, (5,), generator=generator)
        tokens = torch.cat([text[:2], torch.full((4 * count,), IMAGE), text[2:]])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return ids, mask, torch.randn(sum(counts), 3, 8, 8, generator=generator)


@pytest.mark.parametrize("given", [True, False], ids=["images=", "image-tokens"])
@pytest.mark.parametrize("counts", [COUNTS, (2, 0, 1, 1), (1, 1, 1, 1)], ids=str)
def test_images_follow_their_instances(counts, given):
    model = spread(moe_lora.apply(llava(), CONFIG))
    ids, mask, images = conversation(counts)
    owners = [row for row, count in enumerate(counts) for _ in range(count)] if given else None
    with moe_lora.route(model, routing(), images=owners):
        together = model(input_ids=ids, attention_mask=mask, pixel_values=images).logits
    for row, own in enumerate(images.split(counts)):
        n = int(mask[row].sum())
        inputs = {"input_ids": ids[row : row + 1, :n], "pixel_values": own if len(own) else None}
        with moe_lora.route(model, routing([row])):
            alone = model(**inputs).logits
        torch.testing.assert_close(together[row, :n], alone[0], rtol=1e-4, atol=1e-5)


def test_images_of_nobody_are_refused():
    model = spread(moe_lora.apply(llava(), CONFIG))
    ids, mask, images = conversation()
    model.config.image_token_id = None
    with (
        moe_lora.route(model, routing()),
        pytest.raises(ValueError, match="needs to know whose each image is"),
    ):
        model(input_ids=ids, attention_mask=mask, pixel_values=images)
    with (
        moe_lora.route(model, routing(), images=[0, 1, 2]),
        pytest.raises(ValueError, match="must be 3 images in"),
    ):
        model(input_ids=ids, attention_mask=mask, pixel_values=images)


class Net(nn.Module):
    def __init__(self, between=lambda x: x, after=lambda y: y):
        super().__init__()
        self.up, self.down, self.between, self.after = nn.Linear(6, 8), nn.Linear(8, 6), between, after

    def forward(self, x):
        return self.after(self.down(self.between(self.up(x))))


def net(**how):
    torch.manual_seed(0)
    return spread(moe_lora.apply(Net(**how), CONFIG))


STALE = (
    (torch.randn(8, 5, 6), "got 4 instances for a batch of 8"),
    (torch.randn(8, 6), "got 4 instances for a batch of 8"),
    (torch.randn(2, 5, 6), "got 4 instances for a batch of 2"),
)


@pytest.mark.parametrize("x, message", STALE, ids=[str(tuple(x.shape)) for x, _ in STALE])
def test_stale_routing_is_refused(x, message):
    model = net()
    with moe_lora.route(model, routing()), pytest.raises(ValueError, match=message):
        model(x)
    with moe_lora.route(model, routing()):  # a refused call leaves nothing
        assert model(torch.randn(4, 5, 6)).shape == (4, 5, 6)
    with moe_lora.route(model, routing()), pytest.raises(ValueError, match="got 4 instances for x"):
        model.up(torch.randn(8, 5, 6))


def test_expanded_routing_is_right():
    model, x = net(), torch.randn(8, 5, 6)
    with moe_lora.route(model, routing().expand(2)):
        together = model(x)
    for i in range(8):
        with moe_lora.route(model, routing([i // 2])):
            torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))


MIXED = (
    ("transposed", lambda y: y.transpose(0, 1)),
    ("picked", lambda y: y.flatten(0, 1)[[0, 3, 5, 6, 7, 9, 11, 12]]),
    ("half", lambda y: y[:2]),
    ("repeated", lambda y: y.repeat(2, 1, 1)),
)


@pytest.mark.parametrize("between", [between for _, between in MIXED], ids=[name for name, _ in MIXED])
def test_rows_that_are_not_the_batchs_are_refused(between):
    model = net(between=between)
    with (
        moe_lora.route(model, routing()),
        pytest.raises(ValueError, match="rows must be the batch's 4 entries"),
    ):
        model(torch.randn(4, 5, 6))


class Sparse(nn.Module):
    """A sparse model whose router picks the rows of each expert."""

    def __init__(self, named):
        super().__init__()
        self.named = named
        self.router = nn.Linear(6, 3)
        setattr(self, named, nn.ModuleList(nn.Linear(6, 6) for _ in range(3)))

    def forward(self, x):
        rows = x.flatten(0, -2)
        choice, y = self.router(rows).argmax(-1), torch.zeros_like(rows)
        for e, expert in enumerate(getattr(self, self.named)):
            y[choice == e] = expert(rows[choice == e])
        return y.view(x.shape)


@pytest.mark.parametrize("named", ["experts", "blocks"])
def test_experts_of_a_sparse_model_are_refused(named):
    with pytest.raises(ValueError, match=rf"got {named}\.0, which is one of the experts {named}, whose"):
        moe_lora.apply(Sparse(named), CONFIG)
    model = moe_lora.apply(Sparse(named), MoELoRAConfig(4, 2, 3, target_modules=("router",)))
    with moe_lora.route(model, routing()):
        assert model(torch.randn(4, 5, 6)).shape == (4, 5, 6)


@pytest.mark.parametrize("whole", [True, False], ids=["encoder", "layer"])
def test_torchs_fast_path_does_not_go_round_the_layers(whole):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2) if whole else layer
    model = spread(moe_lora.apply(copy.deepcopy(base), MoELoRAConfig(4, 2, 3, target_modules=("linear1", "linear2"))))
    x, padding = torch.randn(4, 5, 8), torch.arange(5) >= torch.tensor([[5], [4], [3], [5]])
    with moe_lora.route(model, routing()):
        want = model(x, src_key_padding_mask=padding).detach()
        with torch.no_grad():
            got = model(x, src_key_padding_mask=padding)
        assert (got - base.eval()(x, src_key_padding_mask=padding))[~padding].abs().max() > 0.01
    torch.testing.assert_close(got[~padding], want[~padding])


def test_encoder_with_the_batch_second_is_refused():
    with pytest.raises(ValueError, match="must get the batch first, got linear1 of a layer with batch_first=False"):
        moe_lora.apply(nn.TransformerEncoderLayer(8, 2), MoELoRAConfig(4, target_modules=("linear1",)))


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 6)], ids=str)
@pytest.mark.parametrize("group", [True, False], ids=["grouped", "alone"])
def test_output_may_be_changed_in_place(shape, group):
    def grads(after, q):
        torch.manual_seed(0)
        model = Llamalike(after) if q else Net(after=after)
        spread(moe_lora.apply(model, CONFIG, group=(Llamalike,) if group else False)).train()
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        with moe_lora.route(model, routing()):
            model(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    for q in (True, False):
        for got, want in zip(grads(lambda y: y.mul_(3).add_(1), q), grads(lambda y: y * 3 + 1, q), strict=True):
            torch.testing.assert_close(got, want)


class Llamalike(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.gate_proj, self.up_proj, self.between = nn.Linear(6, 8), nn.Linear(6, 8), between

    def forward(self, x):
        y = self.gate_proj(x)
        return self.between(y) * self.up_proj(x)


class ChangesData(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        y = self.gate_proj(x)
        x.data.mul_(2)
        return y + self.up_proj(x)


def test_change_through_data_between_siblings_is_seen():
    model = spread(moe_lora.apply(ChangesData(), CONFIG))
    with moe_lora.route(model, routing()), torch.no_grad():
        x = torch.randn(4, 5, 6)
        want = model.gate_proj(x) + model.up_proj(x * 2)
        torch.testing.assert_close(model(x), want)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate = moe_lora.InstanceGate(6, 4)


def test_head_and_gate_are_not_frozen_unasked():
    config = MoELoRAConfig(4, 2, 3, target_modules=("body",))
    with pytest.raises(ValueError, match=r"would freeze the head score: give train=\('score',\)"):
        moe_lora.apply(Classifier(), config)
    model = moe_lora.apply(Classifier(), config, train=("score",))
    assert (
        model.score.weight.requires_grad and model.gate.w_gating.requires_grad and not model.body.weight.requires_grad
    )
    assert not moe_lora.apply(Classifier(), config, train=()).score.weight.requires_grad
    with pytest.raises(ValueError, match="train must name modules of the model, got none for head"):
        moe_lora.apply(Classifier(), config, train=("head",))


def test_dispatched_model_is_refused(tmp_path):
    from accelerate import cpu_offload

    model = cpu_offload(Net(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"hook of Accelerate at up.*apply first, then accelerate\.disp"):
        moe_lora.apply(model, CONFIG)


def test_offload_after_apply_gives_the_same():
    from accelerate import cpu_offload

    model, x = net(), torch.randn(4, 5, 6)
    with moe_lora.route(model, routing()), torch.no_grad():
        want = model(x)
        assert torch.equal(cpu_offload(model, execution_device=torch.device("cpu"))(x), want)


def test_transforms_without_a_rule_are_refused():
    model, x = net(), torch.randn(4, 5, 6)
    with moe_lora.route(model, routing()):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            model(forward_ad.make_dual(x, torch.ones_like(x)))
        for transform in (torch.func.grad(lambda x: model(x).sum()), torch.func.vmap(model.up)):
            with pytest.raises(NotImplementedError, match=r"no rule for torch\.func transforms"):
                transform(x)
        with forward_ad.dual_level():
            assert model(x).shape == x.shape


def test_seed_without_a_value_is_refused():
    layer = net().up
    arguments = (torch.randn(4, 6), layer.weight, layer.bias, layer.lora_a, layer.lora_b, routing(), 1.0, 0.5)
    with pytest.raises(ValueError, match="seed must have a value, got one on the meta device"):
        moe_lora.linear(*arguments, seed=torch.zeros((), dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_expert_reaches_only_who_uses_it(rows, which, value, packed):
    """On the reference backend, in each of its forms."""
    D, F, E, R = 6, 8, 4, 3
    x, weight = torch.randn(4, rows, D), torch.randn(F, D)
    a, b = torch.randn(E, D, R), torch.randn(E, R, F)
    (a if which == "lora_a" else b)[3, 1, 2] = value
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    gates = GATES.clone().requires_grad_()
    plan = Routing(EXPERTS, gates, torch.arange(5) * rows if packed else None)
    uses = (EXPERTS == 3).any(1)
    y = moe_lora.linear(x.flatten(0, 1) if packed else x, weight, None, a, b, plan, backend="reference").view(
        4, rows, F
    )
    y.backward(torch.ones_like(y))
    assert y[~uses].isfinite().all() and x.grad[~uses].isfinite().all() and gates.grad[~uses].isfinite().all()
    assert not y[uses].isfinite().all(-1).any()
    if which == "lora_a":
        assert not x.grad[uses].isfinite().all(-1).any()


def drawn(seed):
    """A random model and batch: layers, shapes, rows that follow the instances or not."""
    random.seed(seed)
    torch.manual_seed(seed)
    N, L = random.randint(1, 5), random.randint(1, 6)

    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(6, 6) for _ in range(random.randint(1, 4)))
            self.between = [random.choice(BETWEEN) for _ in self.steps]

        def forward(self, x):
            for step, (there, back) in zip(self.steps, self.between, strict=True):
                x = x + back(step(there(x)).relu_(), x)
            return x

    return spread(moe_lora.apply(Drawn(), CONFIG)), torch.randn(N, L, 6)


BETWEEN = (
    (lambda x: x, lambda y, x: y),
    (lambda x: x.flatten(0, 1), lambda y, x: y.view(x.shape)),
    (lambda x: x.mean(1), lambda y, x: y[:, None]),
    (lambda x: x[:, -1:], lambda y, x: y),
    (lambda x: x[:, :, None], lambda y, x: y[:, :, 0]),
    (lambda x: x.repeat(2, 1, 1), lambda y, x: y.view(2, *x.shape).sum(0)),
    (lambda x: x.flatten(0, 1)[: x.shape[0] * x.shape[1] // 2 + 1], lambda y, x: y.sum()),
    (lambda x: torch.cat([x, x], 1), lambda y, x: y[:, : x.shape[1]]),
)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_drawn_models_are_right_or_refused(count):
    right = refused = 0
    for seed in range(count):
        model, x = drawn(seed)
        experts = torch.stack([torch.randperm(4)[:2] for _ in x])
        gates = torch.rand(len(x), 2)
        with torch.no_grad():
            try:
                with moe_lora.route(model, Routing(experts, gates)):
                    together = model(x)
            except ValueError as error:
                assert "rows must be the batch's" in str(error)
                refused += 1
                continue
            assert BETWEEN[5] not in model.between, "twice the batch was taken"
            if BETWEEN[6] in model.between:  # such a model mixes instances: alone it computes something else
                assert len(x) == 1 or x.shape[1] == 1
                continue
            for i in range(len(x)):
                with moe_lora.route(model, Routing(experts[i : i + 1], gates[i : i + 1])):
                    alone = model(x[i : i + 1])
                torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        right += 1
    assert right > count / 10 and refused > count / 10
