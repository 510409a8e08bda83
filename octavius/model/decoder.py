"""Answers to many conversations at once, token by token: rows of one batch, each with its own mixture of experts.

    admit:  prompts of new rows, padded on the right → keys and values in their slots, first tokens
    step:   one token of every row through the LLM under Routing(experts [n, K], gates [n, K]) → the next tokens

Rows join and leave between two steps. A row's tokens are those it gets alone: no operation mixes rows, and its mixture
is chosen from its own question before it joins.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import moe_lora
import torch

from octavius.language.dialogue import TextStream
from octavius.language.llm import answer_logits
from octavius.model.cache import SlotCache
from octavius.model.octavius import Octavius
from octavius.model.prompt import Prompt


@dataclass(frozen=True)
class Options:
    """How an answer is made.

    max_tokens: at most; temperature: 0 for the likeliest token each time; top_p: draw from the likeliest tokens that
    have this share together; seed: of the draws; stop: texts that end the answer.
    experts: weight of each expert instead of the gate's choice; {} for the frozen model alone; None: the gate's choice.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    experts: Mapping[int, float] | None = None

    def check(self, num_experts: int) -> None:
        """Raise ValueError unless a model with so many experts can answer so."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in 0..2, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, got {self.seed}")
        if len(self.stop) > 4 or not all(0 < len(text) <= 64 for text in self.stop):
            raise ValueError("stop must be at most 4 texts of 1 to 64 characters")
        for expert, weight in (self.experts or {}).items():
            if not 0 <= expert < num_experts:
                raise ValueError(f"experts must be in 0..{num_experts - 1}, got {expert}")
            if not 0 <= weight <= 4:
                raise ValueError(f"the weight of expert {expert} must be in 0..4, got {weight}")


@dataclass(eq=False)
class Answer:
    """An answer that grows.

    weights: [E], of every expert, once its prompt is read; finish: "stop", "length", "cancelled" or "error".
    """

    prompt: Prompt
    options: Options
    stream: TextStream
    weights: torch.Tensor | None = None
    finish: str | None = None
    error: str = ""
    cancelled: bool = False  # whoever asked went away: the row leaves before the next step
    times: dict[str, float] = field(default_factory=dict)  # "first", "last": of its tokens, perf_counter
    token: int = 0  # the last one, to be read in the next step
    length: int = 0  # positions that its slot holds
    routing: moe_lora.Routing | None = None  # [1, K]; None where a token gate chooses anew at each step
    generator: torch.Generator | None = None

    @property
    def text(self) -> str:
        return self.stream.text

    @property
    def tokens(self) -> int:
        return len(self.stream.ids)


class Decoder:
    """One batch of answers.

    Args:
        model: it answers in evaluation mode; one decoder at a time uses it.
        rows: answers at the same time, at most.
        context: tokens of a prompt and its answer, at most.

    Raises:
        ValueError: the LLM's attention needs more than keys and values of all positions.
    """

    def __init__(self, model: Octavius, rows: int = 32, context: int = 2048):
        config = model.llm.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"the LLM must attend to all positions in all layers, got {', '.join(sorted(kinds))}")
        if config._attn_implementation == "flash_attention_2":  # takes no mask of its own for each row
            model.llm.set_attn_implementation("sdpa")
        self.model, self.rows = model.eval(), rows
        self.context = min(context, getattr(config, "max_position_embeddings", context))
        self.cache = SlotCache(config.num_hidden_layers)
        self.active: list[Answer] = []

    def open(self, prompt: Prompt, options: Options) -> Answer:
        """An answer that `admit` can take.

        Raises:
            ValueError: the options do not fit the model, or the prompt is too long.
        """
        options.check(self.model.settings.lora.num_experts)
        if len(prompt) >= self.context:
            raise ValueError(
                f"the conversation must be shorter than {self.context} tokens, got {len(prompt)}; begin a new one"
            )
        return Answer(prompt, options, TextStream(self.model.conversation, options.stop))

    @property
    def free(self) -> int:
        return self.rows - len(self.active)

    @torch.no_grad()
    def admit(self, answers: Sequence[Answer]) -> list[tuple[Answer, str]]:
        """Read the prompts of new rows; returns the first text of each. One that fails ends as "error"."""
        assert len(answers) <= self.free
        embeds, ready, failed = [], [], []
        for answer in answers:
            try:
                embeds.append(self._embed(answer))
                ready.append(answer)
            except (ValueError, RuntimeError) as error:
                answer.finish, answer.error = "error", str(error)
                failed.append((answer, ""))
        if not ready:
            return failed
        lengths = [len(answer.prompt) for answer in ready]
        longest = max(lengths)
        batch = embeds[0].new_zeros(len(ready), longest, embeds[0].shape[2])
        for row, embed in zip(batch, embeds, strict=True):
            row[: len(embed[0])] = embed[0]
        first = len(self.active)
        self.cache.reserve(first + len(ready), max(self._reach(answer) for answer in [*self.active, *ready]))
        self.cache.first, self.cache.reach = first, longest
        positions = torch.arange(longest, device=batch.device)
        hidden = self._forward(batch, positions[None].expand(len(ready), -1), positions[:, None] >= positions, ready)
        self.active += ready
        last = torch.tensor(lengths, device=hidden.device) - 1
        for answer, length in zip(ready, lengths, strict=True):
            answer.length = length
        return failed + self._choose(ready, hidden[torch.arange(len(ready)), last])

    @torch.no_grad()
    def step(self) -> list[tuple[Answer, str]]:
        """One more token of every row; returns the text that each gained. Finished rows have left."""
        gone = [(answer, "") for answer in self.active if answer.cancelled]
        for answer, _ in gone:
            answer.finish = "cancelled"
        self._leave()
        if not self.active:
            return gone
        lengths = torch.tensor([answer.length for answer in self.active])
        self.cache.first, self.cache.lengths = None, lengths.to(self.model.device)
        self.cache.reach = int(lengths.max()) + 1
        ids = torch.tensor([[answer.token] for answer in self.active], device=self.model.device)
        embeds = self.model.llm.get_input_embeddings()(ids)
        seen = torch.arange(self.cache.reach)[None] <= lengths[:, None]  # [n, reach]
        hidden = self._forward(embeds, self.cache.lengths[:, None], seen[:, None].to(ids.device), self.active)
        for answer in self.active:
            answer.length += 1
        return gone + self._choose(self.active, hidden[:, 0])

    def drop_all(self, error: str) -> list[Answer]:
        """End all rows, after a failure that is not one row's."""
        dropped, self.active = self.active, []
        for answer in dropped:
            answer.finish, answer.error = "error", error
        return dropped

    def _reach(self, answer: Answer) -> int:
        return min(len(answer.prompt) + answer.options.max_tokens, self.context)

    def _embed(self, answer: Answer) -> torch.Tensor:
        """The prompt as the LLM's input [1, L, D]; also chooses its experts."""
        model, prompt = self.model, answer.prompt
        ids, mask = prompt.input_ids.to(model.device), prompt.gate_mask.to(model.device)
        embeds = model.embed(ids, **prompt.seen)
        if not bool(embeds.isfinite().all()):
            raise ValueError("what the conversation shows must give finite numbers, got NaN or infinity")
        with model.routed(embeds, mask, torch.ones_like(ids)) as routed:
            pass
        answer.weights = routed.weights(1)[0].float().cpu()
        if answer.options.experts is not None:
            answer.routing = self._mixture(answer.options.experts)
            answer.weights = torch.zeros_like(answer.weights)
            for expert, weight in answer.options.experts.items():
                answer.weights[expert] = weight
        elif model.gate.mode != "token":
            answer.routing = routed.routing
        if answer.options.temperature:
            answer.generator = torch.Generator()
            if answer.options.seed is None:
                answer.generator.seed()
            else:
                answer.generator.manual_seed(answer.options.seed)
        return embeds

    def _mixture(self, experts: Mapping[int, float]) -> moe_lora.Routing:
        """Given weights as a routing of one instance, filled with weight 0 up to the gate's K."""
        count = max(self.model.gate.top_k, len(experts))
        chosen = [
            *experts,
            *(expert for expert in range(self.model.settings.lora.num_experts) if expert not in experts),
        ]
        weights = [experts.get(expert, 0.0) for expert in chosen[:count]]
        experts_tensor = torch.tensor([chosen[:count]], device=self.model.device)
        return moe_lora.Routing(experts_tensor, torch.tensor([weights], device=self.model.device))

    def _forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, answers: Sequence[Answer]
    ) -> torch.Tensor:
        """Hidden states [n, L, D] of new positions; `seen` [L, reach] or [n, L, reach] is True where they may look."""
        mask = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)
        mask = (mask if mask.dim() == 3 else mask.expand(len(embeds), -1, -1))[:, None]
        eager = torch.compiler.set_stance("force_eager")
        with eager, moe_lora.route(self.model.llm, self._routing(embeds, answers)):
            out = self.model.llm.base_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.last_hidden_state

    def _routing(self, embeds: torch.Tensor, answers: Sequence[Answer]) -> moe_lora.Routing:
        """One routing for all rows, as wide as the widest of them; a token gate's has one instance a position."""
        rows = [answer.routing for answer in answers]
        own = self.model.gate.routing(embeds) if None in rows else None  # [n·L, K]
        width = max([routing.experts.shape[1] for routing in rows if routing] + ([own.experts.shape[1]] if own else []))
        length = embeds.shape[1] if own else 1
        experts, gates = [], []
        for row, routing in enumerate(rows):
            span = slice(row * length, (row + 1) * length)
            chosen = routing.experts.expand(length, -1) if routing else own.experts[span]  # type: ignore[union-attr]
            weights = routing.gates.expand(length, -1) if routing else own.gates[span]  # type: ignore[union-attr]
            fill = width - chosen.shape[1]  # repeats the row's first expert, with weight 0
            experts.append(torch.cat((chosen, chosen[:, :1].expand(-1, fill)), 1))
            gates.append(torch.cat((weights, weights.new_zeros(length, fill)), 1))
        return moe_lora.Routing(torch.cat(experts), torch.cat(gates))

    def _choose(self, answers: Sequence[Answer], hidden: torch.Tensor) -> list[tuple[Answer, str]]:
        """Choose the next token of every row from hidden states [n, D], and let finished rows leave."""
        logits = answer_logits(self.model.llm, hidden)
        best, finite, now = logits.argmax(-1).tolist(), logits.isfinite().all(-1).tolist(), time.perf_counter()
        gained = []
        for row, answer in enumerate(answers):
            if not finite[row]:
                answer.finish, answer.error = "error", "the model gave NaN or infinity; try other experts"
                gained.append((answer, ""))
                continue
            answer.token = best[row] if answer.generator is None else _draw(logits[row].cpu(), answer)
            answer.times.setdefault("first", now)
            answer.times["last"] = now
            gained.append((answer, self._take(answer)))
        self._leave()
        return gained

    def _take(self, answer: Answer) -> str:
        """Add the chosen token to the text; says in `finish` whether it was the last."""
        if answer.token == self.model.conversation.eos:
            answer.finish = "stop"
            return answer.stream.close()
        text = answer.stream.push(answer.token)
        if answer.stream.stopped:
            answer.finish = "stop"
        elif answer.tokens >= answer.options.max_tokens or answer.length + 1 >= self.context:
            answer.finish = "length"
            text += answer.stream.close()
        return text

    def _leave(self) -> None:
        """Take finished rows out; the last row moves into a slot that became free."""
        row = 0
        while row < len(self.active):
            if self.active[row].finish is None:
                row += 1
                continue
            last = self.active.pop()
            if row < len(self.active):
                self.cache.move(len(self.active), row)
                self.active[row] = last


def _draw(logits: torch.Tensor, answer: Answer) -> int:
    """One token by temperature and nucleus sampling (Holtzman et al. 2020), from float32 logits [vocab]."""
    probs = (logits / answer.options.temperature).softmax(-1)
    if answer.options.top_p < 1:
        ranked, order = probs.sort(descending=True)
        ranked[ranked.cumsum(0) - ranked >= answer.options.top_p] = 0
        return int(order[torch.multinomial(ranked, 1, generator=answer.generator)])
    return int(torch.multinomial(probs, 1, generator=answer.generator))
