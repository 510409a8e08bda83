"""The interference benchmark: does mixing tasks cost one LoRA what experts keep?

The watched task names the class of an object. Its rival asks, about the same images and in look-alike words, for the
class that comes next in the alphabet: same words as answers, another map from images to them. Others ask for the first
letter, a caption, hair or a smile. Every arm sees the same samples of the watched task, alone or among 1, 4 or 16 times
as many of the rival, or among as many of each other task. The projector is set in closed form and frozen, so that only
adapters and gate learn. Test questions have phrasings that training never shows.
"""

import itertools
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moe_lora
import numpy as np
import torch
from moe_lora import MoELoRAConfig
from sklearn.linear_model import Ridge
from transformers import set_seed

from octavius.assets import registry
from octavius.config import Config, GateConfig, ModelConfig, TrainConfig
from octavius.data.batches import InstructionData
from octavius.data.loading import Stores, data_folder
from octavius.data.mini_lamm import questions
from octavius.data.mini_lamm.cutouts import CATEGORIES
from octavius.data.records import Record, read_records
from octavius.evaluation.evaluate import answer
from octavius.experiments.ablate import Run
from octavius.language.llm import load_llm
from octavius.model.octavius import Octavius
from octavius.training.gate_init import init_gate, mean_questions
from octavius.training.train import fit, keep_freed_memory
from octavius.vision.features import FeatureStore
from octavius.vision.towers import ImageTower, load_tower

WATCHED, RIVAL = "class", "next"
NEXT = (
    "What kind of thing comes next to the one in the picture?",
    "Which category follows that of the object in the image?",
    "Name the next class after that of the object in this picture.",
    "Which class comes after that of the object in the image?",
    "What is the following category of the pictured object?",
)
LETTER = (
    "What is the first letter of the thing in the picture?",
    "With which letter does the category of the object in the image begin?",
    "Give the initial of the object in this picture.",
    "Name the first letter of the class of the object in the image.",
    "Which letter starts the category of the pictured object?",
)
PHRASES = {
    "class": questions.CLASSIFICATION,
    "next": NEXT,
    "letter": LETTER,
    "caption": questions.CAPTION,
    "hair": questions.HAIR,
    "smile": questions.SMILE,
}
RIDGE = 1000.0  # penalty of the projector's regression
SIDE = 1  # an image is SIDE² tokens, the means of the tower's, so that a run fits ten minutes
UNSEEN = -1  # the phrasing that only validation and test ask with
MIXES = ("alone", "1:1", "1:4", "1:16", "all")
SEARCHED_AT = "1:1"
SINGLE, TOTAL, OURS = "one LoRA, active rank", "one LoRA, total rank", "ours"
ARMS = (SINGLE, TOTAL, "one LoRA a task (oracle)", "two fixed experts", "random router", "released gate", OURS)


@dataclass(frozen=True)
class Budget:
    """How large the runs of a table are.

    watched: samples of the watched task in each; images: that training, validation and test draw from; layers: of the
    LLM, None for all; rank: of an expert; experts: E, of which two serve a question; seeds: (of the single LoRAs and
    ours, of the other arms); mixes, rates: which; data: the embedded set that images come from.
    """

    watched: int
    images: tuple[int, int, int]
    layers: int | None
    rank: int
    experts: int
    seeds: tuple[int, int]
    mixes: tuple[str, ...]
    rates: tuple[float, ...]
    data: str = "mini-lamm:mini"


BUDGETS = {
    "small": Budget(96, (640, 130, 180), None, 4, 6, (3, 2), ("alone", "1:1", "1:4", "all"), (3e-3, 1e-2, 3e-2)),
    "full": Budget(1600, (1900, 260, 180), None, 8, 6, (5, 3), MIXES, (5e-4, 1.5e-3, 5e-3)),
}


class PooledTower(ImageTower):
    """A tower whose tokens are averaged to side² tokens: [N, 3, size, size] → [N, side², C]."""

    def __init__(self, tower: ImageTower, side: int):
        super().__init__()
        self.inner, self.side = tower, side
        self.tokens, self.width, self.size, self.mean_std = side**2, tower.width, tower.size, tower.mean_std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.inner(pixels)
        grid = round(tokens.shape[1] ** 0.5)
        grid = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        return torch.nn.functional.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)


