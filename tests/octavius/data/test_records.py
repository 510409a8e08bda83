"""Data: upstream's JSON in, padded batches out; what is broken is named."""

import json
import re
from pathlib import Path

import pytest
import torch

from octavius.data.batches import BucketSampler, Collator, InstructionData
from octavius.data.records import Record, drop_unreadable, read_records
from octavius.language.prompts import IGNORE, ConversationFormat
from octavius.vision.features import FeatureStore
from octavius.vision.towers import load_tower
from tests.support import tiny


def write(folder, items):
    path = folder / "records.json"
    path.write_text(items if isinstance(items, str) else json.dumps(items))
    return path


def item(**changes):
    known = {"id": "x7", "image": "a/b.png", "task_type": "VQA", "conversations": tiny.turns("How?", "So.")}
    return {key: value for key, value in (known | changes).items() if value != "absent"}


def test_record_carries_all_that_the_file_has(tmp_path):
    texts = ("<image>\nWho?", "A cat.", "And\n<image>", "A dog.")
    made = read_records(write(tmp_path, [item(conversations=tiny.turns(*texts), benchmark="vqa", gt_choice=1)]))
    turns = [("Who?", "A cat."), ("And", "A dog.")]
    assert made == [Record("x7", tmp_path / "a/b.png", turns, "VQA", {"benchmark": "vqa", "gt_choice": 1})]


def test_images_folder_and_defaults(tmp_path):
    made = read_records(write(tmp_path, [item(id="absent", task_type="absent")]), tmp_path / "images")
    assert made[0].image == tmp_path / "images/a/b.png" and made[0].task_type == "normal"
    assert "record 0" in made[0].id


XML = (
    (
        '<Root><Item x1="0.5" y1="0" x2="1.0" y2="0.25" cls="dog"/>'
        '<Item x1="-0.01" y1="0.3" x2="0.4" y2="1.03" cls="owl"/></Root>',
        [("dog", [0.5, 0, 1, 0.25]), ("owl", [0, 0.3, 0.4, 1])],
        "An owl at [0.00, 0.30, 0.40, 1.00]. A dog at [0.50, 0.00, 1.00, 0.25].",
    ),
    (
        "<Item><x1>0.1</x1><y1>0.2</y1><x2>0.3</x2><y2>0.4</y2><cls>cat &amp; co</cls></Item>",
        [("cat & co", [0.1, 0.2, 0.3, 0.4])],
        "A cat & co at [0.10, 0.20, 0.30, 0.40].",
    ),
    ("<Root></Root>", [], "There is no object."),
)


@pytest.mark.parametrize("xml, objects, answer", XML, ids=["attributes", "children", "none"])
def test_detection_answer_becomes_text(tmp_path, xml, objects, answer):
    turns = tiny.turns("Boxes?", xml)
    (made,) = read_records(write(tmp_path, [item(task_type="detection", conversations=turns)]))
    assert made.turns == [("Boxes?", answer)]
    assert [(entry["label"], entry["bbox"]) for entry in made.truth["object"]] == objects


def test_detection_answer_in_words_stays(tmp_path):
    turns = tiny.turns("Boxes?", "None here.")
    (made,) = read_records(write(tmp_path, [item(task_type="detection", conversations=turns)]))
    assert made.turns == [("Boxes?", "None here.")] and made.truth == {}


def detection(xml):
    return item(task_type="detection", conversations=tiny.turns("Boxes?", xml))


