"""A conversation: history, images and clouds that are added, overridden experts, comparisons."""

import io

import pytest
from rich.console import Console

from octavius.model.decoder import Options
from octavius.session import Scan, Session
from octavius.session.terminal import Terminal, parse_experts
from tests.support import clouds, tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return clouds.save_clouds(tmp_path_factory.mktemp("clouds"))


@pytest.fixture(scope="module")
def model(parts, root):
    return clouds.make(parts, root)


def session(model, **more):
    return Session(model, Options(max_tokens=8), **more)


def test_history_goes_on_and_is_read(model, parts, root):
    talk = session(model)
    talk.show(parts.data.parent / "1.png")
    first = talk.say("What colour is it?")
    talk.show(Scan(root / "clouds/2.npz"))
    second = talk.say("Where?")
    assert [len(turn.seen) for turn in talk.history] == [1, 1]
    assert [turn.answer for turn in talk.history] == [first.text, second.text]
    fresh = session(model)
    fresh.show(Scan(root / "clouds/2.npz"))
    assert fresh.say("Where?").text != second.text  # without the first turn the answer is another
    talk.forget()
    talk.show(parts.data.parent / "1.png")
    assert talk.say("What colour is it?") == first


def test_answer_streams_and_can_be_broken_off(model, parts):
    talk = session(model)
    talk.show(parts.data.parent / "1.png")
    whole = talk.say("What colour is it?").text
    talk.forget()
    talk.show(parts.data.parent / "1.png")
    pieces = talk.ask("What colour is it?")
    assert whole.startswith(next(pieces))
    pieces.close()
    assert talk.history == []
    assert talk.say("What colour is it?").text == whole  # the image is still to be shown


def test_experts_blind_and_the_single_lora(model, parts, root):
    single = clouds.make(parts, root, seed=5)
    talk = session(model, single=single)
    talk.show(parts.data.parent / "2.png")
    replies = talk.compare("What colour is it?")
    assert set(replies) == {"experts", "single LoRA", "blind"} and len({r.text for r in replies.values()}) == 3
    assert talk.history == []
    talk.use_experts({3: 1.0})
    assert talk.say("What colour is it?").experts == [(3, 1.0)]
    with pytest.raises(ValueError, match="experts must be in"):
        talk.use_experts({9: 1.0})


def test_models_that_see_otherwise_are_not_compared(model, parts):
    with pytest.raises(ValueError, match=r"model\.clouds must be"):
        session(model, single=tiny.make(parts))


@pytest.mark.parametrize(
    ("text", "experts"),
    [("gate", None), ("none", {}), ("2", {2: 1.0}), ("0=0.3,2=0.7", {0: 0.3, 2: 0.7})],
)
def test_experts_are_written(text, experts):
    assert parse_experts(text) == experts


@pytest.mark.parametrize("text", ["", "two", "1=", "0:1"])
def test_experts_that_are_no_numbers_are_named(text):
    if text == "1=":
        assert parse_experts(text) == {1: 1.0}
        return
    with pytest.raises(ValueError, match="experts must be gate, none"):
        parse_experts(text)


def test_terminal_writes_the_answer_as_it_comes(model, parts):
    console = Console(file=io.StringIO(), width=80)
    assert Terminal(session(model), console).run([f"/image {parts.data.parent / '0.png'}", "What?", "/help", "/quit"])
    text = console.file.getvalue()
    assert "experts: " in text and "/compare QUESTION" in text and "the next question shows" in text


@pytest.mark.parametrize(
    "line", ["/nosuch", "/image", "/image none.png", "/points none.ply mm", "/experts 7", "/blind"]
)
def test_mistake_is_told_and_the_conversation_goes_on(model, line):
    console = Console(file=io.StringIO(), width=200)
    assert not Terminal(session(model), console).run([line, "/new"])
    text = console.file.getvalue()
    assert text.startswith("error: ") and "a new conversation" in text
