"""Which backend runs a call, in which form: the one named, or for "auto" the fastest that works; see `autotune.py`.

A backend is a module with
    unavailable() -> None or the reason why it cannot run on this machine
    refuses(x, weight, lora_a, plan) -> None or the reason why it cannot run this call
    kernel(x, weight, lora_a, plan[, form]) -> (name of the kernel it would run, why that one)
    forward(x, weight, bias, lora_a, lora_b, plan[, form]) -> y, h
    backward(dy, x, weight, lora_a, lora_b, h, plan, needs[, form]) -> [dx, dA, dB, dgates], None where not needed
with h [T, K·R] as `reference` defines it. "auto" takes one without `backward` for the forward alone. One that has
several ways to run a call also has
    candidates(x, weight, lora_a, plan, needs) -> the names of those ways, its rule's first; `form` is then one of them
    candidates_group(x, weight, lora_a, plan, needs) -> the same for a group with this first member
and its backward takes every form of its forward.
A backend that can run a group of linears of one x together also has
    refuses_group(x, weights, lora_as, plan) -> None or the reason why it cannot, or why that would not pay
    forward_group(x, weights, biases, lora_as, lora_bs, plan[, form]) -> ys, hs
    backward_group(dys, x, weights, lora_as, lora_bs, hs, plan, needs[, form]) -> dx, [dA], [dB], dgates
with `needs` for x, the gates, each A, each B. One whose answers change while the process runs has `generation()`, an
object that changes with them.

A candidate is a backend and a form, written "triton/split"; `backend=` takes either. For "auto" one that raises,
or returns what it should not, is left out from then on, and the call goes on with the next.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from moe_lora.backend import autotune, cpu, cuda, reference
from moe_lora.backend.triton import backend
from moe_lora.routing import Plan, Routing

# In the order in which "auto" asks them, where none was timed.
_BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": backend,
    "cpu": cpu,
    "reference": reference,
}
_APART = "apart"  # of a group: each member by its own choice
_MOST_MEMORIES = 4096


class Candidate(NamedTuple):
    """One way to run a call: a backend, and of one with several ways its form."""

    name: str
    form: str = ""

    def __str__(self) -> str:
        return f"{self.name}/{self.form}" if self.form else self.name

    @property
    def module(self) -> Any:
        return _BACKENDS[self.name]

    def run(self, function: str, *arguments: Any) -> Any:
        """A function of the backend, told the form if there are several."""
        return getattr(self.module, function)(*arguments, *([self.form] if self.form else []))


class Request(NamedTuple):
    """What a choice depends on; `needs` is None for a forward."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    plan: Plan
    needs: tuple[bool, ...] | None = None

    @property
    def bucket(self) -> str:
        return autotune.bucket(*self)


@dataclass(frozen=True)
class Explanation:
    """The backend and kernel of one call, and why."""

    backend: str
    kernel: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.kernel}: {self.why}"


def backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run on this machine, or the reason why not.

    In the order in which "auto" asks them. One that can run here may still refuse a call: see `explain`.
    """
    return {name: module.unavailable() for name, module in _BACKENDS.items()}


def explain(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_a: Tensor | Sequence[Tensor],
    routing: Routing,
    backend: str = "auto",
) -> Explanation:
    """Which backend and kernel the forward of `linear` would run for this call, and why; of lists, `linear_group`.

    Nothing is run. Of tensors as they are, without autocast and dropout.

    Args:
        x, weight, lora_a, routing: as in `linear`; lists of weight and lora_a as in `linear_group`.
        backend: "auto", a name in `backends()`, or one and a form, as "triton/split".
    Returns:
        An `Explanation` with backend, kernel and why; prints as one line. Candidates that failed here are named.
    Raises:
        ValueError, TypeError: arguments disagree, there is no such backend, or it cannot run this call (says why).
    """
    if isinstance(weight, Sequence) and isinstance(lora_a, Sequence):
        if not weight or len(weight) != len(lora_a):
            raise ValueError(
                f"a group needs as many weights and lora_as, at least one, got {len(weight)} and {len(lora_a)}"
            )
        for member, a in zip(weight, lora_a, strict=True):
            _check(x, member, a, routing)
        return _explain_group(x, weight, lora_a, routing, backend)
    _check(x, weight, lora_a, routing)
    assert isinstance(weight, Tensor) and isinstance(lora_a, Tensor)
    request = Request(x, weight, lora_a, Plan(routing.experts, routing.gates, routing.offsets, 1.0, 0.0, None))
    chosen = ordered(backend, request)[0]
    name, asked = _resolve(backend)
    if name != "auto":
        reasons = [f"{asked} asks for {name}"]
    elif times := _known(request):
        reasons = ["forward timed here in ms: " + ", ".join(f"{one} {time:g}" for one, time in times.items())]
    else:
        before = list(_BACKENDS)[: list(_BACKENDS).index(chosen.name)]
        refused = {key: _reason(key, x, weight, lora_a, request.plan) for key in before}
        reasons = ["the first that can run", *(f"not {key}: {reason}" for key, reason in refused.items() if reason)]
    if name == "auto":
        failures = autotune.failures(request.bucket, x.device)
        reasons += [f"left out {failed}: {reason}" for failed, reason in failures.items()]
    kernel, why = chosen.run("kernel", x, weight, lora_a, request.plan)
    return Explanation(chosen.name, kernel, "; ".join([*reasons, why]))


def _check(x: object, weight: object, lora_a: object, routing: object) -> None:
    """Raises what `linear` raises for arguments of which nothing could be explained."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a moe_lora.Routing, got {type(routing).__name__}")
    for name, tensor in (("x", x), ("weight", weight), ("lora_a", lora_a)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    assert isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(lora_a, Tensor)
    if x.dim() == 0 or weight.dim() != 2 or lora_a.dim() != 3 or not x.shape[-1] == weight.shape[1] == lora_a.shape[1]:
        raise ValueError(
            "x must be [..., D], weight [F, D] and lora_a [E, D, R], got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(lora_a.shape)}"
        )
    routing.check(x.shape, lora_a.shape[0])


def _explain_group(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], routing: Routing, backend: str
) -> Explanation:
    plan = Plan(routing.experts, routing.gates, routing.offsets, 1.0, 0.0, None)
    chosen = ordered_group(backend, x, weights, lora_as, plan)[0]
    first, kernel, why = vars(explain(x, weights[0], lora_as[0], routing, backend)).values()
    if chosen is None:
        reason = _reason_group(first, x, weights, lora_as, plan) or "that is faster, by times or by rule"
        return Explanation(first, "one by one", f"{reason}; the first: {kernel}, {why}")
    kernel, why = chosen.run("kernel", x, weights[0], lora_as[0], plan)
    return Explanation(chosen.name, f"{len(weights)} together, {kernel}", why)


def run(
    backend: str,
    request: Request,
    attempt: Callable[[Candidate], Any],
    wrong: Callable[[Any], str | None],
) -> Any:
    """What the chosen candidate returns.

    Args:
        backend: "auto", a backend, or a candidate.
        request: the call.
        attempt: runs the call by a candidate.
        wrong: says what is wrong with what that returned; None if nothing.
    Raises:
        ValueError: a named backend does not exist or cannot run this call.
        Exception: whatever a named backend raises; with "auto", what the last candidate raised.
    """
    key = _key(backend, request)
    chosen = _memory.get(key)
    if chosen is not None:
        return attempt(chosen)
    x = request.x
    if _resolve(backend)[0] != "auto":
        chosen = ordered(backend, request)[0]
        result = attempt(chosen)
        _remember(key, chosen)
        return result
    able = ordered(backend, request)
    if len(able) > 1 and autotune.may_time(x.device) and not autotune.timed(request.bucket, x.device, able):
        runs = {str(candidate): partial(attempt, candidate) for candidate in able}
        autotune.time_all(request.bucket, x.device, runs, wrong)
        able = ordered(backend, request)
    return _first_that_works(key, request.bucket, x, able, attempt, wrong)


