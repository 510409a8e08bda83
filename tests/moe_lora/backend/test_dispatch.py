"""Which backend runs: by name, by environment, by itself; and what it says about it."""

from types import SimpleNamespace

import moe_lora
import pytest
import torch
from moe_lora.__main__ import main
from moe_lora.backend import dispatch, reference


def arguments(N=2, L=5):
    routing = moe_lora.Routing(torch.tensor([[0, 1]] * N), torch.rand(N, 2))
    return torch.randn(N, L, 7), torch.randn(6, 7), torch.randn(4, 7, 3), routing


def fake(unavailable=None, refuses=None):
    return SimpleNamespace(
        unavailable=lambda: unavailable,
        refuses=lambda x, *_: refuses if x.shape[-2] < 3 else None,
        describe=lambda *_: ("tile", "it is fast"),
        forward=lambda x, weights, biases, lora_as, lora_bs, plan, form: (
            [x.new_zeros(*x.shape[:-1], weight.shape[0]) for weight in weights],
            [x.new_zeros(x.shape[:-1].numel(), plan.experts.shape[1] * a.shape[2]) for a in lora_as],
        ),
    )


@pytest.fixture
def three(monkeypatch):
    """Before the reference: one that is not built, one that wants three rows."""
    backends = {"absent": fake("not built"), "picky": fake(None, "wants 3 rows"), "reference": reference}
    monkeypatch.setattr(dispatch, "_BACKENDS", backends)
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setenv("MOE_LORA_BACKEND", "rule")


def test_backends_names_the_reference_as_able():
    assert moe_lora.backends()["reference"] is None


def test_backends_gives_reasons(three):
    assert moe_lora.backends() == {"absent": "not built", "picky": None, "reference": None}


def test_auto_takes_the_first_that_can(three):
    assert moe_lora.explain(*arguments()).backend == "picky"
    found = moe_lora.explain(*arguments(L=2))
    assert found.backend == "reference"
    assert str(found).startswith(
        "reference/gather: the first that can run; not absent: not built; not picky: wants 3 rows"
    )


def test_linear_runs_what_explain_says(three):
    x, weight, lora_a, routing = arguments()
    lora_b = torch.randn(4, 3, 6)
    assert (moe_lora.linear(x, weight, None, lora_a, lora_b, routing) == 0).all()
    assert (moe_lora.linear(x, weight, None, lora_a, lora_b, routing, backend="reference") != 0).any()


def test_explain_bad_input_is_refused():
    x, weight, lora_a, routing = arguments()
    with pytest.raises(TypeError, match=r"routing must be a moe_lora\.Routing, got NoneType"):
        moe_lora.explain(x, weight, lora_a, None)
    with pytest.raises(TypeError, match="lora_a must be a tensor, got list"):
        moe_lora.explain(x, weight, [lora_a], routing)
    with pytest.raises(ValueError, match=r"weight \[F, D\] and .*, got \(2, 5, 7\), \(7, 6\) and \(4, 7, 3\)"):
        moe_lora.explain(x, weight.t(), lora_a, routing)
    with pytest.raises(ValueError, match="the routing's 2 instances must be"):
        moe_lora.explain(x[:1], weight, lora_a, routing)
    with pytest.raises(ValueError, match="as many weights and lora_as, at least one, got 2 and 1"):
        moe_lora.explain(x, [weight, weight], [lora_a], routing)


def test_named_backend_runs_or_raises(three):
    with pytest.raises(ValueError, match="backend absent cannot run this call: not built"):
        moe_lora.explain(*arguments(), backend="absent")
    with pytest.raises(ValueError, match="backend picky cannot run this call: wants 3 rows"):
        moe_lora.explain(*arguments(L=2), backend="picky")
    with pytest.raises(ValueError, match="backend must be auto, rule or one of absent, picky, reference, got 'warp'"):
        moe_lora.explain(*arguments(), backend="warp")
    assert moe_lora.explain(*arguments(), backend="reference").why.startswith("backend asks for reference; ")


def test_environment_decides_for_auto_only(three, monkeypatch):
    monkeypatch.setenv("MOE_LORA_BACKEND", "reference")
    assert moe_lora.explain(*arguments()).why.startswith("MOE_LORA_BACKEND asks for reference; ")
    assert moe_lora.explain(*arguments(), backend="picky").backend == "picky"
    monkeypatch.setenv("MOE_LORA_BACKEND", "warp")
    with pytest.raises(ValueError, match=r"MOE_LORA_BACKEND must be auto, rule or one of .*, got 'warp'"):
        moe_lora.explain(*arguments())
    monkeypatch.setenv("MOE_LORA_BACKEND", "absent")
    with pytest.raises(ValueError, match="backend absent of MOE_LORA_BACKEND cannot run this call: not built"):
        moe_lora.explain(*arguments())


