"""Training: a small set is learnt by heart, an interrupted run goes on as if nothing had happened."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moe_lora import MoELoRAConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octavius.assets import registry
from octavius.config import Config, TrainConfig
from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import data_folder, load_data
from octavius.evaluation.evaluate import answer
from octavius.language.prompts import IGNORE
from octavius.model.octavius import Octavius
from octavius.training.train import train
from octavius.training.trainer import OctaviusTrainer, training_arguments
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


def run_config(parts, folder, **changes):
    """`model`, `data` and fields of TrainConfig."""
    model = changes.pop("model", tiny.model_config(parts))
    data = changes.pop("data", tiny.data_config(parts))
    settings = {
        "steps": 4,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "log_steps": 1,
        "save_steps": 1000,
        "workers": 0,
    } | changes
    return Config(model, data, TrainConfig(output=str(folder), **settings))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(report):
    return [entry["loss"] for entry in report["loss"]]


@pytest.fixture(scope="module")
def learnt(parts, tmp_path_factory):
    """(config, model, report) of a run that learns all records by heart."""
    folder = tmp_path_factory.mktemp("learnt")
    lora = replace(tiny.LORA, rank=8, alpha=16, target_modules="all-linear")
    settings = {"steps": 60, "batch_size": 7, "learning_rate": 2e-2, "warmup": 0.1, "save_steps": 50}
    config = run_config(parts, folder, model=tiny.model_config(parts, lora=lora), **settings)
    return config, *train(config)


def test_training_learns_a_small_set_by_heart(learnt, parts):
    config, model, report = learnt
    found = losses(report)
    assert [entry["step"] for entry in report["loss"]] == list(range(1, 61)) and report["steps"] == 60
    assert found[0] > 4 and found[-1] < 0.1
    records, store = load_data(config.data, "train.json", **model.readers())
    assert len(records) == 7
    said = answer(model, records, store, max_new_tokens=40)
    assert said.texts == [record.turns[-1][1] for record in records]
    assert said.tokens_per_second > 0


def test_first_loss_is_the_models_own(learnt, parts):
    """Trainer logs the mean over the answer tokens of the step, of the model that the seed gives."""
    config, _, report = learnt
    torch.manual_seed(config.train.seed)
    fresh = Octavius.from_config(config.model)
    batch = tiny.batch(fresh, tiny.records(parts))
    fresh.projector.calibrate(batch["features"])
    assert fresh(**batch)["loss"].item() == pytest.approx(losses(report)[0], rel=1e-3)


def test_output_folder_is_a_model(learnt):
    config, model, _ = learnt
    other = Octavius.from_folder(config.train.output)
    assert all(torch.equal(tensor, trained(other)[name]) for name, tensor in trained(model).items())


def test_run_leaves_log_and_report(learnt, parts, tmp_path):
    config, model, report = learnt
    folder = tmp_path / "copy"
    shutil.copytree(config.train.output, folder)
    assert json.loads((folder / "train.json").read_text()) == report
    (events,) = folder.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, 61))
    assert log.Scalars("train/loss")[-1].value == pytest.approx(losses(report)[-1], rel=1e-3)
    tokens = int(tiny.batch(model, tiny.records(parts))["attention_mask"].sum())
    assert report["tokens_per_second"] * report["seconds"] == pytest.approx(60 * tokens)


def test_checkpoint_holds_what_trains_only(learnt, parts):
    folder = next(path for path in data_folder(learnt[0].train.output).glob("checkpoint-*"))
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "octavius.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}


def test_resumed_run_ends_as_the_uninterrupted_one(parts, tmp_path):
    """Interrupted in the middle of an epoch, with dropout: the same weights bit for bit, and the same losses."""
    model = tiny.model_config(parts, lora=replace(tiny.LORA, dropout=0.2))
    config = run_config(parts, tmp_path, steps=8, save_steps=4, model=model)
    whole, report = train(config)
    shutil.rmtree(tmp_path / "checkpoint-8")
    for file in (*tmp_path.glob("*.safetensors"), tmp_path / "train.json", tmp_path / "manifest.json"):
        file.unlink()
    again, resumed = train(config, resume=True)
    assert resumed["steps"] == 8 and losses(resumed) == losses(report)
    tokens = [each["tokens_per_second"] * each["seconds"] for each in (resumed, report)]
    assert 0.2 < tokens[0] / tokens[1] < 0.8  # it did not start afresh
    for name, tensor in trained(whole).items():
        assert torch.equal(trained(again)[name], tensor), name


def test_finished_run_is_loaded_and_a_longer_one_goes_on(parts, tmp_path):
    config = run_config(parts, tmp_path, steps=4, save_steps=4)
    first, report = train(config)
    again, loaded = train(config, resume=True)
    assert loaded == report
    for name, tensor in trained(first).items():
        assert torch.equal(trained(again)[name], tensor), name
    _, resumed = train(replace(config, train=replace(config.train, steps=6)), resume=True)
    assert (
        resumed["steps"] == 6
        and resumed["tokens_per_second"] * resumed["seconds"] < report["tokens_per_second"] * report["seconds"]
    )


def test_every_epoch_has_an_order_of_its_own(parts, tmp_path):
    config = run_config(parts, tmp_path, batch_size=2)
    model = tiny.make(parts)
    records, store = load_data(config.data, "train.json", **model.readers())
    data = InstructionData(records, model.conversation, model.image_tokens, 0)
    collate = Collator(model.conversation.eos, store.images)
    trainer = OctaviusTrainer(model, training_arguments(config), train_dataset=data, data_collator=collate)
    loader, orders = trainer.get_train_dataloader(), []
    for epoch in range(5):
        loader.set_epoch(epoch)  # as Trainer does
        orders.append([tuple(batch["attention_mask"].sum(1).tolist()) for batch in loader])
        assert sum(map(len, orders[-1])) == 7
    assert len(set(map(tuple, orders))) > 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_loss_is_the_answers_without_balancing(parts, tmp_path, accumulation):
    """At a vanishing rate the model stays as it is, so that only the logged balancing can differ."""
    still = {"learning_rate": 1e-12, "log_steps": 2, "batch_size": 2, "gradient_accumulation": accumulation}
    found = []
    for weight in (0.0, 0.7):
        model = tiny.model_config(parts, gate=tiny.gate(load_balancing=weight))
        config = run_config(parts, tmp_path / str(weight), model=model, **still)
        found.append(losses(train(config)[1]))
        (events,) = Path(config.train.output).rglob("events.out.tfevents.*")
        balancing = [event.value for event in EventAccumulator(str(events)).Reload().Scalars("train/balancing")]
        assert len(balancing) == 2
        assert all(value == 0 if weight == 0 else 0.5 < value / weight < 4.1 for value in balancing)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_resume_without_checkpoint_starts(parts, tmp_path):
    _, report = train(run_config(parts, tmp_path, steps=1), resume=True)
    assert report["steps"] == 1


def test_seed_gives_the_same_run(parts, tmp_path):
    runs = [train(run_config(parts, tmp_path / str(i), seed=seed)) for i, seed in enumerate((3, 3, 4))]
    one, same, other = (losses(report) for _, report in runs)
    assert one == same != other
    assert all(torch.equal(tensor, trained(runs[1][0])[name]) for name, tensor in trained(runs[0][0]).items())


def six(parts, folder):
    """Six records whose answers have very unequal lengths."""
    items = tiny.lamm()[:6]
    for item in items:
        item["image"] = str(parts.data.parent / item["image"])
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(items))
    return tiny.data_config(parts, root=str(folder))


@pytest.mark.parametrize("load_balancing", [0.0, 0.5])
def test_accumulated_batches_equal_the_bigger_one(parts, tmp_path, load_balancing):
    """The loss of a step is the mean over all its answer tokens, and the balance loss counts once."""
    data = six(parts, tmp_path / "six")
    mode = "dense" if load_balancing else "instance"  # the balance of all experts is linear in the instances
    gate = tiny.gate(mode=mode, load_balancing=load_balancing)
    found = []
    for size, times in ((6, 1), (2, 3), (1, 6)):
        config = run_config(
            parts,
            tmp_path / str(size),
            data=data,
            model=tiny.model_config(parts, gate=gate),
            batch_size=size,
            gradient_accumulation=times,
        )
        found.append(losses(train(config)[1]))
    assert found[1] == pytest.approx(found[0], rel=2e-3) and found[2] == pytest.approx(found[0], rel=2e-3)


def test_detection_comes_first_and_is_balanced_only_after(parts, tmp_path, monkeypatch):
    data = tiny.data_config(parts, detection_first=2, loop_detection=8)
    model = tiny.model_config(parts, gate=tiny.gate(load_balancing=0.5))
    steps, forward, balance = [], Octavius.forward, Octavius._balance

    @functools.wraps(forward)
    def watched(self, *arguments, labels, **more):
        answers = [self.conversation.decode(row[row != IGNORE].tolist()) for row in labels]
        steps.append([all("[" in text for text in answers), False])
        return forward(self, *arguments, labels=labels, **more)

    def balanced(self, routed):
        steps[-1][1] = True
        return balance(self, routed)

    monkeypatch.setattr(Octavius, "forward", watched)
    monkeypatch.setattr(Octavius, "_balance", balanced)
    train(run_config(parts, tmp_path, data=data, model=model, steps=5))
    assert steps[:2] == [[True, False]] * 2
    assert all(after for _, after in steps[2:]) and not all(detection for detection, _ in steps[2:])


def test_epochs_are_counted_where_steps_are_not_given(parts, tmp_path):
    _, report = train(run_config(parts, tmp_path, steps=-1, epochs=2.0))
    assert report["steps"] == 6  # 7 records in batches of 3, twice


def test_activation_checkpointing_does_not_change_the_run(parts, tmp_path):
    runs = [train(run_config(parts, tmp_path / str(on), gradient_checkpointing=on))[1] for on in (False, True)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_single_lora_trains(parts, tmp_path):
    lora = MoELoRAConfig(num_experts=1, top_k=1, rank=6, alpha=12, dropout=0.0)
    config = run_config(parts, tmp_path, steps=12, batch_size=7, model=tiny.model_config(parts, lora=lora))
    model, report = train(config)
    assert losses(report)[-1] < 0.7 * losses(report)[0]
    batch = tiny.batch(model, tiny.records(parts))
    assert torch.equal(model(**batch)["gates"], torch.ones(7, 1))
    assert (batch["labels"] != IGNORE).any()


def test_bad_images_end_the_run_before_it_starts(parts, tmp_path):
    data = six(parts, tmp_path / "six")
    items = json.loads((tmp_path / "six/train.json").read_text())
    items[2]["image"] = "nowhere.png"
    (tmp_path / "six/train.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"1 of 6 records have an unreadable image .*nowhere\.png"):
        train(run_config(parts, tmp_path / "run", data=data))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_features_are_kept_in_the_cache(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert registry.default_cache() == tmp_path / "cache/octavius"
    data = tiny.data_config(parts, cache_features=True)
    _, kept = train(run_config(parts, tmp_path / "kept", data=data))
    assert len(list((tmp_path / "cache/octavius/features").glob("*/ready/rows.f16"))) == 1
    _, fresh = train(run_config(parts, tmp_path / "fresh"))
    assert losses(kept) == pytest.approx(losses(fresh), rel=1e-2)


@pytest.mark.slow
def test_compiled_layers_train_like_eager_ones(parts, tmp_path):
    eager, compiled = (
        train(run_config(parts, tmp_path / str(compile), compile=compile, projector_init=True, steps=3))[1]
        for compile in (False, True)
    )
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


def test_alignment_is_where_training_starts(parts, tmp_path):
    model, _ = train(run_config(parts, tmp_path, projector_init=True, steps=1, learning_rate=0.0))
    torch.manual_seed(0)
    fresh = Octavius.from_config(model.settings)
    table = fresh.llm.get_input_embeddings().weight
    assert not torch.equal(model.projector.positions, fresh.projector.positions)
    assert torch.allclose(model.projector.net[0].bias, table.mean(0), atol=1e-6)


def test_aligned_projectors_learn_at_a_tenth_of_the_rate(parts, tmp_path):
    config = run_config(parts, tmp_path)
    model = Octavius.from_config(config.model)
    trainer = OctaviusTrainer(model=model, args=training_arguments(config))
    trainer.closed_form = True
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(rates) == sorted(map(id, trainable.values()))
    for name, p in trainable.items():
        assert rates[id(p)] == pytest.approx(1e-3 if name.startswith("projector.") else 1e-2), name
    assert trainer.create_optimizer() is optimizer


def test_gate_has_its_own_rate_and_no_decay_and_experts_their_own_steps(parts, tmp_path):
    config = run_config(parts, tmp_path, weight_decay=0.1)
    model = Octavius.from_config(config.model)
    trainer = OctaviusTrainer(model=model, args=training_arguments(config))
    trainer.gate_rate = 3e-4
    groups = {id(p): group for group in trainer.create_optimizer().param_groups for p in group["params"]}
    gate = groups[id(model.gate.w_gating)]
    assert gate["lr"] == 3e-4 and gate["weight_decay"] == 0 and not gate["experts"]
    stacks = [p for name, p in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))]
    assert len(stacks) == 16
    for p in stacks:
        assert groups[id(p)]["experts"] and groups[id(p)]["lr"] == 1e-2 and groups[id(p)]["weight_decay"] == 0.1
        assert groups[id(p)]["betas"] == (0.9, 0.95)


def test_routing_is_seen_while_training(learnt, parts):
    config, model, report = learnt
    routing, tasks = report["routing"], ["mini-caption", "mini-classification", "mini-detection", "mini-vqa"]
    assert routing["tasks"] == tasks and routing["information"] > 0.9
    batch = tiny.batch(model, tiny.records(parts))
    gates, benchmarks = model(**batch)["gates"], [record.task for record in tiny.records(parts)]
    for task, weights, heavier in zip(tasks, routing["weights"], routing["heavier"], strict=True):
        rows = [index for index, name in enumerate(benchmarks) if name == task]
        assert weights == pytest.approx(gates[rows].mean(0).tolist(), abs=0.15)
        assert sum(weights) == pytest.approx(1) and sum(heavier) == pytest.approx(1)
    (events,) = Path(config.train.output).rglob("events.out.tfevents.*")
    told = EventAccumulator(str(events)).Reload().Scalars("train/routing_information")
    assert len(told) == 60 and told[-1].value == pytest.approx(routing["information"], rel=1e-4)


def test_bias_balances_in_training_only(parts, tmp_path):
    gate = tiny.gate(kind="paper", balance_bias=0.01)
    model, _ = train(run_config(parts, tmp_path, model=tiny.model_config(parts, gate=gate)))
    bias = model.gate.bias.clone()
    assert bias.abs().max() == pytest.approx(0.04, abs=0.021) and bias.any()
    model.eval()(**tiny.batch(model, tiny.records(parts)))
    assert torch.equal(model.gate.bias, bias)


def test_answers_of_a_compiled_model_compile_nothing(parts, tmp_path):
    model, _ = train(run_config(parts, tmp_path, compile=True, steps=1))
    records, store = load_data(run_config(parts, tmp_path).data, "train.json", **model.readers())
    torch._dynamo.utils.counters.clear()
    answer(model, records, store, max_new_tokens=3)
    assert not torch._dynamo.utils.counters["stats"]
