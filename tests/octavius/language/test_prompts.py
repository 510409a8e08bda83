"""Prompts: what is learnt, what the gate reads, and that generation sees what training saw."""

import pytest

from octavius.language.prompts import IGNORE, SYSTEM, ConversationFormat, box_answer
from tests.support import tiny

TURNS = [("What colour is it?", "red"), ("Where?", "On the left."), ("Sure?", "Yes.")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain(tokenizer):
    return ConversationFormat(tokenizer, len(tokenizer))


def text(tokenizer, ids):
    return tokenizer.decode([i for i in ids if i < len(tokenizer)])


def test_layout_of_a_conversation(plain, tokenizer):
    ids = plain.encode(TURNS[:2], "VQA", image_tokens=3).ids
    vocab = len(tokenizer)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    first = ids.index(vocab)
    assert ids[first : first + 5] == [vocab, vocab + 2, vocab + 2, vocab + 2, vocab + 1]
    assert text(tokenizer, ids) == (
        "<s>### Human: What colour is it?\n### Assistant: red</s>\n### Human: Where?\n### Assistant: On the left.</s>"
    )
    assert text(tokenizer, ids[:first]) == "<s>### Human:"


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("image_tokens", [0, 3])
def test_generation_sees_the_prompt_of_training(tokenizer, count, system, image_tokens):
    conversation = ConversationFormat(tokenizer, len(tokenizer), system, gate_system=system)
    turns = TURNS[:count]
    learnt = conversation.encode(turns, "VQA", image_tokens)
    asked = conversation.encode([*turns[:-1], (turns[-1][0], None)], "VQA", image_tokens)
    length = len(asked.ids)
    assert learnt.ids[:length] == asked.ids and learnt.gate[:length] == asked.gate
    assert asked.labels == learnt.labels[:length]
    rest = learnt.ids[length:]
    assert text(tokenizer, rest) == f" {turns[-1][1]}</s>" and learnt.labels[length:] == rest
    assert not any(learnt.gate[length:])


def test_labels_are_the_answers_and_their_ends(plain, tokenizer):
    sample = plain.encode(TURNS, "VQA", image_tokens=3)
    assert all(label in (IGNORE, token) for label, token in zip(sample.labels, sample.ids, strict=True))
    learnt = [token for token in sample.labels if token != IGNORE]
    assert text(tokenizer, learnt) == " red</s> On the left.</s> Yes.</s>"
    assert max(learnt) < len(tokenizer)


def test_gate_reads_the_first_question_only(tokenizer, plain):
    sample = plain.encode(TURNS, "VQA", image_tokens=3)
    read = [token for token, flag in zip(sample.ids, sample.gate, strict=True) if flag]
    assert text(tokenizer, read) == " What colour is it?"
    assert set(sample.gate) == {0, 1} and sample.gate.index(1) > sample.ids.index(len(tokenizer) + 1)


def test_gate_reads_the_system_message_on_demand(tokenizer):
    shown = {}
    for gate_system in (False, True):
        conversation = ConversationFormat(tokenizer, len(tokenizer), system=True, gate_system=gate_system)
        sample = conversation.encode(TURNS, "counting", image_tokens=3)
        assert text(tokenizer, sample.ids).startswith(f"<s>{SYSTEM['counting']}\n\n### Human: What colour")
        shown[gate_system] = text(tokenizer, [t for t, flag in zip(sample.ids, sample.gate, strict=True) if flag])
    assert shown == {False: " What colour is it?", True: f"{SYSTEM['counting']}\n\n What colour is it?"}


def test_question_has_the_same_ids_wherever_it_stands(tokenizer):
    seen = set()
    for system in (False, True):
        for image_tokens in (0, 4):
            conversation = ConversationFormat(tokenizer, len(tokenizer), system)
            sample = conversation.encode(TURNS, "VQA", image_tokens)
            seen.add(tuple(t for t, flag in zip(sample.ids, sample.gate, strict=True) if flag))
    assert len(seen) == 1


@pytest.mark.parametrize("limit", [1, 7, 19])
def test_cut_counts_from_the_image(plain, tokenizer, limit):
    whole, cut = plain.encode(TURNS, "VQA", 5), plain.encode(TURNS, "VQA", 5, max_tokens=limit)
    start = whole.ids.index(len(tokenizer) + 1) + 1
    assert len(cut.ids) == start + limit
    assert (cut.ids, cut.labels, cut.gate) == tuple(
        part[: start + limit] for part in (whole.ids, whole.labels, whole.gate)
    )


def test_cut_longer_than_the_conversation_keeps_all(plain):
    assert plain.encode(TURNS, "VQA", 5, max_tokens=999) == plain.encode(TURNS, "VQA", 5)


def test_spaces_around_a_turn_do_not_matter(plain):
    assert plain.encode([(" Where?\n", "\thome ")]) == plain.encode([("Where?", "home")])


def test_decode_ends_where_the_next_turn_begins(plain, tokenizer):
    ids = tokenizer(" A cat.\n### Human: more", add_special_tokens=False).input_ids
    assert plain.decode([*ids, tokenizer.eos_token_id, tokenizer.eos_token_id]) == "A cat."


def test_no_bos_no_matter_no_eos_no_way(tokenizer, tmp_path):
    other = tiny.save_tokenizer(tmp_path)
    other.bos_token = None
    ids = ConversationFormat(other, len(other)).encode(TURNS[:1]).ids
    assert text(other, ids).startswith("### Human:")
    other.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-sequence token"):
        ConversationFormat(other, len(other))


def test_unknown_task_type_names_the_known_ones(plain):
    with pytest.raises(ValueError, match=r"task_type must be one of classification, .*VQA.*, got 'vqa'"):
        plain.encode(TURNS, "vqa")


def test_gate_cannot_read_a_message_that_is_not_there(tokenizer):
    with pytest.raises(ValueError, match="needs system: true"):
        ConversationFormat(tokenizer, len(tokenizer), system=False, gate_system=True)


def test_box_answer_goes_from_left_to_right():
    objects = [{"label": "pear", "bbox": [0.5, 0, 1, 1]}, {"label": "Apple", "bbox": [0.123, 0.4, 0.5, 0.999]}]
    assert box_answer(objects) == "An Apple at [0.12, 0.40, 0.50, 1.00]. A pear at [0.50, 0.00, 1.00, 1.00]."
    assert box_answer([]) == "There is no object."
