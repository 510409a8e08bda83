"""What happens round a call of the model that holds the experts: it routes itself if it has a gate, once per call.

`watch` hangs a `Calls` on the model: hooks round its forward, and in place of its `generate` one that routes by the
prompt. An explicit `route` round the call counts before the gate.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.config import GateConfig, MoELoRAConfig
from moe_lora.context import enter, prepare
from moe_lora.gate import InstanceGate, expert_share, load_balancing_loss
from moe_lora.question import find_questions
from moe_lora.routing import Routing
from moe_lora.rows import batch_of
from moe_lora.slot import Entry, RouteSlot

GATE_NAME = "moe_lora_gate"
_ATTRIBUTE = "moe_lora_calls"
_PROMPTS = ("inputs", "input_ids")


_EAGER: dict[str, Callable[..., Any]] = {}


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class _Open(threading.local):
    """The calls that run in this thread."""

    def __init__(self):
        self.forwards: list[
            tuple[Any, Entry | None, Tensor | None]
        ] = []  # the batch around, what each entered, balance
        self.generating = 0


class Calls:
    """The hooks of one model.

    Args:
        slot: of the model's layers.
        gate: how the model routes itself; None if it does not.
    """

    def __init__(self, slot: RouteSlot, gate: GateConfig | None = None):
        self.slot, self.open = slot, _Open()
        self.gate: GateConfig | None = None
        if gate is not None:
            self.attach(gate)

    def attach(self, gate: GateConfig) -> None:
        self.gate = gate
        if "run" not in _EAGER:  # not at import: torch.compiler.disable loads all of torch's compiler
            _EAGER["run"] = torch.compiler.disable(_run)

    def __reduce__(self):
        return Calls, (self.slot, self.gate)

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if torch.compiler.is_compiling() and (self.gate is None or self.slot.routing is not None):
            return None
        run = _EAGER["run"] if torch.compiler.is_compiling() else _run
        return run(self._before, model, args, kwargs)

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() and not self.open.forwards:
            return None
        run = _EAGER["run"] if torch.compiler.is_compiling() else _run
        return run(self._after, output)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        around = self.slot.batch
        self.open.forwards.append((around, None, None))
        kwargs = dict(kwargs)
        question_mask = kwargs.pop("question_mask", None)
        self.slot.sync()
        inputs = _bound(model, args, kwargs) | {"question_mask": question_mask}
        batch = batch_of(model, inputs, self.open.generating > 0, self.slot.images())
        self.slot.batch = batch
        current = self.slot.current()
        if isinstance(current, Routing):
            batch.check(current)
        if current is not None or self.gate is None:
            return args, kwargs
        with_loss = model.training and torch.is_grad_enabled()
        routing, balance = self.routed(model, inputs, with_loss)
        prepare(model)
        entry = Entry(self.slot, routing)
        entry.enter()
        self.open.forwards[-1] = around, entry, balance
        return args, kwargs

    def _after(self, output: Any) -> Any:
        if not self.open.forwards:  # another hook failed before ours
            return None
        self.slot.batch, entry, balance = self.open.forwards.pop()
        if entry is not None:
            self.slot.siblings = self.slot.copied = None
            entry.leave()
        return None if balance is None or output is None else _with_balance(output, balance)

    def routed(
        self, model: nn.Module, inputs: dict[str, Any], with_loss: bool, prompt: bool = False
    ) -> tuple[Routing, Tensor | None]:
        """The routing of a call, and the weighted balance loss if it is wanted and there is a weight."""
        assert self.gate is not None
        embeds = _embeds(model, inputs)
        module: Any = getattr(model, GATE_NAME)
        if self.gate.mode == "token":
            mask, offsets = inputs.get("attention_mask"), None
            counted = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
            experts, gates, logits = module(embeds)
            counted = counted.flatten()
        else:
            encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
            shape = (embeds.shape[0], embeds.shape[1])
            questions = find_questions(shape, embeds.device, inputs, self.gate, prompt or encoder)
            # the mean of each question by itself: its bits depend neither on padding nor on the rest of the batch
            flat, of, asked = embeds.flatten(0, 1), questions.document.flatten(), questions.mask.flatten()
            means = [flat[(of == n) & asked].float().mean(0) for n in range(len(questions.counted))]
            experts, gates, logits = module(torch.stack(means)[:, None])
            counted, offsets = questions.counted, questions.offsets()
        balance = None
        if with_loss and self.gate.balance:
            balance = self.gate.balance * load_balancing_loss(logits, experts, counted)
        if with_loss and self.gate.bias_rate:
            module.balance(expert_share(experts, module.num_experts, counted), self.gate.bias_rate)
        return Routing(experts, gates, offsets), balance


class Generate:
    """`model.generate` that routes by the prompt, once."""

    def __init__(self, model: Any, calls: Calls):
        self.model, self.calls = model, calls

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.model).generate, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls, model = self.calls, self.model
        question_mask = kwargs.pop("question_mask", None)
        calls.open.generating += 1
        try:
            if calls.gate is None or calls.gate.mode == "token" or calls.slot.current() is not None:
                return type(model).generate(model, *args, **kwargs)
            inputs = _prompt(model, args, kwargs) | {"question_mask": question_mask}
            with torch.no_grad():
                routing, _ = calls.routed(model, inputs, False, prompt=True)
            prepare(model)
            with enter(calls.slot, routing):
                return type(model).generate(model, *args, **kwargs)
        finally:
            calls.open.generating -= 1


def watch(model: nn.Module, slot: RouteSlot) -> Calls:
    """Hangs the hooks on a model."""
    calls = Calls(slot)
    model.__dict__[_ATTRIBUTE] = calls
    model.register_forward_pre_hook(calls.before, with_kwargs=True)
    model.register_forward_hook(calls.after, with_kwargs=True, always_call=True)
    if callable(getattr(type(model), "generate", None)):
        model.__dict__["generate"] = Generate(model, calls)
    return calls


def give_gate(model: nn.Module, config: MoELoRAConfig, gate: GateConfig) -> None:
    """Puts the gate into a model with experts, as its child `moe_lora_gate`, and lets the model route itself.

    Raises:
        ValueError: the model has no input embeddings, or is none that this mode of gate can route.
    """
    weight = check_gate(model, gate)
    module = InstanceGate(weight.shape[1], config.num_experts, config.top_k, gate.mode, universal=gate.universal)
    model.add_module(GATE_NAME, module.to(weight.device).train(model.training))
    calls_of(model)[1].attach(gate)


def check_gate(model: nn.Module, gate: GateConfig) -> Tensor:
    """The weight [V, D] of the model's input embeddings; raises what `give_gate` raises, and changes nothing."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
    weight = getattr(embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"model must have input embeddings, got {type(model).__name__} without; use moe_lora.apply and route"
        )
    if gate.mode == "token" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("mode must be instance or dense for an encoder and a decoder with other tokens, got token")
    return weight


