"""Which candidate runs a call: the backend named, or for "auto" the fastest here, see `autotune.py`.

A backend is any object (a module, say) with

    unavailable() -> None, or the reason why it cannot run on this machine
    refuses(x, weights, lora_as, plan) -> None, or the reason why it cannot run this call
    forward(x, weights, biases, lora_as, lora_bs, plan, form) -> ys, hs
    backward(dys, x, weights, lora_as, lora_bs, hs, plan, needs, form) -> dx, das, dbs, dgates

for a group of linears of one x, often of one member; h [T, K·R] is as `reference` defines it, and `needs` says which
gradients are wanted: of x, of the gates, of each A, of each B; None stands for what is not. A backend that refuses
groups runs their members one after the other. It may also have

    forms(x, weights, lora_as, plan, needs) -> names of its ways to run this call, that of its rule first ("" without);
        its backward takes every form of its forward
    describe(x, weights, lora_as, plan, form) -> (name of the kernel, why that one), for `explain`
    FORMS, all names that `forms` may give, where it leaves out what is not worth timing
    generation() -> an object that changes with the answers of these functions, where they change in a process

`needs` is None for a forward. One without `backward` runs the forward alone. A candidate is a backend and a form,
written "triton/split"; `backend=` takes either. For "auto" one that raises, or returns what it should not, is left out
from then on, and the call goes on with the next. `register_backend` adds one; so does a
package with an entry point of the group `moe_lora.backends` that names such an object.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from moe_lora.backend import autotune, cpu, cuda, reference
from moe_lora.backend.triton import backend as triton
from moe_lora.routing import Plan, Routing

Result = TypeVar("Result")
APART = "apart"  # the candidate of a group whose members run one after the other
# In the order in which the rule asks them.
_BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
_found_entry_points = False
_decisions: dict[tuple, str] = {}  # what calls of one key run, while nothing changes it
_MAX_DECISIONS = 4096


@dataclass(frozen=True)
class Explanation:
    """The backend and kernel of one call, and why."""

    backend: str
    kernel: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.kernel}: {self.why}"


def register_backend(name: str, backend: Any, before: str = "reference") -> None:
    """Add a backend, or replace one of that name; "auto" times it beside the others.

    Args:
        name: what `backend=` and MOE_LORA_BACKEND call it.
        backend: an object with `unavailable`, `refuses` and `forward`, and as a rule `backward`, as this module says.
        before: the backend that the rule, where nothing is timed, asks after this one.
    Raises:
        TypeError: the object lacks a function. ValueError: the name is taken by the rule, or `before` is unknown.
    """
    lacking = [part for part in ("unavailable", "refuses", "forward") if not callable(getattr(backend, part, None))]
    if lacking:
        raise TypeError(f"backend {name} must have unavailable, refuses and forward, got none for {', '.join(lacking)}")
    if not name or name in ("auto", "rule") or "/" in name:
        raise ValueError(f"name must not be auto, rule or hold a slash, got {name!r}")
    if before not in _BACKENDS:
        raise ValueError(f"before must be one of {', '.join(_BACKENDS)}, got {before!r}")
    others = [(other, part) for other, part in _BACKENDS.items() if other != name]
    place = next((i for i, (other, _) in enumerate(others) if other == before), len(others))
    others.insert(place, (name, backend))
    _BACKENDS.clear()
    _BACKENDS.update(others)
    _changing_of[0] = None


def registered() -> dict[str, Any]:
    """The backends by name, in the order of the rule, with those of installed packages."""
    global _found_entry_points
    if not _found_entry_points:
        _found_entry_points = True
        for entry in entry_points(group="moe_lora.backends"):
            try:
                register_backend(entry.name, entry.load())
            except Exception as error:  # a package of somebody else may be broken in any way
                warnings.warn(
                    f"backend {entry.name} ({entry.value}) is left out: {autotune.reason_of(error)}", stacklevel=2
                )
    return _BACKENDS


def backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run on this machine, or the reason why not.

    They come in the order of the rule. One that can run here may still refuse a call: see `explain`.
    """
    return {name: backend.unavailable() for name, backend in registered().items()}


def differentiable(name: str) -> bool:
    """Whether a backend has a backward; "auto" always finds one."""
    return name in ("auto", "rule") or hasattr(registered()[name.partition("/")[0]], "backward")


