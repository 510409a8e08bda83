"""Tokens per second of training, against the usual way to do it, in turn in one process.

    octavius    this project: LoRA-MoE (E = 4, K = 2, R = 32), tower features kept, logits only where labels are
    peft        PEFT LoRA of rank 64 = K·R on the same linears, tower run in every step, Hugging Face's loss over all
                positions, sdpa attention

Both: SmolLM2-135M-Instruct in bfloat16, float32 trainable weights, EfficientNet-Lite0 tokens, the same batches of
mini-LAMM, AdamW. Prints tokens (padding not counted) per second: median, 20th and 80th percentile over the steps, and
the ratio of the two in each pair of steps.

Usage: python benchmarks/bench_train.py [--steps 12] [--batch 16] [--threads 1] [--compile]
"""

import argparse
import dataclasses
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from octavius.config import load_config
from octavius.data import Collator, InstructionData
from octavius.encoders import FeatureStore
from octavius.llm import load_llm
from octavius.model import Octavius
from octavius.projector import Projector
from octavius.train import compile_layers, keep_freed_memory, load_data


class Peft(torch.nn.Module):
    """The same picture tokens before a PEFT model, with nothing of this project's engine."""

    def __init__(self, ours: Octavius):
        super().__init__()
        llm, _ = load_llm(dataclasses.replace(ours.settings, attn_implementation="sdpa"))
        lora = ours.settings.lora
        targets = list(lora.target_modules)
        config = LoraConfig(
            r=lora.rank * lora.top_k, lora_alpha=int(lora.alpha), target_modules=targets, lora_dropout=0.0
        )
        self.llm = get_peft_model(llm, config)
        tower = ours.tower[0]
        assert tower is not None
        table = llm.get_input_embeddings().weight
        self.projector = Projector(tower.tokens, tower.width, table.shape[1], "linear", table.float().std().item())
        self.vocab = table.shape[0]

    def forward(self, input_ids, attention_mask, labels, features, **_):
        embeds = self.llm.get_input_embeddings()(input_ids.clamp(max=self.vocab - 1))
        picture = (input_ids == self.vocab + 2)[..., None]
        embeds = embeds.masked_scatter(picture, self.projector(features).to(embeds.dtype))
        return self.llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels).loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="ours with train.compile, as `make mini` trains")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = load_config("demo")
    ours = Octavius.from_config(config.model)
    records, (store, _) = load_data(ours, config, "train.json")
    assert store is not None
    data = InstructionData(records, ours.conversation, store.tower.tokens, config.data.max_tokens)
    order = torch.randperm(len(data))[: options.steps * options.batch].tolist()
    samples = sorted((data[index] for index in order), key=lambda sample: len(sample["input_ids"]))
    batches = [samples[start : start + options.batch] for start in range(0, len(samples), options.batch)]
    theirs = Peft(ours)
    if options.compile:
        compile_layers(ours)
    kept, computed = Collator(ours.conversation.eos, store), Collator(ours.conversation.eos, FeatureStore(store.tower))
    providers = {"octavius": (ours, kept), "peft": (theirs, computed)}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        for name, (model, _) in providers.items()
    }

    def step(name: str, batch: list) -> float:
        model, collate = providers[name]
        start = time.perf_counter()
        inputs = collate(batch)
        inputs["features"] = inputs["features"].float()
        loss = model(**inputs)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return int(inputs["attention_mask"].sum()) / (time.perf_counter() - start)

    for name in providers:  # twice: compiling guards on a length first, and then on any
        step(name, batches[0])
        step(name, batches[-1])
    rates: dict[str, list[float]] = {name: [] for name in providers}
    for batch in batches:
        for name in providers:
            rates[name].append(step(name, batch))
    table = Table(
        title=f"tokens/s, batch {options.batch}, {options.threads} threads, bfloat16, {len(batches)} steps each"
        f"{', ours compiled' if options.compile else ''}"
    )
    for column in ("", "median", "p20", "p80"):
        table.add_column(column, justify="right" if column else "left")
    ratios = [a / b for a, b in zip(rates["octavius"], rates["peft"], strict=True)]
    for name, values in [*rates.items(), ("octavius / peft", ratios)]:
        digits = 2 if "/" in name else 0
        cuts = statistics.quantiles(values, n=5)
        table.add_row(name, *(f"{value:.{digits}f}" for value in (statistics.median(values), cuts[0], cuts[3])))
    Console().print(table)


if __name__ == "__main__":
    main()
