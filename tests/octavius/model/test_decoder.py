"""Many conversations in one batch: every row's tokens are those that it gets alone."""

import random

import pytest
import torch
from PIL import Image

from octavius.language.dialogue import Turn, encode_dialogue
from octavius.model.decoder import Decoder, Options
from octavius.model.prompt import Exchange, make_prompt, see_cloud, see_image
from octavius.points.cloud import read_cloud
from tests.support import clouds, tiny

QUESTIONS = ("What colour is the square?", "Describe it, please.", "Which of these is it? (A) one (B) two", "Where?")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return clouds.save_clouds(tmp_path_factory.mktemp("clouds"))


@pytest.fixture(scope="module")
def model(parts, root):
    return clouds.make(parts, root)


def exchanges(model, parts, root, number):
    """Conversations of unequal lengths: an image, a cloud, both, nothing, one or two turns."""
    image = see_image(model, Image.open(parts.data.parent / f"{number % 5}.png"))
    cloud = see_cloud(model, read_cloud(root / f"clouds/{number % 3}.npz"))
    seen = ((image,), (cloud,), (image, cloud), (), (cloud, image, cloud))[number % 5]
    before = [Exchange("Who?", (image,), "A circle.")] * (number % 3)
    return [*before, Exchange(QUESTIONS[number % 4], seen)]


def options(number):
    experts = (None, {0: 1.0}, {}, {1: 0.3, 3: 0.7}, {0: 0.2, 1: 0.2, 2: 0.6}, None)[number % 6]
    drawn = {"temperature": 0.9, "top_p": 0.8, "seed": number} if number % 4 == 3 else {}
    return Options(max_tokens=3 + number % 9, experts=experts, **drawn)


def run(decoder, answers):
    """Alone, to the end."""
    decoder.admit(answers)
    while decoder.active:
        decoder.step()
    return [answer.stream.ids for answer in answers]


def test_answer_is_that_of_generate(model, parts, root):
    """The first turn about one image, greedy, gives what `Octavius.generate` gives."""
    records = tiny.records(parts)[:3]
    for record in records:
        record = record.__class__(record.id, record.image, record.turns[:1], record.task_type, {})
        expected, weights = model.generate(**tiny.batch(model, [record], answer=False), max_new_tokens=12)
        image = see_image(model, Image.open(record.image))
        prompt = make_prompt(model, [Exchange(record.turns[0][0], (image,))], record.task_type)
        answer = (decoder := Decoder(model)).open(prompt, Options(max_tokens=12))
        run(decoder, [answer])
        assert answer.text == expected[0]
        assert torch.allclose(answer.weights, weights[0])


@pytest.mark.parametrize("mode", ["instance", "dense", "token"])
def test_rows_that_come_and_go_get_what_they_get_alone(parts, root, mode):
    model = clouds.make(parts, root, gate=tiny.gate(mode=mode))
    prompts = [make_prompt(model, exchanges(model, parts, root, number)) for number in range(24)]
    alone = []
    for number, prompt in enumerate(prompts):
        decoder = Decoder(model)
        alone += run(decoder, [decoder.open(prompt, options(number))])
    decoder, rng = Decoder(model, rows=7), random.Random(0)
    answers = [decoder.open(prompt, options(number)) for number, prompt in enumerate(prompts)]
    waiting, most = list(answers), 0
    while waiting or decoder.active:
        some = min(decoder.free, rng.choice((0, 1, 3)), len(waiting))
        if some:
            decoder.admit([waiting.pop(0) for _ in range(some)])
        most = max(most, len(decoder.active))
        decoder.step()
    assert most >= 5
    assert [answer.stream.ids for answer in answers] == alone
    assert len({tuple(ids) for ids in alone}) > 12  # they differ, so that a mixed-up row would be seen


def test_given_experts_change_the_answer(model, parts, root):
    turns = exchanges(model, parts, root, 0)
    texts = {}
    for name, experts in {"gate": None, "none": {}, "first": {0: 1.0}, "two": {2: 0.5, 3: 0.5}}.items():
        decoder = Decoder(model)
        answer = decoder.open(make_prompt(model, turns), Options(max_tokens=16, experts=experts))
        run(decoder, [answer])
        texts[name] = answer.text
        if experts is not None:
            assert {e: w for e, w in enumerate(answer.weights.tolist()) if w} == pytest.approx(experts)
    assert len(set(texts.values())) == 4


