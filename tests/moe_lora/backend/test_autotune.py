"""Timed choices: by bucket, kept on disk, carried on, and not made where they must not be."""

import json
from types import SimpleNamespace

import moe_lora
import pytest
import torch
from moe_lora.__main__ import print_speed
from moe_lora.backend import autotune, dispatch, reference

TIMES = {"slow": 3.0, "quick": 1.0, "reference": 2.0}


def backend(name, log):
    def forward(x, weights, biases, lora_as, lora_bs, plan, form):
        log.append(name)
        return reference.forward(x, weights, biases, lora_as, lora_bs, plan)

    def backward(dys, x, weights, lora_as, lora_bs, hs, plan, needs, form):
        log.append(name + " back")
        return reference.backward(dys, x, weights, lora_as, lora_bs, hs, plan, needs)

    able = {"unavailable": lambda: None, "refuses": reference.refuses, "describe": lambda *_: (name, "why")}
    return SimpleNamespace(**able, forward=forward, backward=backward)


@pytest.fixture
def log(monkeypatch, tmp_path):
    """Three backends with scripted times."""
    log = []
    monkeypatch.setattr(dispatch, "_BACKENDS", {name: backend(name, log) for name in TIMES})
    monkeypatch.setattr(autotune, "_state", autotune.State())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOE_LORA_BACKEND", raising=False)

    def milliseconds(run, device):
        before = len(log)
        run()
        return TIMES[log[-1].split()[0]] if len(log) > before else 0.5

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    return log