class Interference:
    """The table of the runner: which runs, and how one is done.

    Args:
        budget: a name of BUDGETS.
        folder: scratch of the trainings.
        model: what every run's model shares; by default the embedded LLM and tower. Arm and budget set the rest.
    """

    def __init__(self, budget: str, folder: Path, model: ModelConfig | None = None):
        if budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
        self.name, self.budget, self.folder = budget, BUDGETS[budget], folder
        self.model = replace(model or ModelConfig(), llm_layers=self.budget.layers)
        self.pools: dict[str, list[Record]] = {}
        self.stores: Stores | None = None
        self.projector: dict[str, torch.Tensor] = {}

    def runs(self, finished: Sequence[dict[str, Any]]) -> list[Run]:
        """Search and main runs that can be done now and are not finished, the most telling first."""
        keys = {line["key"] for line in finished}
        budget, runs = self.budget, []
        for arm, rate in itertools.product(self._by_importance(), budget.rates):
            runs.append(Run("interference", self.name, "search", arm, SEARCHED_AT, 0, rate))
        best = best_rates(finished, self.name, len(budget.rates))
        for seed, mix, arm in itertools.product(range(max(budget.seeds)), self._mixes(), self._by_importance()):
            curve = arm in (SINGLE, TOTAL, OURS)
            if arm in best and seed < budget.seeds[not curve] and (curve or mix in ("1:4", "all")):
                runs.append(Run("interference", self.name, "main", arm, mix, seed, best[arm]))
        searched = [run for run in runs if run.key not in keys]
        return sorted(searched, key=lambda run: self._by_importance().index(run.arm) > 2)  # stable: the cuts come last

    def _by_importance(self) -> list[str]:
        return [SINGLE, OURS, ARMS[2], TOTAL, "released gate", "random router", "two fixed experts"]

    def _mixes(self) -> list[str]:
        order = ("1:4", "alone", "1:1", "all", "1:16")
        return [mix for mix in order if mix in self.budget.mixes]

    def execute(self, run: Run) -> dict[str, Any]:
        """Train one arm on one mix and score the watched task."""
        set_seed(run.seed)
        keep_freed_memory()
        config = self.arm(run.arm, run.mix)
        with registry.filling():
            assert config.tower
            tower = PooledTower(load_tower(config.tower), SIDE)
            model = Octavius(config, *load_llm(config), tower)
        self._load(model)
        assert self.stores is not None
        set_seed(run.seed)
        records = mixture(self.pools["train"], run.mix, self.budget.watched, run.seed)
        tokens = (model.image_tokens, 0, True, 0)
        data = InstructionData(records, model.conversation, *tokens)
        self._set_projector(model)
        init_gate(model, data, run.seed)
        if run.arm == "two fixed experts":
            torch.nn.init.zeros_(model.gate.w_gating)
        still = run.arm in ("two fixed experts", "random router")
        scratch = self.folder / run.key
        train = TrainConfig(
            output=str(scratch),
            epochs=1,
            batch_size=8,
            learning_rate=run.rate,
            gate_rate=0.0 if still else None,
            weight_decay=0.0,
            save_steps=10**6,
            log_steps=1,
            seed=run.seed,
        )
        report = fit(model, Config(model.settings, train=train), data, self.stores)
        shutil.rmtree(scratch, ignore_errors=True)
        split = "validation" if run.stage == "search" else "test"
        asked = ask(self.pools[split], WATCHED, UNSEEN)
        texts = answer(model, asked, self.stores, max_new_tokens=6).texts
        hits = [hit(text, record) for text, record in zip(texts, asked, strict=True)]
        return {
            "score": sum(hits) / len(hits),
            "hits": "".join(str(int(value)) for value in hits),
            "split": split,
            "steps": report["steps"],
            "loss": float(np.mean([entry["loss"] for entry in report["loss"][-5:]])),
            "information": self._information(model, sorted({record.task for record in records})),
        }

    def arm(self, arm: str, mix: str) -> ModelConfig:
        """The model of an arm; with a scale of K, experts whose gates sum to 1 move as far in a step as one LoRA."""
        rank, experts = self.budget.rank, self.budget.experts
        gate = GateConfig(kind="tasks")
        if arm in (SINGLE, TOTAL):
            experts, top_k, rank = 1, 1, rank * (2 if arm == SINGLE else experts)
        elif arm == "one LoRA a task (oracle)":
            experts, top_k, rank = len(tasks_of(mix)), 1, 2 * rank
        elif arm == "two fixed experts":
            experts, top_k, gate = 2, 2, GateConfig(kind="paper")
        else:
            top_k = 2
            gate = GateConfig(kind={"random router": "random", "released gate": "paper"}.get(arm, "tasks"))  # type: ignore[arg-type]
        lora = MoELoRAConfig(experts, top_k, rank, float(top_k * rank), 0.0, self.model.lora.target_modules)
        return replace(self.model, lora=lora, gate=gate)

    def _set_projector(self, model: Octavius) -> None:
        """The same frozen projector for every run: a ridge regression from images to their class's embedding.

        Learning to see would take far more samples than learning to answer, which is what is measured.
        """
        if not self.projector:
            assert self.stores is not None and self.stores.images is not None
            shown = [record for record in self.pools["train"] if suits(record, WATCHED)]
            features = self.stores.images([record.source for record in shown])
            model.projector.calibrate(features)
            x = model.projector.standard(features).mean(1)  # [n, C]
            table = model.llm.get_input_embeddings().weight.float()
            words = {label: model.conversation.tokens(f" {label}") for label in CATEGORIES}
            y = torch.stack([table[words[record.truth["label"]]].mean(0) for record in shown])  # [n, D]
            ridge = Ridge(alpha=RIDGE).fit(x.numpy(), y.detach().numpy())
            with torch.no_grad():
                linear: Any = model.projector.net[0]
                linear.weight.copy_(torch.from_numpy(ridge.coef_))
                linear.bias.copy_(torch.from_numpy(ridge.intercept_))
            self.projector = {name: value.clone() for name, value in model.projector.state_dict().items()}
        model.projector.load_state_dict(self.projector)
        for parameter in (*model.projector.parameters(), model.markers):
            parameter.requires_grad_(False)

    def _load(self, model: Octavius) -> None:
        """Images and their features, once."""
        if self.stores is not None:
            return
        root = data_folder(self.budget.data)
        train, test = (read_records(root / f"{name}.json") for name in ("train", "test"))
        numbers = self.budget.images
        singles = [record for record in train if record.task == "classification"]
        random.Random(0).shuffle(singles)
        shown = {record.image for record in singles[: numbers[0]]}
        captions = [record for record in train if record.task == "caption" and record.image in shown]
        faces = [record for record in train if record.task in ("hair", "smile")][: numbers[0]]
        self.pools = {
            "train": singles[: numbers[0]] + captions + faces,
            "validation": singles[numbers[0] : numbers[0] + numbers[1]],
            "test": [record for record in test if record.task == "classification"][: numbers[2]],
        }
        store = FeatureStore(model.tower[0], registry.default_cache() / "features")  # type: ignore[arg-type]
        bad = store.prepare([record.source for pool in self.pools.values() for record in pool])
        if bad:
            raise ValueError(f"{root}: every image must be readable, got {next(iter(bad.items()))}")
        self.stores = Stores(store, None)

    def _information(self, model: Octavius, tasks: list[str]) -> float | None:
        """I(task; heavier expert) / H(task) over questions in phrasings that training never showed."""
        if model.gate.num_experts == 1 or len(tasks) == 1:
            return None
        record = self.pools["train"][0]
        asked = [replace(record, turns=[(PHRASES[task][UNSEEN], "")], truth={"benchmark": task}) for task in tasks]
        data = InstructionData(asked, model.conversation, model.image_tokens, 0)
        means = mean_questions(model, [data[index] for index in range(len(data))])
        experts, gates, _ = model.gate(means[:, None])
        heavier = experts.long().gather(1, gates.argmax(1, keepdim=True))
        return moe_lora.mutual_information(torch.zeros(len(tasks), model.gate.num_experts).scatter_(1, heavier, 1.0))


