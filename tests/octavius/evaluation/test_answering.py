"""Answers in batches, shards and after kills: always the same lines; and the three ways to get an answer."""

import json
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

from octavius.data.loading import Stores
from octavius.evaluation.answering import Plan, answer_batches, answer_file, make_batches, parse_shard
from octavius.evaluation.evaluate import read_answers
from octavius.evaluation.inferencers import INFERENCERS
from octavius.evaluation.scoring import score
from octavius.vision.features import FeatureStore
from tests.support import tiny

PLAN = Plan(batch_size=2, max_new_tokens=5)


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make(parts)


@pytest.fixture(scope="module")
def store(model):
    return Stores(FeatureStore(model.tower[0]))


@pytest.fixture(scope="module")
def records(parts):
    """Four tasks, three times over, so that batches mix them."""
    return [replace(record, id=f"{record.id}-{turn}") for turn in range(3) for record in tiny.records(parts)]


@pytest.fixture(scope="module")
def whole(model, records, store, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    answer_file(model, records, store, path, PLAN)
    return path.read_bytes()


def test_file_has_a_line_per_record_in_order(whole, records):
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == [record.id for record in records]
    assert [line["index"] for line in lines] == list(range(21)) and all(line["truth"]["benchmark"] for line in lines)


def test_batches_mix_tasks_and_experts(model, records, store):
    batches = list(answer_batches(model, records, store, replace(PLAN, batch_size=7)))
    assert any(len({records[row].task_type for row in rows}) > 1 for rows, _, _ in batches)
    assert any(len({tuple(row.tolist()) for row in weights > 0}) > 1 for _, _, weights in batches)


@pytest.mark.parametrize("batch_size", [1, 2, 21])
def test_batched_answers_equal_single_ones(model, records, store, batch_size, whole):
    texts = {}
    for rows, answers, _ in answer_batches(model, records, store, replace(PLAN, batch_size=batch_size)):
        texts |= dict(zip(rows, answers, strict=True))
    assert [texts[row] for row in range(21)] == [json.loads(line)["answer"] for line in whole.splitlines()]


def test_answering_after_a_tear_at_any_byte_gives_the_same_file(model, records, store, whole, tmp_path):
    path, rng = tmp_path / "answers.jsonl", random.Random(0)
    kept = tmp_path / "kept"
    count = {"batches": 0}
    for rows, _, _ in answer_batches(model, records, store, PLAN):
        count["batches"] += bool(rows)
    original = os.fsync

    def remember(handle):  # what is on the disk after the sixth batch
        original(handle)
        partial = tmp_path / "answers.jsonl.partial"
        if partial.exists() and len(partial.read_bytes().splitlines()) == 13:
            kept.write_bytes(partial.read_bytes())

    os.fsync = remember
    try:
        answer_file(model, records, store, path, PLAN)
    finally:
        os.fsync = original
    assert path.read_bytes() == whole and count["batches"] == 11
    for _ in range(6):
        cut = kept.read_bytes()[: rng.randrange(len(kept.read_bytes()))]
        (tmp_path / "answers.jsonl.partial").write_bytes(cut)
        answer_file(model, records, store, path, PLAN)
        assert path.read_bytes() == whole
        assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl", "kept"]


def test_known_answers_are_not_asked_again(model, records, store, whole, tmp_path, monkeypatch):
    header = {"run": "another run"}
    path = tmp_path / "answers.jsonl"
    (tmp_path / "answers.jsonl.partial").write_text(json.dumps(header) + "\n" + whole.decode())
    answer_file(model, records, store, path, PLAN)  # of another run: begun anew
    assert path.read_bytes() == whole
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **batch: calls.append(1) or _stop(calls) or generate(**batch))
    with pytest.raises(KeyboardInterrupt):
        answer_file(model, records, store, path, PLAN)
    assert len((tmp_path / "answers.jsonl.partial").read_bytes().splitlines()) == 1 + 3 * 2
    monkeypatch.setattr(model, "generate", lambda **batch: calls.append(1) or generate(**batch))
    del calls[:]
    answer_file(model, records, store, path, PLAN)
    assert path.read_bytes() == whole and len(calls) == 11 - 3


