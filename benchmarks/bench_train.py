"""Tokens per second of training and of generation: the demo's model with its linears computed in different ways.

    cpu, reference  LoRA-MoE (E = 4, K = 2, R = 32) by `moe_lora.linear` with that backend
    einsum          the same by all experts on all rows, mixed by dense gates (the form of the Octavius paper's code)
    peft            PEFT LoRA of rank 64 = K·R for all instances
    peft-usual      the same in the usual way: tower run in every step, Hugging Face's loss over all positions, sdpa
    frozen          the linears without any experts: the floor

All: SmolLM2-135M-Instruct in bfloat16, float32 trainable weights, EfficientNet-Lite0 tokens, the same batches of
mini-LAMM, AdamW. All but peft-usual: images' features kept, logits only where labels are, `load_llm`'s
attention, and with --compile compiled decoder layers.
Prints tokens (padding not counted) per second, median, 20th and 80th percentile over the steps, and the median of the
ratio to `frozen` in each step; and new tokens per second of greedy generation for a batch of prompts. The providers run
in turn in one process; one thread is timed by its own CPU time, more by the wall.

Usage: python benchmarks/bench_train.py [--steps 6] [--batch 8] [--new 24] [--threads 1] [--compile]
           [--plain-malloc] [--providers ...]
"""

import argparse
import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import moe_lora
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from octavius.config import load_config
from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import load_data
from octavius.language.llm import answer_logits, load_llm
from octavius.language.prompts import IGNORE
from octavius.model.octavius import Octavius
from octavius.training.train import compile_layers, keep_freed_memory
from octavius.vision.features import FeatureStore
from octavius.vision.projector import Projector

PROVIDERS = ("cpu", "reference", "einsum", "peft", "peft-usual", "frozen")


class Peft(torch.nn.Module):
    """The same image tokens before a PEFT model, with nothing of this project's engine."""

    def __init__(self, ours: Octavius, usual: bool):
        super().__init__()
        attention = "sdpa" if usual else ours.settings.attn_implementation
        llm, _ = load_llm(dataclasses.replace(ours.settings, attn_implementation=attention))
        lora = ours.settings.lora
        targets = list(lora.target_modules)
        config = LoraConfig(
            r=lora.rank * lora.top_k, lora_alpha=int(lora.alpha), target_modules=targets, lora_dropout=0.0
        )
        self.llm, self.causal, self.usual = get_peft_model(llm, config), llm, usual
        tower = ours.tower[0]
        assert tower is not None
        table = llm.get_input_embeddings().weight
        self.projector = Projector(tower.tokens, tower.width, table.shape[1], "linear", table.float().std().item())
        self.vocab = table.shape[0]

    def embed(self, input_ids, features):
        embeds = self.llm.get_input_embeddings()(input_ids.clamp(max=self.vocab - 1))
        image = (input_ids == self.vocab + 2)[..., None]
        return embeds.masked_scatter(image, self.projector(features).to(embeds.dtype))

    def forward(self, input_ids, attention_mask, labels, features, **_):
        embeds = self.embed(input_ids, features)
        if self.usual:
            return self.llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels).loss
        hidden = self.causal.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        return F.cross_entropy(answer_logits(self.causal, hidden[rows, columns]), labels[rows, columns + 1])

    @torch.inference_mode()
    def generate(self, input_ids, attention_mask, features, gate_mask, **options):
        embeds = self.embed(input_ids, features)
        with torch.compiler.set_stance("force_eager"):  # as ours
            return self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, do_sample=False, **options)


class Frozen(moe_lora.MoELoRALinear):
    def forward(self, x, routing=None):
        return F.linear(x, self.weight, self.bias)


