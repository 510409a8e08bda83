"""The page of all answers: everything in it, nothing escapes it, paired differences are those of the samples."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from octavius.report.viewer import paired, write_viewer

HOSTILE = '</script><script>alert("x")</script> \ud800 {{ 7 * 7 }} <!--'


def rows(tmp_path, count, score=lambda index: float(index % 3 == 0)):
    Image.new("RGB", (500, 100), "red").save(tmp_path / "a.png")
    shared = {"image": str(tmp_path / "a.png"), "question": HOSTILE, "answer": HOSTILE, "reference": HOSTILE}
    tasks = ("Detection", "Captioning")
    return [
        shared
        | {"id": f"s{index}", "task": tasks[index % 2], "experts": [[1, 0.7], [0, 0.3]]}
        | {"score": None if index % 2 else score(index), "boxes": [[HOSTILE, [0, 0, 0.5, 0.5]]]}
        for index in range(count)
    ]


def data(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r"const \{ items, images, right \} = (.*);\n", text)
    assert found
    return text, json.loads(found[1])


def test_viewer_holds_every_answer_once_and_each_image_once(tmp_path):
    write_viewer(tmp_path / "new" / "answers.html", rows(tmp_path, 75))
    text, held = data(tmp_path / "new" / "answers.html")
    assert [item["id"] for item in held["items"]] == [f"s{index}" for index in range(75)] and len(held["images"]) == 1
    assert "75 test samples" in text and "Against the single LoRA" not in text
    assert not re.search(r"(src|href)=[\"']?http", text)


def test_what_a_model_said_cannot_leave_its_script(tmp_path):
    write_viewer(tmp_path / "answers.html", rows(tmp_path, 3))
    text, held = data(tmp_path / "answers.html")
    assert text.count("<script") == 1 and text.count("</script") == 1 and "<!--" not in text
    assert held["items"][0]["answer"] == HOSTILE


def test_paired_difference_is_that_of_the_samples(tmp_path):
    """The same samples right and wrong in both but for some: a clear lead, a clear loss, and nothing."""
    own = rows(tmp_path, 400, lambda index: float(index % 4 == 0))
    for shift, verdict in ((0.2, "behind"), (-0.2, "ahead"), (0.0, "open")):
        rng = np.random.default_rng(1)
        others = [row | {"score": None if row["score"] is None else row["score"] + shift * rng.random()} for row in own]
        (row,) = paired(own, others)
        expected = np.mean([100 * (a["score"] - b["score"]) for a, b in zip(own[::2], others[::2], strict=True)])
        assert row["mean"] == pytest.approx(expected) and row["low"] <= row["mean"] <= row["high"]
        assert (row["task"], row["n"], row["verdict"]) == ("Detection", 200, verdict)


def test_viewer_shows_the_single_lora(tmp_path):
    own = rows(tmp_path, 8)
    others = [row | {"answer": "other", "score": row["score"] and 0.0} for row in own]
    write_viewer(tmp_path / "answers.html", own, others)
    text, held = data(tmp_path / "answers.html")
    assert held["items"][0]["other"] == "other" and "Against the single LoRA" in text
    with pytest.raises(ValueError, match="the same samples in the same order"):
        write_viewer(tmp_path / "answers.html", own, others[::-1])