def arguments(T=6, D=8):
    routing = moe_lora.Routing(torch.tensor([[0, 1]] * 2), torch.rand(2, 2))
    return torch.randn(2, T // 2, D), torch.randn(5, D), None, torch.randn(3, D, 4), torch.randn(3, 4, 5), routing


def test_fastest_runs_and_is_timed_once(log):
    moe_lora.linear(*arguments())
    assert log[-1] == "quick" and log.count("slow") == autotune._WARM_UP + 1, "far from the fastest: one sample"
    del log[:]
    moe_lora.linear(*arguments())
    assert log == ["quick"]


def test_close_candidates_are_timed_over_rounds(log, monkeypatch):
    monkeypatch.setitem(TIMES, "reference", 1.2)
    moe_lora.linear(*arguments())
    assert log.count("reference") == autotune._WARM_UP + 1 + autotune._ROUNDS
    assert log.count("quick") == log.count("reference") + 1 and log.count("slow") == autotune._WARM_UP + 1


def test_backward_is_timed_for_itself(log):
    inputs = arguments()
    inputs[3].requires_grad_()
    moe_lora.linear(*inputs).sum().backward()
    assert log[-1] == "quick back" and "slow back" in log


def test_choice_survives_the_process(log, monkeypatch):
    moe_lora.linear(*arguments())
    del log[:]
    monkeypatch.setattr(autotune, "_state", autotune.State())
    moe_lora.linear(*arguments())
    assert log == ["quick"]
    (machine,) = json.loads(autotune.path().read_text())
    assert torch.__version__ in machine and f"{torch.get_num_threads()} threads" in machine


def test_files_of_others_are_kept_and_broken_ones_replaced(log):
    autotune.path().parent.mkdir(parents=True)
    autotune.path().write_text(json.dumps({"another machine": {"bucket": {"quick": 9.0}}}))
    moe_lora.linear(*arguments())
    assert json.loads(autotune.path().read_text())["another machine"] == {"bucket": {"quick": 9.0}}
    autotune.path().write_text("{")
    moe_lora.linear(*arguments(T=40))
    assert len(json.loads(autotune.path().read_text())) >= 1


def test_bucket_rounds_rows_and_nothing_else(log):
    def name(**change):
        x, weight, _, lora_a, _, routing = arguments(**change)
        return autotune.bucket(
            x, [weight], [lora_a], moe_lora.ops.Plan(routing.experts, routing.gates, None, 1.0, 0.0, None)
        )

    assert name(T=6) == name(T=8) != name(T=10)
    assert name() != name(D=9)


def test_nothing_is_timed_where_it_must_not_be(log, monkeypatch):
    monkeypatch.setattr(autotune, "may_time", lambda device: False)
    moe_lora.linear(*arguments())
    assert log == ["slow"]


def test_may_time(monkeypatch):
    device = torch.device("cuda")
    assert autotune.may_time(torch.device("cpu")) and not autotune.may_time(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert autotune.may_time(device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.may_time(device)


BAD = {
    "raises": lambda *_: 1 / 0,
    "returns nothing": lambda *_: None,
    "returns y alone": lambda x, weights, *_: ([x.new_zeros(*x.shape[:-1], weights[0].shape[0])], [x.new_zeros(3)]),
    "returns a wrong dtype": lambda *call: tuple([one.double()] for (one,) in reference.forward(*call[:6])),
}


@pytest.mark.parametrize("times", [True, False], ids=["timed", "by rule"])
@pytest.mark.parametrize("bad", BAD)
def test_candidate_that_fails_is_left_out_and_named(bad, times, log, monkeypatch):
    monkeypatch.setattr(autotune, "may_time", lambda device: times)
    for name in ("slow", "quick"):
        dispatch._BACKENDS[name].forward = BAD[bad]
    x, weight, _, lora_a, _, routing = inputs = arguments()
    y = moe_lora.linear(*inputs)
    assert torch.equal(y, moe_lora.linear(*inputs, backend="reference"))
    found = moe_lora.explain(x, weight, lora_a, routing)
    assert found.backend == "reference" and "left out slow: " in found.why
    assert "ZeroDivisionError: division by zero" in found.why or bad != "raises"
    log.clear()
    moe_lora.linear(*inputs)
    assert log == ["reference"]


@pytest.mark.parametrize("times", [True, False], ids=["timed", "by rule"])
@pytest.mark.parametrize(
    "bad",
    [lambda *_: 1 / 0, lambda *_: (torch.ones(2), [torch.ones(2)], [torch.ones(2)], torch.ones(2))],
    ids=["raises", "wrong shapes"],
)
def test_training_goes_on_when_a_backward_fails(bad, times, log, monkeypatch):
    monkeypatch.setattr(autotune, "may_time", lambda device: times)
    for name in ("slow", "quick"):
        dispatch._BACKENDS[name].backward = bad
    inputs = arguments()
    leaves = [inputs[0].requires_grad_(), inputs[3].requires_grad_(), inputs[4].requires_grad_()]
    grads = torch.autograd.grad(moe_lora.linear(*inputs).sum(), leaves)
    wanted = torch.autograd.grad(moe_lora.linear(*inputs, backend="reference").sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(grads, wanted, strict=True))
    assert log[-1] == "reference back"


def test_last_candidate_raises_what_it_says(log, monkeypatch):
    for module in dispatch._BACKENDS.values():
        module.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        moe_lora.linear(*arguments())


def test_failure_survives_the_process(log, monkeypatch):
    dispatch._BACKENDS["quick"].forward = BAD["raises"]
    moe_lora.linear(*arguments())
    monkeypatch.setattr(autotune, "_state", autotune.State())
    del log[:]
    moe_lora.linear(*arguments())
    assert log == ["reference"]


def test_named_backend_that_fails_raises(log):
    dispatch._BACKENDS["quick"].forward = BAD["raises"]
    with pytest.raises(ZeroDivisionError):
        moe_lora.linear(*arguments(), backend="quick")


def test_forms_of_a_backend_are_timed_each(log, monkeypatch):
    def forward(*call):
        log.append(f"slow/{call[-1]}")
        return reference.forward(*call[:-1])

    slow = dispatch._BACKENDS["slow"]
    slow.forms, slow.forward = lambda *_: ("one", "two"), forward
    slow.describe = lambda *call: (call[-1], "why")
    monkeypatch.setattr(autotune, "milliseconds", lambda run, _: run() and {"slow/two": 0.1}.get(log[-1], 1.0))
    x, weight, _, lora_a, _, routing = inputs = arguments()
    moe_lora.linear(*inputs)
    assert log[-1] == "slow/two" and moe_lora.explain(x, weight, lora_a, routing).kernel == "two"
    moe_lora.linear(*inputs, backend="slow")
    assert log[-1] == "slow/one"
    moe_lora.linear(*inputs, backend="slow/two")
    assert log[-1] == "slow/two"
    with pytest.raises(ValueError, match="cannot run this call as 'three'; its forms: one, two"):
        moe_lora.linear(*inputs, backend="slow/three")
    with pytest.raises(ValueError, match="its forms: none, it has one way only"):
        moe_lora.linear(*inputs, backend="quick/one")


def test_captured_calls_go_by_replayed_times(log, monkeypatch):
    x, weight, _, lora_a, _, routing = inputs = arguments()
    moe_lora.linear(*inputs)
    plan = moe_lora.ops.Plan(routing.experts, routing.gates, None, 1.0, 0.0, None)
    name = autotune.bucket(x, [weight], [lora_a], plan)
    autotune._record(name + autotune._REPLAYED, x.device, {"slow": 0.1, "quick": 0.2, "reference": 0.3})
    monkeypatch.setattr(autotune, "may_time", lambda device: False)
    moe_lora.linear(*inputs)
    assert log[-1] == "quick"
    monkeypatch.setattr(autotune, "capturing", lambda device: True)
    moe_lora.linear(*inputs)
    assert log[-1] == "slow"


def test_forward_alone_is_not_asked_for_a_backward(log, monkeypatch):
    del dispatch._BACKENDS["quick"].backward
    inputs = arguments()
    inputs[3].requires_grad_()
    moe_lora.linear(*inputs).sum().backward()
    assert "quick" in log and log[-1] == "reference back"
    with pytest.raises(ValueError, match="backend quick cannot run this call: it has no backward"):
        moe_lora.linear(*inputs, backend="quick").sum().backward()


def test_explain_tells_the_times(log):
    x, weight, _, lora_a, _, routing = inputs = arguments()
    assert moe_lora.explain(x, weight, lora_a, routing).backend == "slow"
    moe_lora.linear(*inputs)
    found = moe_lora.explain(x, weight, lora_a, routing)
    assert found.backend == "quick"
    assert found.why.startswith("forward timed here in ms: quick 1, reference 2, slow 3; ")


def test_named_backend_is_not_timed(log):
    moe_lora.linear(*arguments(), backend="slow")
    assert log == ["slow"]


def test_self_check_prints_times(log, capsys):
    print_speed(torch.device("cpu"), torch.float32, ((2, 3, 8, 8),), rounds=2)
    header, line = capsys.readouterr().out.strip().splitlines()
    assert header.split()[-4:] == ["slow", "quick", "reference", "auto"]
    assert line.startswith("2x3, 8 -> 8") and line.count("x)") == 4


@pytest.mark.parametrize("takes, together", [(0.5, True), (9.0, False)], ids=["together", "apart"])
def test_group_runs_together_where_that_is_faster(takes, together, log, monkeypatch):
    slow = dispatch._BACKENDS["slow"]
    alone = slow.forward

    def forward(x, weights, biases, lora_as, lora_bs, plan, form):
        if len(weights) == 1:
            return alone(x, weights, biases, lora_as, lora_bs, plan, form)
        members = zip(weights, biases, lora_as, lora_bs, strict=True)
        pairs = [reference.forward(x, *([tensor] for tensor in member), plan) for member in members]
        log.append("group")
        return [y for (y,), _ in pairs], [h for _, (h,) in pairs]

    slow.forward, slow.refuses = forward, lambda *_: None
    monkeypatch.setitem(TIMES, "group", takes)
    x, weight, bias, lora_a, lora_b, routing = arguments()
    lists = ([weight] * 2, [bias] * 2, [lora_a] * 2, [lora_b] * 2)
    moe_lora.linear_group(x, *lists, routing)
    assert log.count("group") > autotune._WARM_UP
    del log[:]
    first, second = moe_lora.linear_group(x, *lists, routing)
    assert log == (["group"] if together else ["quick", "quick"])
    assert torch.equal(first, second)
    found = moe_lora.explain(x, lists[0], lists[2], routing)
    assert (found.backend, found.kernel) == (("slow", "2 together, slow") if together else ("quick", "one by one"))


def test_imported_choices_count(log, monkeypatch):
    moe_lora.linear(*arguments())
    choices = moe_lora.export_choices()
    assert list(choices.values()) == ["quick"]
    moe_lora.import_choices(dict.fromkeys(choices, "slow"))
    del log[:]
    moe_lora.linear(*arguments())
    assert log == ["slow"]
    x, weight, _, lora_a, _, routing = arguments()
    assert "the run that this one continues chose it" in moe_lora.explain(x, weight, lora_a, routing).why
    moe_lora.import_choices(dict.fromkeys(choices, "gone"))
    moe_lora.linear(*arguments())
    assert log[-1] == "quick"
    with pytest.raises(TypeError, match="choices must be a dict"):
        moe_lora.import_choices(["slow"])


def test_unwritable_cache_costs_nothing_but_the_file(log, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    moe_lora.linear(*arguments())
    assert log[-1] == "quick"


def test_rule_is_not_timed(log, monkeypatch):
    moe_lora.linear(*arguments(), backend="rule")
    monkeypatch.setenv("MOE_LORA_BACKEND", "rule")
    moe_lora.linear(*arguments())
    assert log == ["slow", "slow"]