def best_rates(finished: Sequence[dict[str, Any]], budget: str, number: int) -> dict[str, float]:
    """The best rate on the validation split of each arm whose search of `number` rates is complete."""
    scores: dict[str, dict[float, float]] = {}
    for line in finished:
        if line["stage"] == "search" and line["budget"] == budget:
            scores.setdefault(line["arm"], {})[line["rate"]] = line["score"]
    return {
        arm: max(rates, key=lambda rate: (rates[rate], -rate)) for arm, rates in scores.items() if len(rates) >= number
    }


def tasks_of(mix: str) -> tuple[str, ...]:
    """The tasks of a mix, the watched one first."""
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}")
    return (WATCHED,) if mix == "alone" else tuple(PHRASES) if mix == "all" else (WATCHED, RIVAL)


def mixture(pool: Sequence[Record], mix: str, watched: int, seed: int) -> list[Record]:
    """Training records: the same `watched` ones of the watched task in every mix of a seed, and the others."""
    rng = random.Random(seed)
    times = 1 if mix in ("alone", "all") else int(mix.partition(":")[2])
    records = []
    for task in tasks_of(mix):
        fit = [record for record in pool if suits(record, task)]
        for index in range(watched * (1 if task == WATCHED else times)):
            if index % len(fit) == 0:
                rng.shuffle(fit)
            records.append(_question(fit[index % len(fit)], task, rng.randrange(len(PHRASES[task]) - 1)))
    return records


def suits(record: Record, task: str) -> bool:
    """Whether the task can be asked about the record's image."""
    return record.task == ("classification" if task in ("class", "next", "letter") else task)


def ask(pool: Sequence[Record], task: str, phrase: int) -> list[Record]:
    """The task asked in one phrasing about every image of the pool that suits it."""
    return [_question(record, task, phrase) for record in pool if suits(record, task)]


def _question(record: Record, task: str, phrase: int) -> Record:
    text = _answer(record, task)
    return replace(record, turns=[(PHRASES[task][phrase], text)], task_type="normal", truth={"benchmark": task})


def _answer(record: Record, task: str) -> str:
    if task not in ("class", "next", "letter"):
        return record.turns[-1][1]
    label, labels = record.truth["label"], sorted(CATEGORIES)
    other = labels[(labels.index(label) + 1) % len(labels)]
    return {"class": label, "next": other, "letter": label[0].upper()}[task]


def hit(text: str, record: Record) -> bool:
    """Whether an answer is the expected word, case and full stop aside."""
    return text.strip().strip(".").casefold() == record.turns[-1][1].casefold()