HUGE = json.dumps([item(pcl="a.npz", task_type="classification3d", object_id=0)]).replace(": 0", ": 1e400")
BAD = (
    ("{", "cannot be read as JSON"),
    ('{"image": 3}', "must be a list of records, got dict"),
    ([item(), 3], "record 1: must be an object, got int"),
    ([item(image=3)], r"record 0 \(id x7\): field image must be a path, got 3"),
    ([item(), item(task_type="vqa", id="n")], r"record 1 \(id n\): field task_type must be one of .*, got 'vqa'"),
    ([item(conversations="absent")], "field conversations must hold pairs of human and gpt turns, got None"),
    ([item(conversations=[])], "field conversations must hold pairs"),
    ([item(conversations=tiny.turns("a", "b", "c"))], "field conversations must hold pairs"),
    ([item(conversations=tiny.turns("a", "b", "c", 5))], r"field conversations\[3\] must be from gpt with a text"),
    ([item(conversations=tiny.turns("a", "b")[::-1])], r"field conversations\[0\] must be from human"),
    ([item(conversations=["a", "b"])], r"field conversations\[0\] must be from human"),
    ([detection('<Item x1="0" y1="0" x2="1" cls="a"/>')], r"field conversations\[1\] must be XML <Item>s with x1"),
    ([detection('<Item x1="left" y1="0" x2="1" y2="1"/>')], "could not convert string to float: 'left'"),
    ([detection('<Item x1="12" y1="20" x2="310" y2="200" cls="a"/>')], r"\(id x7\).*fractions.*are these pixels"),
    ([detection('<Item x1="nan" y1="0" x2="1" y2="1" cls="a"/>')], r"\(id x7\).*four finite numbers"),
    ([detection('<Item x1="0.5" y1="0" x2="0.2" y2="1" cls="a"/>')], r"\(id x7\).*x1 <= x2"),
    ([item(object=[{"label": "a", "bbox": [0, 0, 1, float("nan")]}])], r"\(id x7\): field object: a box must be four"),
    ([item(object=[{"label": "a", "bbox": [0, 0, 300, 200]}])], r"\(id x7\): field object: .*are these pixels"),
    ([item(object=[{"label": "a", "bbox": 3}])], r"\(id x7\): field object: a box must be four numbers"),
    ([item(task_type=["x"])], r"record 0 \(id x7\): field task_type must be one of .*, got \['x'\]"),
    (HUGE, "field object_id must be a number, got inf"),
    ("[" * 100_000, "cannot be read as JSON: lists and objects are nested too deeply"),
    ([detection('<Item x1="0" y1="0"')], r"field conversations\[1\] must be XML"),
)


@pytest.mark.parametrize("items, message", BAD, ids=[re.sub(r"\W+", "-", message)[:45] for _, message in BAD])
def test_malformed_file_names_file_record_and_field(tmp_path, items, message):
    path = write(tmp_path, items)
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([item()]).encode())
    assert [record.id for record in read_records(path)] == ["x7"]