@pytest.mark.parametrize(
    "T, N, K, E, form",
    [(1760, 16, 2, 4, "gather"), (1760, 1760, 2, 4, "concat"), (1, 1, 2, 4, "gather"), (512, 512, 2, 64, "loop")],
)
def test_form_of_usual_shapes(T, N, K, E, form):
    x, routing = torch.zeros(N, T // N, 7), moe_lora.Routing(torch.zeros(N, K).int(), torch.rand(N, K))
    assert moe_lora.explain(x, torch.zeros(6, 7), torch.zeros(E, 7, 3), routing, "reference").kernel == form


def test_packed_rows_are_told():
    x, weight, lora_a, routing = arguments()
    packed = moe_lora.Routing(routing.experts, routing.gates, torch.tensor([0, 3, 10]))
    found = moe_lora.explain(x.view(10, 7), weight, lora_a, packed, "reference")
    assert found.kernel == "concat" and "packed" in found.why


def test_self_check_passes_and_prints_a_table(capsys):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all right" and any(line.split()[:3] == ["reference/loop", "cpu", "bfloat16"] for line in lines)


def test_self_check_sees_a_wrong_backend(monkeypatch, capsys):
    wrong = SimpleNamespace(
        **{name: getattr(reference, name) for name in ("unavailable", "refuses", "describe", "backward")}
    )
    wrong.forward = lambda x, *rest: tuple([1.1 * tensors[0]] for tensors in reference.forward(x, *rest[:5]))
    monkeypatch.setattr(dispatch, "_BACKENDS", {"reference": wrong})
    monkeypatch.setattr(dispatch, "_decisions", {})
    assert main() == 1
    assert "WRONG" in capsys.readouterr().out.splitlines()[-1]


def test_self_check_names_what_cannot_run(monkeypatch, capsys):
    def forward(*_):
        raise RuntimeError("out of resource: shared memory")

    broken = SimpleNamespace(unavailable=lambda: None, refuses=reference.refuses, forward=forward)
    monkeypatch.setattr(dispatch, "_BACKENDS", {"broken": broken, "reference": reference})
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("LEFT OUT: RuntimeError: out of resource: shared memory" in line for line in lines) == 12
    assert lines[-2:] == ["12 cannot run on this device: auto goes on without them", "all right"]


class Doubled:
    """A stranger's backend: it wraps the reference and counts its calls."""

    def __init__(self):
        self.calls = 0

    def unavailable(self):
        return None

    def refuses(self, x, weights, lora_as, plan):
        return "one linear at a time" if len(weights) > 1 else None

    def forward(self, x, weights, biases, lora_as, lora_bs, plan, form):
        self.calls += 1
        return reference.forward(x, weights, biases, lora_as, lora_bs, plan)

    def backward(self, dys, x, weights, lora_as, lora_bs, hs, plan, needs, form):
        return reference.backward(dys, x, weights, lora_as, lora_bs, hs, plan, needs)


def test_registered_backend_runs_by_name_by_rule_and_in_groups(three):
    stranger = Doubled()
    moe_lora.register_backend("stranger", stranger, before="picky")
    assert list(moe_lora.backends()) == ["absent", "stranger", "picky", "reference"]
    x, weight, lora_a, routing = arguments()
    lora_b = torch.randn(4, 3, 6).requires_grad_()
    moe_lora.linear(x, weight, None, lora_a, lora_b, routing).sum().backward()
    assert stranger.calls == 1 and lora_b.grad is not None
    ys = moe_lora.linear_group(x, [weight] * 2, [None] * 2, [lora_a] * 2, [lora_b] * 2, routing, backend="stranger")
    assert stranger.calls == 3 and torch.equal(*ys)


def test_registry_refuses_what_is_no_backend(three):
    with pytest.raises(TypeError, match="must have unavailable, refuses and forward, got none for refuses, forward"):
        moe_lora.register_backend("half", SimpleNamespace(unavailable=lambda: None))
    with pytest.raises(ValueError, match="name must not be auto"):
        moe_lora.register_backend("auto", Doubled())
    with pytest.raises(ValueError, match="before must be one of absent, picky, reference, got 'nobody'"):
        moe_lora.register_backend("stranger", Doubled(), before="nobody")


def test_form_can_be_named(three):
    x, weight, lora_a, routing = arguments()
    lora_b = torch.randn(4, 3, 6)
    ys = [
        moe_lora.linear(x, weight, None, lora_a, lora_b, routing, backend=f"reference/{form}")
        for form in ("gather", "concat", "loop")
    ]
    assert all(torch.allclose(y, ys[0], atol=1e-5) for y in ys)
    with pytest.raises(ValueError, match="cannot run this call as 'warp'; its forms: gather, concat, loop"):
        moe_lora.linear(x, weight, None, lora_a, lora_b, routing, backend="reference/warp")


def test_installed_backends_are_found_and_broken_ones_left_out(three, monkeypatch):
    good = SimpleNamespace(name="stranger", value="a:b", load=Doubled)
    bad = SimpleNamespace(name="broken", value="c:d", load=lambda: 1 / 0)
    monkeypatch.setattr(dispatch, "entry_points", lambda group: [bad, good])
    monkeypatch.setattr(dispatch, "_found_entry_points", False)
    with pytest.warns(UserWarning, match=r"backend broken \(c:d\) is left out: ZeroDivisionError"):
        names = list(moe_lora.backends())
    assert names == ["absent", "picky", "stranger", "reference"]