def test_text_comes_in_pieces_that_make_the_whole(model, parts, root):
    decoder = Decoder(model)
    answer = decoder.open(make_prompt(model, exchanges(model, parts, root, 1)), Options(max_tokens=40))
    pieces = [text for _, text in decoder.admit([answer])]
    while decoder.active:
        pieces += [text for _, text in decoder.step()]
    assert "".join(pieces) == answer.text and sum(map(bool, pieces)) > 3
    assert answer.text == model.conversation.decode(answer.stream.ids)


def test_stop_ends_the_answer_before_the_text(model, parts, root):
    turns, decoder = exchanges(model, parts, root, 1), Decoder(model)
    whole = decoder.open(make_prompt(model, turns), Options(max_tokens=40))
    run(decoder, [whole])
    stop = whole.text[10:13]
    answer = decoder.open(make_prompt(model, turns), Options(max_tokens=40, stop=(stop,)))
    run(decoder, [answer])
    assert answer.finish == "stop" and answer.text == whole.text[: whole.text.index(stop)].rstrip()


def test_cancelled_row_leaves_and_the_others_stay_right(model, parts, root):
    prompts = [make_prompt(model, exchanges(model, parts, root, number)) for number in range(3)]
    decoder = Decoder(model)
    alone = [run(decoder, [decoder.open(prompt, Options(max_tokens=12))])[0] for prompt in prompts]
    answers = [decoder.open(prompt, Options(max_tokens=12)) for prompt in prompts]
    decoder.admit(answers)
    decoder.step()
    answers[0].cancelled = True
    while decoder.active:
        decoder.step()
    assert answers[0].finish == "cancelled" and len(answers[0].stream.ids) == 2
    assert [answer.stream.ids for answer in answers[1:]] == alone[1:]


def test_nan_of_one_row_stays_its_own(model, parts, root):
    """A row whose image is NaN fails alone; a later one in its slot reads nothing of it."""
    good = exchanges(model, parts, root, 0)
    bad = make_prompt(model, good)
    bad.seen["features"] = torch.full_like(bad.seen["features"], float("nan"))
    decoder = Decoder(model)
    alone = run(decoder, [decoder.open(make_prompt(model, good), Options(max_tokens=8))])
    answers = [decoder.open(prompt, Options(max_tokens=8)) for prompt in (bad, make_prompt(model, good))]
    run(decoder, answers)
    assert answers[0].finish == "error" and "NaN" in answers[0].error
    assert answers[1].stream.ids == alone[0]


def test_room_is_given_back(model, parts, root):
    decoder = Decoder(model)
    prompts = [make_prompt(model, exchanges(model, parts, root, number)) for number in range(16)]
    run(decoder, [decoder.open(prompt, Options(max_tokens=400)) for prompt in prompts])
    large = decoder.cache.slots, decoder.cache.capacity
    run(decoder, [decoder.open(prompts[3], Options(max_tokens=4))])
    assert large[0] == 16 and large[1] > 256 and decoder.cache.slots == 1 and decoder.cache.capacity == 128


WRONG = {
    "expert": ({"experts": {4: 1.0}}, "experts must be in 0..3, got 4"),
    "weight": ({"experts": {0: float("nan")}}, "weight of expert 0 must be in 0..4"),
    "length": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    "heat": ({"temperature": 3.0}, "temperature must be in 0..2"),
    "share": ({"top_p": 0.0}, "top_p must be above 0"),
    "stop": ({"stop": ("",)}, "stop must be at most 4 texts"),
    "seed": ({"seed": -1}, "seed must be in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_option_is_named(model, parts, root, name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Decoder(model).open(make_prompt(model, exchanges(model, parts, root, 3)), Options(**given))


def test_long_conversation_and_empty_question_are_refused(model):
    with pytest.raises(ValueError, match="shorter than 512 tokens"):
        Decoder(model).open(make_prompt(model, [Exchange("word " * 600)]), Options())
    with pytest.raises(ValueError, match="question must be a text"):
        make_prompt(model, [Exchange(" ")])


def test_dialogue_of_one_turn_is_the_format_of_training(model):
    sample = model.conversation.encode([("Who?", None)], "normal", 4, 0, 3)
    ids, gate = encode_dialogue(model.conversation, [Turn("Who?", None, 1, 1)], "normal", 4, 3)
    assert ids == sample.ids and gate == sample.gate
    _, later = encode_dialogue(model.conversation, [Turn("Who?", "I."), Turn("Where?")], "normal", 4, 3)
    assert sum(later) == len(model.conversation.tokens(" Where?")) and later[-1] == 0
