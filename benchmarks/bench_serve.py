"""Tokens per second of the server's decoder: many requests with mixtures of their own, together and one by one.

    together   all requests at once, each row of a step with its own experts
    one by one the same requests, one after the other
    frozen     all at once, the same LLM without any experts in its linears

The mixtures are all different; prompts are short questions without an image, so that decoding is what is timed. Answers
go on to --new tokens. First the tokens that each request gets together are compared with those it gets alone: in
float32 all must be equal, in bfloat16 near-ties are counted. Rounds interleave the three; medians and the range are
printed, and written as CSV. Not timed: loading, the first round.

Usage: python benchmarks/bench_serve.py [--requests 32] [--new 48] [--rounds 3] [--dtype bfloat16] [--csv FILE]
"""

import argparse
import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from octavius.config import load_config
from octavius.language.llm import load_llm
from octavius.model.decoder import Decoder, Options
from octavius.model.octavius import Octavius
from octavius.model.prompt import Exchange, make_prompt

QUESTIONS = ("What is next to the sofa?", "List the objects.", "Describe the image, please.", "Which colour has it?")


def load(dtype: str) -> Octavius:
    """The demo's model, its experts drawn at random: the tokens do not matter, the work does."""
    config = replace(load_config("demo").model, dtype=dtype, clouds=None)
    torch.manual_seed(0)
    model = Octavius.from_config(config)
    for name, value in model.llm.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(value, std=0.01)
    return model.eval()


class Bare(Decoder):
    """The same decoder over an LLM whose linears have no experts: the floor."""

    def __init__(self, model: Octavius, llm, rows: int):
        super().__init__(model, rows)
        self.llm = llm

    def _forward(self, embeds, positions, seen, answers):
        mask = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)
        mask = (mask if mask.dim() == 3 else mask.expand(len(embeds), -1, -1))[:, None]
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        return self.llm.base_model(**inputs, past_key_values=self.cache, use_cache=True).last_hidden_state


def run(decoder: Decoder, prompts, options, together: bool) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens of each request."""
    answers = [decoder.open(prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    groups = [answers] if together else [[answer] for answer in answers]
    start = time.perf_counter()
    for group in groups:
        decoder.admit(group)
        while decoder.active:
            decoder.step()
    return time.perf_counter() - start, [answer.stream.ids for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    model = load(args.dtype)
    model.conversation.eos = -1  # answers end at --new tokens
    generator = torch.Generator().manual_seed(0)
    experts = model.settings.lora.num_experts
    options, prompts = [], []
    for number in range(args.requests):
        pair = torch.randperm(experts, generator=generator)[:2].tolist()
        weight = 0.5 + 0.5 * torch.rand((), generator=generator).item()
        options.append(Options(args.new, experts={pair[0]: weight, pair[1]: 1 - weight}))
        prompts.append(make_prompt(model, [Exchange(QUESTIONS[number % len(QUESTIONS)])]))
    decoder = Decoder(model, args.requests)
    bare = Bare(model, load_llm(model.settings)[0].requires_grad_(False), args.requests)
    forms = {"together": (decoder, True), "one by one": (decoder, False), "frozen": (bare, True)}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(args.rounds + 1):
        tokens = {}
        for name, (form, together) in forms.items():
            taken, tokens[name] = run(form, prompts, options, together)
            if number:
                seconds[name].append(taken)
        differ = sum(a != b for a, b in zip(tokens["together"], tokens["one by one"], strict=True))
        if differ and args.dtype == "float32":
            raise SystemExit(f"{differ} of {args.requests} requests got other tokens together than alone")
    made = args.requests * args.new
    table = Table("form", "tokens / s", "range", "ratio to together")
    rows, base = [], statistics.median(seconds["together"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        row = [name, made / middle, made / max(values), made / min(values), base / middle]
        rows.append(row)
        table.add_row(name, f"{row[1]:.1f}", f"{row[2]:.1f} to {row[3]:.1f}", f"{row[4]:.2f}")
    about = f"{args.requests} requests of {args.new} tokens, {args.dtype}, {torch.get_num_threads()} threads"
    Console().print(table, f"{about}; {differ} requests differ from those alone")
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["form", "tokens_per_second", "lowest", "highest", "ratio", "conditions", "differ"])
            writer.writerows([*row, about, differ] for row in rows)


if __name__ == "__main__":
    main()