def calls_of(model: nn.Module) -> tuple[nn.Module, Calls]:
    """The model with experts in what is given (it, or what holds it), and its calls.

    Raises:
        ValueError: there is none, or more than one.
    """
    watched = [module for module in model.modules() if _ATTRIBUTE in module.__dict__]
    if len(watched) != 1:
        raise ValueError(
            f"model must hold one model with experts, got {len(watched)}; call moe_lora.apply or attach on it first"
        )
    return watched[0], watched[0].__dict__[_ATTRIBUTE]


def _bound(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    names += [f"argument {i}" for i in range(len(names), len(args))]  # of *args
    return dict(zip(names, args, strict=False)) | kwargs


def _embeds(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, L, D] of the tokens that the model is called with."""
    embeds, ids = inputs.get("inputs_embeds"), inputs.get("input_ids")
    if isinstance(embeds, Tensor):
        return embeds
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            "a model that routes itself must be called with input_ids [B, L] or inputs_embeds [B, L, D], got "
            f"{', '.join(sorted(name for name, value in inputs.items() if value is not None)) or 'nothing'}; "
            "or route it yourself by moe_lora.route"
        )
    return model.get_input_embeddings()(ids)


def _prompt(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a generation, with the attention mask that transformers would infer from padding."""
    inputs = dict(kwargs)
    for name in _PROMPTS:
        if inputs.get(name) is not None:
            inputs["input_ids"] = inputs[name]
    if args and args[0] is not None:
        inputs["input_ids"] = args[0]
    ids, config = inputs.get("input_ids"), kwargs.get("generation_config") or model.generation_config
    if inputs.get("attention_mask") is None and isinstance(ids, Tensor) and ids.dim() == 2:
        pad, end = (
            kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name, None)
            for name in ("pad_token_id", "eos_token_id")
        )
        ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
        if pad is not None and int(pad) not in ends and bool((ids == pad).any()):
            inputs["attention_mask"] = ids != pad
    return inputs


def _with_balance(output: Any, balance: Tensor) -> Any:
    loss = output.get("loss") if isinstance(output, dict) else None
    if isinstance(loss, Tensor):
        output["loss"] = loss + balance.to(loss.device)
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return output[0] + balance.to(output[0].device), *output[1:]
    raise ValueError(
        "GateConfig.balance needs a loss from the model to be added to, got an output without one; call it with "
        "labels, or set balance=0 and add moe_lora.load_balancing_loss to your own loss"
    )