def test_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_records(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_records(tmp_path / "binary.json")


def test_record_without_image_is_counted_and_skipped(tmp_path, capsys):
    path = write(tmp_path, [item(id="a"), item(image="absent"), item(image=None), item(id="b")])
    assert [record.id for record in read_records(path)] == ["a", "b"]
    assert "2 of 4 records have no image" in " ".join(capsys.readouterr().err.split())


def some(count):
    return [Record(str(index), Path(f"{index}.png"), [("q", "a")], "VQA", {}) for index in range(count)]


def test_bad_images_are_named_and_skipped_up_to_one_percent(capsys):
    records, bad = some(200), {Path("3.png"): "no such file", Path("77.png"): "cut short"}
    kept = drop_unreadable(records, bad)
    assert [record.id for record in kept] == [str(index) for index in range(200) if index not in (3, 77)]
    shown = " ".join(capsys.readouterr().err.split())
    assert "2 of 200 records" in shown and "3.png: no such file" in shown and "77.png: cut short" in shown
    bad[Path("9.png")] = "empty"
    with pytest.raises(ValueError, match=r"3 of 200 records have an unreadable image .*; at most 1% may be"):
        drop_unreadable(records, bad)


def test_bad_image_counts_for_each_of_its_records():
    twice = [*some(150), *some(1), *some(1)]
    with pytest.raises(ValueError, match=r"3 of 152 records have an unreadable image or cloud \(1 files: 0.png: torn"):
        drop_unreadable(twice, {Path("0.png"): "torn"})


def test_good_images_are_all_kept():
    assert drop_unreadable(some(3), {}) == some(3)


@pytest.fixture(scope="module")
def kit(parts):
    tokenizer = tiny.save_tokenizer(parts.llm.parent / "tokenizer")
    return (
        ConversationFormat(tokenizer, len(tokenizer)),
        FeatureStore(load_tower(str(parts.tower))),
        tiny.records(parts),
    )


def test_sample_is_the_conversation(kit):
    conversation, store, records = kit
    data = InstructionData(records, conversation, store.tower.tokens, max_tokens=9)
    assert len(data) == len(records)
    for index, record in enumerate(records):
        sample, want = data[index], conversation.encode(record.turns, record.task_type, 4, 9)
        assert (sample["input_ids"], sample["labels"], sample["gate_mask"]) == (want.ids, want.labels, want.gate)
        assert sample["image"] == record.image


def test_prompt_has_no_last_answer_and_is_never_cut(kit):
    conversation, store, records = kit
    data = InstructionData(records, conversation, store.tower.tokens, max_tokens=2, answer=False)
    for sample in data:
        tail = [token for token in sample["input_ids"] if token < conversation.image_start]
        assert conversation.tokenizer.decode(tail).endswith("\n### Assistant:")
    talk = data[3]  # keeps the answers before the last
    assert "An orange square." in conversation.tokenizer.decode(
        [t for t, v in zip(*map(talk.get, ("input_ids", "labels")), strict=True) if v != IGNORE]
    )


def test_no_record_is_refused(kit):
    with pytest.raises(ValueError, match="at least one record with a readable image or cloud, got none"):
        InstructionData([], kit[0], 4, 0)


@pytest.mark.parametrize("left", [False, True])
def test_collator_pads_one_side(kit, left):
    conversation, store, records = kit
    data = InstructionData(records, conversation, store.tower.tokens, max_tokens=0)
    samples = [data[index] for index in (3, 6, 1)]
    made = Collator(conversation.eos, store, left)(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert len(set(lengths)) == 3
    assert made["pixels"].shape == (3, 3, store.tower.size, store.tower.size)
    torch.testing.assert_close(store.tower.features(made["pixels"]), store([sample["image"] for sample in samples]))
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        real = slice(max(lengths) - length, None) if left else slice(length)
        gap = slice(max(lengths) - length) if left else slice(length, None)
        assert made["attention_mask"][row].sum() == length and made["attention_mask"][row, real].all()
        for key, fill in (("input_ids", conversation.eos), ("labels", IGNORE), ("gate_mask", 0)):
            assert made[key][row, real].tolist() == sample[key]
            assert (made[key][row, gap] == fill).all()


LENGTHS = [(7 * index) % 23 + 3 for index in range(47)]


def test_sampler_visits_every_sample_once_in_an_order_of_its_own_for_each_pass():
    sampler = BucketSampler(LENGTHS, batch_size=4, seed=1, window=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(sampler) == 47 and first == again != second
    assert sorted(first) == sorted(second) == list(range(47))
    assert list(BucketSampler(LENGTHS, 4, seed=2, window=3)) != first


def test_sampler_begins_with_what_it_is_told_to():
    sampler = BucketSampler(LENGTHS, batch_size=4, seed=1, window=3, first=range(5, 13))  # less than a window
    order = list(sampler)
    assert sorted(order[:8]) == list(range(5, 13)) and sorted(order) == list(range(47))
    sampler.set_epoch(1)
    assert sorted(list(sampler)[:8]) != list(range(5, 13))


def test_sampler_puts_like_lengths_together_and_mixes_the_batches():
    order = [LENGTHS[index] for index in BucketSampler(LENGTHS, batch_size=4, seed=1, window=3)]
    batches = [order[start : start + 4] for start in range(0, 47, 4)]
    assert [len(batch) for batch in batches] == [4] * 11 + [3]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < (max(LENGTHS) - min(LENGTHS)) / 2
    means = [sum(batch) for batch in batches[:3]]
    assert any(sorted(means) != [sum(b) for b in batches[at : at + 3]] for at in (0, 3, 6))