def run_group(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    plan: Plan,
    needs: tuple[bool, ...] | None,
    attempt: Callable[[Candidate | None], Any],
    wrong: Callable[[Any], str | None],
) -> Any:
    """As `run`, of linears of one x: together by a candidate, or, for None, each by its own choice."""
    able = ordered_group(backend, x, weights, lora_as, plan, needs)
    if _resolve(backend)[0] != "auto" or len(able) == 1:
        return attempt(able[0])
    bucket, names = _group_bucket(x, weights, lora_as, plan, needs), [_together(candidate) for candidate in able]
    if autotune.may_time(x.device) and not autotune.timed(bucket, x.device, names):
        runs = {_together(candidate): partial(attempt, candidate) for candidate in able}
        autotune.time_all(bucket, x.device, runs, wrong)
        able = ordered_group(backend, x, weights, lora_as, plan, needs)
    return _first_that_works(None, bucket, x, able, attempt, wrong)


def _first_that_works(
    key: tuple | None, bucket: str, x: Tensor, able: Sequence[Any], attempt: Callable, wrong: Callable
) -> Any:
    last: Exception | None = None
    for candidate in able:
        try:
            result = attempt(candidate)
            reason = wrong(result)
        except Exception as error:  # whatever a compiler, a driver or a kernel says
            last, reason = error, autotune.reason_of(error)
        if reason is None:
            if key is not None and last is None:
                _remember(key, candidate)
            return result
        last = last or RuntimeError(f"{_together(candidate)} returned {reason}")
        autotune.drop(bucket, x.device, _together(candidate), reason)
    assert last is not None
    raise last


def ordered(backend: str, request: Request) -> list[Candidate]:
    """The candidates for a call, the one to take first; ValueError if a named one does not exist or cannot run it."""
    x, weight, lora_a, plan, needs = request
    name, asked = _resolve(backend)
    if name == "auto":
        able = _able(request)
        times = autotune.known(request.bucket, x.device, [str(candidate) for candidate in able])
        return sorted(able, key=lambda candidate: list(times).index(str(candidate))) if times else able
    name, _, form = name.partition("/")
    if name not in _BACKENDS:
        raise ValueError(f"{asked} must be auto or one of {', '.join(_BACKENDS)}, got {name!r}")
    reason, of = _reason(name, x, weight, lora_a, plan), "" if asked == "backend" else f" of {asked}"
    if reason is not None:
        raise ValueError(f"backend {name}{of} cannot run this call: {reason}")
    if needs is not None and not differentiable(name):
        raise ValueError(f"backend {name} has no backward: use backend='auto', or torch.no_grad()")
    forms = _forms(name, request)
    if form and form not in forms and needs is None:
        one_of = ", ".join(filter(None, forms)) or "none, it has one way only"
        raise ValueError(f"backend {name}{of} cannot run this call as {form!r}; of its forms can: {one_of}")
    return [Candidate(name, form or forms[0])]


def ordered_group(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    plan: Plan,
    needs: tuple[bool, ...] | None = None,
) -> list[Candidate | None]:
    """As `ordered`, of linears of one x together; None is each by its own choice."""
    named, _ = _resolve(backend)
    name, _, form = named.partition("/")
    request, able = Request(x, weights[0], lora_as[0], plan, needs), list[Candidate | None]()
    for one in _BACKENDS if name == "auto" else (name,):
        if _reason_group(one, x, weights, lora_as, plan) is None:
            forms = [each for each in _forms(one, request, group=True) if not form or each == form]
            able += [Candidate(one, each) for each in forms]
            break
    if name != "auto":
        return able[:1] or [None]
    able.append(None)
    names = [_together(candidate) for candidate in able]
    bucket = _group_bucket(x, weights, lora_as, plan, needs)
    failed = autotune.failures(bucket, x.device)
    able = [candidate for candidate in able if candidate is None or _together(candidate) not in failed]
    if times := autotune.known(bucket, x.device, names):
        return sorted(able, key=lambda candidate: list(times).index(_together(candidate)))
    # by rule apart, where a backend that has no groups would take each member before the one that has
    if len(able) > 1 and needs is None:
        first = [_able(Request(x, weight, a, plan))[0].name for weight, a in zip(weights, lora_as, strict=True)]
        order = list(_BACKENDS)
        if all(order.index(one) < order.index(able[0].name) for one in first if able[0] is not None):
            able = [None, *able[:-1]]
    return able