def _stop(calls):
    if len(calls) == 4:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_killed_twenty_times_gives_the_same_file(model, records, store, whole, tmp_path):
    torch.set_num_threads(1)
    path, rng, kills = tmp_path / "answers.jsonl", random.Random(1), 0
    while kills < 20:
        child = os.fork()
        if not child:
            try:
                answer_file(model, records, store, path, PLAN)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        if path.exists():
            assert path.read_bytes() == whole
            path.unlink()
    answer_file(model, records, store, path, PLAN)
    assert path.read_bytes() == whole


def test_two_shards_equal_one(model, records, store, whole, tmp_path):
    paths = [tmp_path / f"{number}.jsonl" for number in (2, 1)]
    for path, number in zip(paths, (2, 1), strict=True):
        answer_file(model, records, store, path, replace(PLAN, shard=(number, 2)))
    lines = [line for path in paths for line in path.read_bytes().splitlines()]
    assert sorted(lines, key=lambda line: json.loads(line)["index"]) == whole.splitlines()
    assert len(lines) == 21 and all(len(path.read_bytes().splitlines()) > 8 for path in paths)
    (tmp_path / "one.jsonl").write_bytes(whole)
    assert score(read_answers(paths)) == score(read_answers([tmp_path / "one.jsonl"]))


def test_two_processes_do_not_share_a_file(model, records, store, tmp_path):
    import fcntl

    with (tmp_path / "answers.jsonl.partial").open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process writes it"):
            answer_file(model, records, store, tmp_path / "answers.jsonl", PLAN)


def test_shards_are_parsed_or_refused():
    assert parse_shard("2/3") == (2, 3) and parse_shard(None) == (1, 1)
    for text in ("3", "a/b", "-1/2", "1/"):
        with pytest.raises(ValueError, match="shard must be NUMBER/COUNT"):
            parse_shard(text)
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="1 <= NUMBER <= COUNT"):
            Plan(shard=shard)
    with pytest.raises(ValueError, match="must be at least 1"):
        Plan(batch_size=0)


def test_likeliest_choice_has_the_lowest_mean_loss(model, records, store):
    """The model's own loss on each choice, one at a time, says the same."""
    chosen = [record for record in records[:7] if record.truth["benchmark"] in ("mini-vqa", "mini-classification")]
    (batch,) = list(answer_batches(model, chosen, store, Plan(inferencer="PPL")))
    said = dict(zip(batch[0], batch[1], strict=True))
    for row, record in enumerate(chosen):
        truth = record.truth
        choices = truth.get("labels") or [f"({'AB'[i]}) {text}" for i, text in enumerate(truth["gt_choices"])]
        turns = [replace(record, turns=[*record.turns[:-1], (record.turns[-1][0], text)]) for text in choices]
        losses = []
        for turn in turns:
            single = tiny.batch(model, [turn])
            labels = single["labels"]
            start = int((labels[0] != -100).nonzero().max()) + 1  # only the last answer counts
            tokens = len(model.conversation.tokens(f" {turn.turns[-1][1]}")) + 1
            labels[0, : start - tokens] = -100
            losses.append(model(**single)["loss"].item())
        assert said[row] == choices[losses.index(min(losses))]


def test_reasoned_answer_goes_on_from_the_reasoning(model, records, store):
    (batch,) = list(answer_batches(model, records[:3], store, Plan(inferencer="CoT", max_new_tokens=4)))
    (plain,) = list(answer_batches(model, records[:3], store, Plan(max_new_tokens=4)))
    for thought, text in zip(plain[1], batch[1], strict=True):
        assert text.startswith(f"{thought}\nThe answer is ")
    torch.testing.assert_close(batch[2], plain[2])  # the gate reads the question alone


def test_inferencers_are_named_and_choices_needed(model, records, store):
    assert set(INFERENCERS) == {"Direct", "PPL", "CoT"}
    with pytest.raises(ValueError, match="inferencer must be one of Direct, PPL, CoT, got 'Beam'"):
        list(answer_batches(model, records[:1], store, Plan(inferencer="Beam")))
    with pytest.raises(ValueError, match=r"'d0-0': inferencer PPL needs choices, and mini-detection has none"):
        list(answer_batches(model, records[:1], store, Plan(inferencer="PPL")))


def test_batches_share_inferencer_and_length(records):
    batches = make_batches(records, list(range(21)), PLAN)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(21))
    assert {batch.inferencer for batch in batches} == {"Direct"} and {batch.max_new_tokens for batch in batches} == {5}