class Call(NamedTuple):
    """What is to be run: a group of linears of one x, forward, or with `needs` backward."""

    backend: str
    x: Tensor
    weights: Sequence[Tensor]
    lora_as: Sequence[Tensor]
    plan: Plan
    needs: tuple[bool, ...] | None = None

    def run(self, attempt: Callable[[str], Result], wrong: Callable[[Result], str | None]) -> Result:
        """What the chosen candidate returns; "auto" times the candidates first where it may.

        Args:
            attempt: runs the call by a candidate.
            wrong: says what is wrong with what that returned; None if nothing.
        Raises:
            ValueError: a named backend does not exist or cannot run this call.
            Exception: whatever a named backend raises; with "auto", what the last candidate raised.
        """
        key = self._key()
        candidate = _decisions.get(key)
        if candidate is not None:
            return attempt(candidate)
        candidates, name = self.candidates(), _resolve(self.backend)[0]
        if name not in ("auto", "rule"):
            _remember(key, candidates[0])
            return attempt(candidates[0])
        device, bucket = self.x.device, self.bucket()
        by_time = name == "auto" and len(candidates) > 1 and not autotune.fixed(bucket, candidates)
        if by_time and autotune.may_time(device) and not autotune.timed(bucket, device, candidates):
            runs: dict[str, Callable[[], object]] = {c: partial(attempt, c) for c in candidates}
            autotune.time_all(bucket, device, runs, wrong)
        return self._first_that_works(key, self.ordered(), attempt, wrong)

    def _first_that_works(self, key: tuple, order: list[str], attempt: Callable, wrong: Callable) -> Any:
        bucket, last = self.bucket(), None
        for candidate in order:
            try:
                result = attempt(candidate)
                reason = wrong(result)
            except Exception as error:  # whatever a compiler, a driver or a kernel says
                last, reason = error, autotune.reason_of(error)
            if reason is None:
                autotune.use(bucket, candidate)
                if last is None:
                    _remember(key, candidate)
                return result
            last = last or RuntimeError(f"{candidate} returned {reason}")
            autotune.drop(bucket, self.x.device, candidate, reason)
        assert last is not None
        raise last

    def ordered(self) -> list[str]:
        """The candidates, the one to take first: as an earlier run chose, by time, or by rule; failed ones left out."""
        candidates, name = self.candidates(), _resolve(self.backend)[0]
        if name not in ("auto", "rule"):
            return candidates
        bucket, device = self.bucket(), self.x.device
        failed = autotune.failures(bucket, device)
        able = [candidate for candidate in candidates if candidate not in failed] or candidates[-1:]
        if name == "auto":
            first = autotune.fixed(bucket, able)
            times = autotune.known(bucket, device, able) or {}
            order = [*([first] if first else []), *times, *able]
            return list(dict.fromkeys(order))
        return able

    def candidates(self) -> list[str]:
        """What may run this call, as "backend/form" or APART, the rule's choice first; of a named backend one.

        Raises:
            ValueError: the named backend does not exist or cannot run this call.
        """
        name, asked = _resolve(self.backend)
        if name in ("auto", "rule"):
            able = [other for other in registered() if self.reason(other) is None]
            found = [_join(other, form) for other in able for form in self._forms(other)]
            if len(self.weights) == 1:
                return found
            return [APART, *found] if not able or self._apart_by_rule(able[0]) else [*found, APART]
        name, _, form = name.partition("/")
        of = "" if asked == "backend" else f" of {asked}"
        if name not in registered():
            raise ValueError(f"{asked} must be auto, rule or one of {', '.join(registered())}, got {name!r}")
        if reason := self.reason(name):
            if len(self.weights) > 1:
                return [APART]
            raise ValueError(f"backend {name}{of} cannot run this call: {reason}")
        forms = getattr(registered()[name], "FORMS", None) or self._forms(name)
        if form and form not in forms and self.needs is None:
            one_of = ", ".join(filter(None, forms)) or "none, it has one way only"
            raise ValueError(f"backend {name}{of} cannot run this call as {form!r}; its forms: {one_of}")
        return [_join(name, form or self._forms(name)[0])]

    def _apart_by_rule(self, together: str) -> bool:
        """Whether a backend that has no groups would take each member before the one that would take them together."""
        order = list(registered())
        members = zip(self.weights, self.lora_as, strict=True)
        alone = [self._replace(weights=[weight], lora_as=[lora_a], needs=None) for weight, lora_a in members]
        firsts = [next(name for name in order if call.reason(name) is None) for call in alone]
        return self.needs is None and all(order.index(first) < order.index(together) for first in firsts)

    def reason(self, name: str) -> str | None:
        """Why a backend cannot run this call, or None."""
        backend = registered()[name]
        if reason := backend.unavailable() or backend.refuses(self.x, self.weights, self.lora_as, self.plan):
            return reason
        if self.needs is not None and not differentiable(name):
            return "it has no backward: use backend='auto', or torch.no_grad()"
        return None

    def _forms(self, name: str) -> Sequence[str]:
        forms = getattr(registered()[name], "forms", None)
        return ("",) if forms is None else forms(self.x, self.weights, self.lora_as, self.plan, self.needs)

    def bucket(self) -> str:
        return autotune.bucket(self.x, self.weights, self.lora_as, self.plan, self.needs)

    def _key(self) -> tuple:
        """All that a choice depends on, quick to make."""
        x, plan = self.x, self.plan
        return (
            (autotune.generation(x.device), *[backend.generation() for backend in _changing()]),
            _resolve(self.backend)[0], self.needs,
            x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15,
            *[(w.shape, w.stride(), w.dtype, w.data_ptr() & 15) for w in self.weights],
            *[(a.shape, a.stride(), a.dtype) for a in self.lora_as],
            plan.experts.shape, plan.offsets is None, plan.dropout > 0,
        )  # fmt: skip