def _together(candidate: Candidate | None) -> str:
    return _APART if candidate is None else str(candidate)


def _group_bucket(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan, needs: tuple[bool, ...] | None
) -> str:
    members = zip(weights, lora_as, strict=True)
    return "+".join(autotune.bucket(x, weight, lora_a, plan, needs) for weight, lora_a in members)


def _reason_group(name: str, x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why this backend does not run the group together."""
    module: Any = _BACKENDS.get(name)
    if module is None or not hasattr(module, "forward_group"):
        return "it runs the members one after the other"
    for weight, lora_a in zip(weights, lora_as, strict=True):
        if reason := _reason(name, x, weight, lora_a, plan):
            return reason
    return module.refuses_group(x, weights, lora_as, plan)


def differentiable(name: str) -> bool:
    """Whether a backend has a backward; "auto" always finds one."""
    return name == "auto" or hasattr(_BACKENDS[name.partition("/")[0]], "backward")


def forms(name: str, x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> tuple[str, ...]:
    """Every way in which a backend can run the forward of a call, as `backend=` takes them."""
    return tuple(str(Candidate(name, form)) for form in _forms(name, Request(x, weight, lora_a, plan)))


def _forms(name: str, request: Request, group: bool = False) -> tuple[str, ...]:
    """The backend's ways to run a call, its rule's first; the empty name where there is one only."""
    module: Any = _BACKENDS[name]
    if not hasattr(module, "candidates"):
        return ("",)
    return module.candidates_group(*request) if group else module.candidates(*request)


def _able(request: Request) -> list[Candidate]:
    """All that can run the call and have not failed to, in the order of the rule."""
    x, weight, lora_a, plan, needs = request
    names = [name for name in _BACKENDS if _reason(name, x, weight, lora_a, plan) is None]
    found = [
        Candidate(name, form)
        for name in names
        if needs is None or differentiable(name)
        for form in _forms(name, request)
    ]
    failed = autotune.failures(request.bucket, x.device)
    return [candidate for candidate in found if str(candidate) not in failed] or found[-1:]


def _known(request: Request) -> dict[str, float] | None:
    """Times of all that can run the call, fastest first, if all were timed."""
    return autotune.known(request.bucket, request.x.device, [str(candidate) for candidate in _able(request)])


def _resolve(backend: str) -> tuple[str, str]:
    """The name asked for, and by whom: the argument, or for "auto" the environment."""
    if backend != "auto":
        return backend, "backend"
    return os.environ.get("MOE_LORA_BACKEND", "auto"), "MOE_LORA_BACKEND"


def _reason(name: str, x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    return _BACKENDS[name].unavailable() or _BACKENDS[name].refuses(x, weight, lora_a, plan)


_memory: dict[tuple, Candidate] = {}  # what was chosen for a call, once it worked


def _key(backend: str, request: Request) -> tuple:
    """All that a choice depends on, quick to make."""
    x, weight, lora_a, plan, needs = request
    return (
        (autotune.generation(x.device), *[module.generation() for module in _changing(_BACKENDS)]),
        _resolve(backend)[0],
        x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15,
        weight.shape, weight.stride(), weight.data_ptr() & 15, lora_a.shape, lora_a.stride(), lora_a.dtype,
        plan.experts.shape, plan.offsets is None, plan.dropout > 0, needs,
    )  # fmt: skip


def _changing(modules: dict[str, ModuleType]) -> list[Any]:
    """The backends whose answers change while the process runs."""
    global _changing_of
    if _changing_of[0] is not modules:
        _memory.clear()
        _changing_of = modules, [module for module in modules.values() if hasattr(module, "generation")]
    return _changing_of[1]


_changing_of: tuple[dict[str, ModuleType] | None, list[Any]] = None, []


def _remember(key: tuple, chosen: Candidate) -> None:
    if len(_memory) >= _MOST_MEMORIES or (_memory and next(iter(_memory))[0] != key[0]):
        _memory.clear()
    _memory[key] = chosen
