"""Rephrased questions: what is kept, what is dropped, and a real server and a real local model behind `ask`."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from octavius.data.scan2inst.questions import QUESTIONS as QUESTIONS_OF
from octavius.data.scan2inst.questions import SUPPORT, Builder
from octavius.data.scan2inst.rephrase import clean, enrich, keeps, local, server
from tests.octavius.data.scan2inst.test_questions import NAMES, SCENE

SOURCE = "What is to the left of the table?"
QUESTIONS = {
    "rephrased": ("Which object can be seen on the left side of the table?", True),
    "plural": ("What stands left of the tables?", True),
    "lost its object": ("What is to the left of it?", False),
    "other object": ("What is to the left of the chair?", False),
    "one object more": ("Is the chair to the left of the table?", False),
    "other side": ("What is to the right of the table?", False),
    "both sides": ("What is left of the table, and what right?", False),
    "no question": ("The table is left.", False),
    "two questions": ("What is left of the table? And what is it?", False),
    "unchanged": (SOURCE, False),
    "too long": ("What is to the left of the table " + "very " * 40 + "?", False),
}


@pytest.mark.parametrize(("question", "kept"), QUESTIONS.values(), ids=QUESTIONS)
def test_check(question, kept):
    assert keeps(SOURCE, question, NAMES) is kept


@pytest.mark.parametrize(
    ("source", "question", "kept"),
    [
        ("What is over the table?", "What is on top of the table?", True),
        ("What is over the table?", "What is beneath the table?", False),
        ("What is the color of the lamp?", "Which colour does the lamp have?", True),
        ("What is the color of the lamp?", "What is the shape of the lamp?", False),
        ("How many chairs are in the room?", "What is the number of chairs?", True),
        ("How many chairs are in the room?", "Are there chairs in the room?", False),
        ("What is on top of the table?", "What can be seen above the table?", True),
        ("What is beneath the table?", "What is on the table?", False),
        ("What is beneath the table?", "What lies under the table?", True),
        ("What does the lamp stand on?", "What is on the lamp?", False),
        ("What does the lamp stand on?", "Which thing does the lamp rest on?", True),
        ("Which is larger, the bed or the chair?", "Which takes less space, the bed or the chair?", False),
        ("Which is larger, the bed or the chair?", "Which has the smaller size, the bed or the chair?", False),
        ("Which is larger, the bed or the chair?", "Is the bed or the chair bigger?", True),
        ("Where is the chair, seen from the bed?", "Where is the bed, seen from the chair?", False),
        ("Where is the chair, seen from the bed?", "In which direction is the chair from the bed?", True),
        ("What is to the left of the bed?", "What is the bed to the left of?", False),
        ("What can be found on the left side of the bed?", "What is left of the bed?", True),
        ("What is next to the sofa?", "What is next to the sofa in the corner on the left?", False),
        ("What is next to the sofa?", "What stands close to the sofa?", True),
        ("On top of what is the lamp?", "What is on top of the lamp?", False),
        ("On top of what is the lamp?", "What is over the lamp?", False),
        ("On top of what is the lamp?", "On top of which thing is the lamp standing?", True),
        ("What does the lamp stand on?", "On what does the lamp stand?", True),
        ("What is to the left of the bed?", "To the left of what is the bed?", False),
        ("What is to the left of the bed?", "Left of the bed, what is there?", True),
        ("Where is the chair, seen from the bed?", "In which direction from the chair is the bed?", False),
        ("Which side of the bed is the chair positioned on?", "Where is the bed, seen from the chair?", False),
        ("Which side of the bed is the chair positioned on?", "On which side of the bed is the chair?", True),
        ("What is the position of the chair relative to the bed?", "Where is the chair relative to the bed?", True),
    ],
)
def test_what_is_asked_for_stays(source, question, kept):
    assert keeps(source, question, NAMES) is kept


def test_phrasings_of_the_builder_are_kept_for_their_own_kind_alone():
    kept, phrasings = 0, {kind: (*texts, *SUPPORT.get(kind, ())) for kind, texts in QUESTIONS_OF.items()}
    for kind, source in ((kind, text) for kind, texts in phrasings.items() for text in texts):
        for other, question in ((other, text) for other, texts in phrasings.items() for text in texts):
            same = keeps(source.format("bed", "chair"), question.format("bed", "chair"), NAMES)
            assert kind == other or not same, (source, question)
            assert kind != "side" or not keeps(source.format("bed", "chair"), question.format("chair", "bed"), NAMES)
            kept += same
    assert kept > 100


def test_clean_takes_the_question_out_of_the_talk():
    assert clean('Sure! Here it is:\n\n1. Question: "Where is the lamp?"\nHope it helps.') == "Where is the lamp?"
    assert clean("no question here") == ""


def records():
    return [r for r in Builder(NAMES, per_scene=(0, 0, 6)).write(SCENE) if "kind" in r]


def test_answers_and_sources_stay():
    made, dropped = enrich(records(), lambda prompt: "Please tell me: " + prompt.partition("Question: ")[2], NAMES)
    assert len(made) + dropped == len(records()) and made
    old = {record["id"]: record for record in records()}
    for record in made:
        source = old[record["id"].removesuffix("_enriched")]
        assert record["source_question"] == source["conversations"][0]["value"] != record["conversations"][0]["value"]
        assert record["conversations"][1] == source["conversations"][1] and record["label"] == source["label"]


class Server(BaseHTTPRequestHandler):
    seen: list[dict] = []  # noqa: RUF012
    reply: bytes = b""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    made = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1/"
    made.shutdown()
    made.server_close()


def test_server_is_asked_as_openai_is(address):
    Server.reply = json.dumps({"choices": [{"message": {"content": "What stands left of the table?"}}]}).encode()
    assert server(address, "some-model", "secret")("Hello") == "What stands left of the table?"
    asked = Server.seen[-1]
    assert asked["path"] == "/v1/chat/completions" and asked["key"] == "Bearer secret"
    assert asked["model"] == "some-model" and asked["messages"] == [{"role": "user", "content": "Hello"}]


def test_other_answers_are_named(address):
    Server.reply = b"{}"
    with pytest.raises(ValueError, match="no chat completion"):
        server(address, "m")("Hello")
    with pytest.raises(ValueError, match="no chat completion"):
        server("http://127.0.0.1:9", "m", timeout=2)("Hello")


def test_local_model_answers(parts, tmp_path):
    import shutil

    folder = tmp_path / "llm"
    shutil.copytree(parts.llm, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    said = local(str(folder), max_new_tokens=5)("What colour is the square?")
    assert isinstance(said, str) and said == local(str(folder), max_new_tokens=5)("What colour is the square?")