class Einsum(moe_lora.MoELoRALinear):
    def forward(self, x, routing=None):
        routing = self.slot.current()
        assert isinstance(routing, moe_lora.Routing)
        dense = x.new_zeros(x.shape[0], self.lora_a.shape[0])
        dense = dense.scatter_add(1, routing.experts.long(), routing.gates.to(x.dtype)) * self.scale
        h = torch.einsum("nld,edr->nler", x, self.lora_a.to(x.dtype))
        out = torch.einsum("nler,erf->nlef", h, self.lora_b.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + torch.einsum("nlef,ne->nlf", out, dense)


def other(ours: Octavius, kind: type[moe_lora.MoELoRALinear]) -> Octavius:
    """A copy whose linears with experts are computed in another way."""
    model = copy.deepcopy(ours)
    for layer in model.modules():
        if type(layer) is moe_lora.MoELoRALinear:
            layer.__class__ = kind
    return model


@contextmanager
def backend(name: str) -> Iterator[None]:
    os.environ["MOE_LORA_BACKEND"] = name if name in moe_lora.backends() else "auto"
    yield
    del os.environ["MOE_LORA_BACKEND"]


class Bench:
    """The models, the batches and the clock."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.clock = time.thread_time if options.threads == 1 else time.perf_counter
        config = load_config("mini-2d", ["data.root=mini-lamm:smoke"])
        self.ours = Octavius.from_config(config.model)
        names = options.providers
        make = {"einsum": partial(other, self.ours, Einsum), "frozen": partial(other, self.ours, Frozen)}
        make |= {name: partial(Peft, self.ours, name == "peft-usual") for name in ("peft", "peft-usual")}
        self.models = {name: make[name]() if name in make else self.ours for name in names}
        records, (store, _) = load_data(config.data, "train.json", **self.ours.readers())
        assert store is not None
        self.tower = store.tower
        end, P = self.ours.conversation.eos, store.tower.tokens
        data = InstructionData(records, self.ours.conversation, P, config.data.max_tokens)
        order = torch.randperm(len(data))[: options.steps * options.batch].tolist()
        samples = sorted((data[index] for index in order), key=lambda sample: len(sample["input_ids"]))
        self.batches = [samples[start : start + options.batch] for start in range(0, len(samples), options.batch)]
        self.kept, self.computed = Collator(end, store), Collator(end, FeatureStore(store.tower))
        prompts = InstructionData(records, self.ours.conversation, P, 0, False)
        self.prompts = Collator(end, store, left=True)([prompts[index] for index in order[: options.batch]])
        self.prompts.pop("labels")
        self.prompts["features"] = self.prompts["features"].float()
        if options.compile:
            for name, model in self.models.items():
                if name != "peft-usual":
                    compile_layers(model.causal if isinstance(model, Peft) else model.llm)
        trained = {id(model): [p for p in model.parameters() if p.requires_grad] for model in self.models.values()}
        self.optimizers = {key: torch.optim.AdamW(parameters, 1e-4) for key, parameters in trained.items()}

    def train(self, name: str, batch: list) -> float:
        """Tokens per second of one step."""
        model, collate = self.models[name].train(), self.computed if name == "peft-usual" else self.kept
        with backend(name):
            start = self.clock()
            inputs = collate(batch)
            if isinstance(model, Peft) and "pixels" in inputs:  # as usual: the tower runs in every step
                inputs["features"] = self.tower.features(inputs.pop("pixels"))
            if "features" in inputs:
                inputs["features"] = inputs["features"].float()
            loss = model(**inputs)
            (loss["loss"] if isinstance(loss, dict) else loss).backward()
            self.optimizers[id(model)].step()
            self.optimizers[id(model)].zero_grad()
            return int(inputs["attention_mask"].sum()) / (self.clock() - start)

    def generate(self, name: str) -> float:
        """New tokens per second, the prompts' first pass included."""
        model, new = self.models[name].eval(), self.options.new
        with backend(name):
            start = self.clock()
            model.generate(**self.prompts, min_new_tokens=new, max_new_tokens=new)
            return new * self.options.batch / (self.clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6, help="of training; half as many generations")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=24, help="tokens that each prompt is answered with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="all but peft-usual, as `make mini` trains")
    parser.add_argument("--plain-malloc", action="store_true", help="without `keep_freed_memory`, as others train")
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS), choices=PROVIDERS)
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}: percentiles take two generations")
    options.providers = list(dict.fromkeys([*options.providers, "frozen"]))
    if not options.plain_malloc:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(options)
    for name in options.providers:  # twice: compiling guards on a length first, and then on any
        bench.train(name, bench.batches[0])
        bench.train(name, bench.batches[-1])
        bench.generate(name)
    trained = {name: [] for name in options.providers}
    written = {name: [] for name in options.providers}
    for step, batch in enumerate(bench.batches):
        for name in options.providers:
            trained[name].append(bench.train(name, batch))
            if step % 2:
                written[name].append(bench.generate(name))
    Console().print(table(options, trained, written))


def table(options: argparse.Namespace, trained: dict[str, list[float]], written: dict[str, list[float]]) -> Table:
    out = Table(
        title=f"tokens/s, batch {options.batch}, {options.threads} threads, bfloat16, {options.steps} steps and "
        f"{options.steps // 2} generations of {options.new} tokens each{', compiled' if options.compile else ''}"
    )
    columns = ("", "training", "p20", "p80", "of frozen", "generation", "p20", "p80", "of frozen")
    for column in columns:
        out.add_column(column, justify="right" if column else "left")
    for name in options.providers:
        row = [name]
        for rates in (trained, written):
            cuts = statistics.quantiles(rates[name], n=5)
            ratios = [a / b for a, b in zip(rates[name], rates["frozen"], strict=True)]
            row += [f"{value:.0f}" for value in (statistics.median(rates[name]), cuts[0], cuts[3])]
            row.append(f"{statistics.median(ratios):.2f}")
        out.add_row(*row)
    return out


if __name__ == "__main__":
    main()