def forms_of(name: str, x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> list[str]:
    """Every way in which a backend can run the forward of a call, as `backend=` takes them."""
    backend, call = registered()[name], Call(name, x, [weight], [lora_a], plan)
    return [_join(name, form) for form in getattr(backend, "FORMS", None) or call._forms(name)]


def named(candidate: str) -> tuple[Any, str]:
    """The backend and the form that a candidate names."""
    name, _, form = candidate.partition("/")
    return registered()[name], form


def explain(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_a: Tensor | Sequence[Tensor],
    routing: Routing,
    backend: str = "auto",
) -> Explanation:
    """Which backend and kernel the forward of `linear` would run for this call, and why; of lists, `linear_group`.

    Nothing is run. Autocast and dropout are not looked at.

    Args:
        x, weight, lora_a, routing: as in `linear`; lists of weight and lora_a as in `linear_group`.
        backend: "auto", "rule", a name in `backends()`, or one and a form, as "reference/concat".
    Returns:
        An `Explanation` with backend, kernel and why; prints as one line. Candidates that failed here are named.
    Raises:
        ValueError, TypeError: arguments disagree, there is no such backend, or it cannot run this call (says why).
    """
    together = isinstance(weight, Sequence) and isinstance(lora_a, Sequence)
    weights: list[Any] = list(weight) if together else [weight]
    lora_as: list[Any] = list(lora_a) if together else [lora_a]
    if not weights or len(weights) != len(lora_as):
        got = f"{len(weights)} and {len(lora_as)}"
        raise ValueError(f"a group needs as many weights and lora_as, at least one, got {got}")
    for member in zip(weights, lora_as, strict=True):
        _check(x, *member, routing)
    call = Call(backend, x, weights, lora_as, Plan(routing.experts, routing.gates, routing.offsets, 1.0, 0.0, None))
    candidate = call.ordered()[0]
    reasons = [_why(call, candidate)]
    if _resolve(backend)[0] in ("auto", "rule"):
        failed = autotune.failures(call.bucket(), x.device)
        reasons += [f"left out {other}: {reason}" for other, reason in failed.items()]
    if candidate == APART:
        first = explain(x, weights[0], lora_as[0], routing, backend)
        return Explanation(
            first.backend, "one by one", "; ".join([*reasons, f"the first: {first.kernel}, {first.why}"])
        )
    module, form = named(candidate)
    kernel, why = form, ""
    if hasattr(module, "describe"):
        kernel, why = module.describe(x, weights, lora_as, call.plan, form)
    if len(weights) > 1:
        kernel = f"{len(weights)} together, {kernel}"
    return Explanation(candidate.partition("/")[0], kernel, "; ".join([*reasons, why] if why else reasons))


def _why(call: Call, candidate: str) -> str:
    (name, asked), bucket, device = _resolve(call.backend), call.bucket(), call.x.device
    if name not in ("auto", "rule"):
        refusal = f", which refuses a group: {call.reason(name.partition('/')[0])}" if candidate == APART else ""
        return f"{asked} asks for {name}{refusal}"
    candidates = call.candidates()
    if name == "auto" and candidate == autotune.fixed(bucket, candidates):
        return "the run that this one continues chose it"
    able = [other for other in candidates if other not in autotune.failures(bucket, device)]
    if name == "auto" and (times := autotune.known(bucket, device, able)):
        return "forward timed here in ms: " + ", ".join(f"{other} {time:g}" for other, time in times.items())
    if candidate == APART:
        return "by rule, or since no backend runs them together"
    before = list(registered())[: list(registered()).index(candidate.partition("/")[0])]
    refused = {other: call.reason(other) for other in before}
    return "; ".join(["the first that can run", *(f"not {other}: {why}" for other, why in refused.items() if why)])


def _check(x: object, weight: object, lora_a: object, routing: object) -> None:
    """Raise what `linear` raises for arguments of which nothing could be explained."""
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


def _resolve(backend: str) -> tuple[str, str]:
    """The name asked for, and by whom: the argument, or for "auto" the environment."""
    if backend != "auto":
        return backend, "backend"
    return os.environ.get("MOE_LORA_BACKEND", "auto"), "MOE_LORA_BACKEND"


def _join(name: str, form: str) -> str:
    return f"{name}/{form}" if form else name


def _remember(key: tuple, candidate: str) -> None:
    if len(_decisions) >= _MAX_DECISIONS or (_decisions and next(iter(_decisions))[0] != key[0]):
        _decisions.clear()
    _decisions[key] = candidate


def _changing() -> list[Any]:
    """The backends whose answers change while the process runs."""
    backends = registered()
    if _changing_of[0] is not backends:
        _decisions.clear()
        _changing_of[:] = backends, [backend for backend in backends.values() if hasattr(backend, "generation")]
    return _changing_of[1]


_changing_of: list[Any] = [None, []]
