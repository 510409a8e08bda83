"""Answers and scores: in the order of the records, and blind with everybody else's images."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavius.data.loading import Stores
from octavius.data.records import Record
from octavius.evaluation.evaluate import Answers, answer, evaluate, exchange_images, routing_map, write_answers
from octavius.vision.features import FeatureStore
from tests.support import tiny


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make(parts)


@pytest.fixture(scope="module")
def store(model):
    return Stores(FeatureStore(model.tower[0]))


@pytest.fixture(scope="module")
def records(parts):
    return tiny.records(parts)


def many(images, benchmark="vqa"):
    return [
        Record(f"{benchmark}{i}", Path(name), [(f"q{i}", f"a{i}")], "VQA", {"benchmark": benchmark})
        for i, name in enumerate(images)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("images", ["abcdefg", "ab", "aabbccd", "aaabbb", "aabcb"], ids=str)
def test_exchange_gives_everybody_another_image(images, seed):
    one, two = many(images), many([f"hair-{name}" for name in "uvw"], "hair")
    mixed = [record for pair in zip(one, two, strict=False) for record in pair] + one[3:] + two[len(one) :]
    changed = exchange_images(mixed, seed)
    assert all(new.image != old.image for new, old in zip(changed, mixed, strict=True))
    assert [replace(new, image=old.image) for new, old in zip(changed, mixed, strict=True)] == mixed
    for benchmark in ("vqa", "hair"):
        shown = [Counter(r.image for r in rows if r.truth["benchmark"] == benchmark) for rows in (changed, mixed)]
        assert shown[0] == shown[1]  # the same images, as often


def test_exchange_depends_on_the_seed_alone():
    records = many("abcdefghijklm")
    drawn = [[record.image for record in exchange_images(records, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [record.image for record in records] == [Path(name) for name in "abcdefghijklm"]


def test_exchange_of_a_lone_record():
    assert exchange_images(many("a")) == many("a") and exchange_images([]) == []


def test_exchange_without_benchmark_goes_by_task():
    records = [replace(record, truth={}, task_type=task) for record, task in zip(many("abcd"), "xyxy", strict=True)]
    assert [record.image.name for record in exchange_images(records)] == list("cdab")


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_come_in_the_order_of_the_records(model, records, store, batch_size):
    said = answer(model, records, store, batch_size=batch_size, max_new_tokens=5)
    for index, record in enumerate(records):
        texts, weights = model.generate(**tiny.batch(model, [record], answer=False), max_new_tokens=5)
        assert said.texts[index] == texts[0]
        torch.testing.assert_close(said.weights[index], weights[0], atol=1e-6, rtol=1e-5)
    assert said.tokens_per_second > 0


def test_answering_is_done_in_evaluation_mode(parts, records, store):
    lora = replace(tiny.LORA, dropout=0.9)
    model = tiny.make(parts, lora=lora)
    want = answer(model, records, store, max_new_tokens=5).texts
    assert answer(model.train(), records, store, max_new_tokens=5).texts == want
    assert model.training
    assert not any(module.training for module in model.eval().modules())


def test_blind_sees_other_images(model, records, store):
    seen = answer(model, records, store, max_new_tokens=5)
    blind = answer(model, records, store, max_new_tokens=5, blind=True)
    want = answer(model, exchange_images(records), store, max_new_tokens=5)
    assert blind.texts == want.texts != seen.texts
    assert torch.equal(blind.weights, seen.weights)  # the gate does not see the image
    caption = next(index for index, record in enumerate(records) if record.truth["benchmark"] == "mini-caption")
    assert blind.texts[caption] == seen.texts[caption]  # the only one of its benchmark


def test_scores_go_by_benchmark(model, records, store):
    scores, said = evaluate(model, records, store, max_new_tokens=5)
    assert {name: entry["n"] for name, entry in scores.items()} == {
        "mini-detection": 1,
        "mini-classification": 3,
        "mini-vqa": 2,
        "mini-caption": 1,
    }
    assert len(said.texts) == 7 and all(0 <= scores[name]["Acc@1"] <= 1 for name in ("mini-classification", "mini-vqa"))


def test_record_without_truth_is_named_before_a_question_is_asked(model, records, store, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda **batch: pytest.fail("asked"))
    bare = [records[0], replace(records[1], truth={})]
    with pytest.raises(ValueError, match=r"c1.*benchmark"):
        evaluate(model, bare, store, max_new_tokens=2)


def test_routing_map_is_the_mean_by_benchmark(records):
    weights = torch.rand(7, 4)
    found = routing_map(records, weights)
    assert found["benchmarks"] == ["mini-caption", "mini-classification", "mini-detection", "mini-vqa"]
    for name, row in zip(found["benchmarks"], found["weights"], strict=True):
        rows = [index for index, record in enumerate(records) if record.truth["benchmark"] == name]
        assert row == pytest.approx(weights[rows].mean(0).tolist())
    json.dumps(found)


def test_written_answers_read_back(records, tmp_path):
    weights = torch.zeros(7, 4)
    weights[:, 2], weights[:, 0] = 0.75, 0.25
    said = Answers([f'one\n"two" {index} é' for index in range(7)], weights, 1.0)
    write_answers(tmp_path / "answers.jsonl", records, said)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 7
    for index, (line, record) in enumerate(zip(lines, records, strict=True)):
        assert json.loads(line) == {
            "index": index,
            "id": record.id,
            "benchmark": record.truth["benchmark"],
            "image": str(record.image),
            "question": record.turns[-1][0],
            "answer": said.texts[index],
            "reference": record.turns[-1][1],
            "experts": [[0, 0.25], [2, 0.75]],
            "truth": record.truth,
        }
