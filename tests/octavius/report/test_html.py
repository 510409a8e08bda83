"""The report holds what it was given, escaped, in one file; the table and the plots show the same scores."""

import base64
import copy
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from octavius.report import html, plots, tables

VQA = {"title": "Visual QA", "n": 40, "main": "Acc@1", "Acc@1": 0.5, "intervals": {"Acc@1": [0.35, 0.65]}}
METRICS = {
    "run": {
        **{"model": "tiny-llm", "tower": "tiny-vit", "steps": 1200, "train_seconds": 3725.0, "threads": 2},
        **{"dtype": "bfloat16", "seed": 7, "commit": "abc1234", "command": "octavius train <cfg>", "processor": "CPU"},
        **{"trainable_parameters": 19_660_800, "train_tokens_per_second": 1873.2, "generate_tokens_per_second": 46.3},
    },
    "scores": {
        "blind": {"vqa": {**VQA, "Acc@1": 0.25, "intervals": {"Acc@1": [0.1, 0.4]}}},
        "moe": {
            "detection": {
                **{"title": "Detection", "n": 12, "main": "recall@0.5", "recall@0.5": 0.4, "precision@0.5": 0.3},
                **{"recall_any_class@0.5": 0.6, "intervals": {"recall@0.5": [0.2, 0.6]}},
            },
            "vqa": VQA,
            "caption": {
                **{"title": "Captioning", "n": 9, "main": "CIDEr", "CIDEr": 1.5, "BLEU-1": 0.4},
                "intervals": {"CIDEr": [1.2, 1.8]},
            },
        },
    },
}
LOSS = [{"step": step, "loss": 3.0 / step} for step in range(1, 200)]
ROUTING = {"benchmarks": ["vqa", "detection"], "weights": [[0.7, 0.3, 0.0], [0.1, 0.2, 0.7]]}
HOSTILE = '<script>alert("x")</script><img src="https://example.org/x.png" onerror=alert(1)> \ud800 {{ 7 * 7 }}'


class Tags(HTMLParser):
    """Collects tags and their attributes, and checks that they close in order."""

    VOID = ("meta", "img", "br", "line", "polyline", "link")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def samples(tmp_path):
    Image.new("RGBA", (1000, 500), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    shared = {"id": "s1", "image": tmp_path / "clear.png", "question": HOSTILE, "answer": HOSTILE, "reference": HOSTILE}
    box = {"label": HOSTILE, "bbox": [0.25, 0.5, 1.5, 1.0]}
    boxes = {"boxes": [box], "reference_boxes": [{"label": "cat", "bbox": [0, 0, 1, 1]}]}
    return [{**shared, "benchmark": "detection", **boxes, "experts": [[2, 0.63], [0, 0.37]]}]


def written(tmp_path, *inputs) -> str:
    html.write_report(tmp_path / "new" / "report.html", *inputs)
    return (tmp_path / "new" / "report.html").read_text(encoding="utf-8")


def test_report_is_self_contained(tmp_path, samples):
    text = written(tmp_path, METRICS, samples, LOSS, ROUTING)
    tags = Tags(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base"}
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes[name].startswith("data:image/") for name in ("src", "href") if name in attributes)
    assert not re.search(r"url\(|@import", text)


def test_report_escapes_what_the_model_said(tmp_path, samples):
    text = written(tmp_path, METRICS, samples, LOSS, ROUTING)
    assert "<script" not in text and "<img src=&#34;" not in text and "onerror=alert(1)>" not in text
    assert text.count("&lt;script&gt;alert(&#34;x&#34;)") == 4 and "{{ 7 * 7 }}" in text
    assert "octavius train &lt;cfg&gt;" in text


def test_report_shows_run_and_scores(tmp_path, samples):
    text = written(tmp_path, METRICS, samples, LOSS, ROUTING)
    for part in ("tiny-llm", "tiny-vit", "1,200", "1 h 02 min", "19.7 M", "1,873", "46.3", "abc1234", "bfloat16"):
        assert part in text
    for part in (
        "LoRA-MoE",
        "Blind",
        "35.0 \u2013 65.0",
        "+25.0",
        "150.0",
        "recall@0.5",
        "expert 2 · 63 %",
        "All 6 metrics",
    ):
        assert part in text
    assert text.index("Detection") < text.index("Visual QA") < text.index("Captioning")


def test_report_draws_boxes_inside_the_image(tmp_path, samples):
    text = written(tmp_path, METRICS, samples, LOSS, ROUTING)
    assert 'class="box predicted" style="left:25.00%;top:50.00%;width:75.00%;height:50.00%"' in text
    assert 'class="box reference" style="left:0.00%;top:0.00%;width:100.00%;height:100.00%"' in text
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", text)
    assert data is not None
    image = Image.open(io.BytesIO(base64.b64decode(data[1])))
    assert image.size == (480, 240) and image.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("metrics", [{}, {"run": {}, "scores": {}}, {"scores": {"moe": {"vqa": VQA}}}])
def test_report_with_minimal_inputs(tmp_path, metrics):
    text = written(tmp_path, metrics, [], [], {})
    Tags(text)
    assert "Training loss" not in text and "What it answered" not in text and "Which experts" not in text
    assert "Difference" not in text and ("50.0" in text) == bool(metrics.get("scores"))


def test_report_with_minimal_sample_and_broken_loss(tmp_path):
    sample = {"id": 3, "benchmark": "counting", "question": "what?", "answer": ""}
    text = written(tmp_path, {}, [sample], [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}], {})
    Tags(text)
    assert "counting" in text and "(no answer)" in text and "Training loss" not in text and "<img" not in text


def test_report_is_repeatable_and_leaves_its_inputs(tmp_path, samples):
    inputs = (METRICS, samples, LOSS, ROUTING)
    before = copy.deepcopy(inputs)
    assert written(tmp_path, *inputs) == written(tmp_path, *inputs)
    assert inputs == before


def test_report_shows_unseen_classes_apart(tmp_path):
    text = written(tmp_path, {**METRICS, "zeroshot": {"moe": {"vqa": {**VQA, "Acc@1": 0.123}}}}, [], [], {})
    Tags(text)
    assert text.index("<h2>Scores</h2>") < text.index("Scores on classes never trained on") < text.index("12.3")
    assert tables.score_table({"zeroshot": {"moe": {"vqa": VQA}}}, "zeroshot").row_count == 1


def test_score_rows_order_and_difference():
    columns, rows = tables.score_rows(METRICS)
    assert columns == ["moe", "blind"]
    assert [row.benchmark for row in rows if row.main] == ["detection", "vqa", "caption"]
    by_metric = {(row.benchmark, row.metric): row for row in rows}
    vqa = by_metric["vqa", "Acc@1"]
    assert vqa.values == [50.0, 25.0] and vqa.difference == 25.0 and vqa.clear and vqa.full == 100
    caption = by_metric["caption", "CIDEr"]
    assert caption.values == [150.0, None] and caption.difference is None and not caption.clear and caption.full == 200


def test_score_rows_other_columns_stand_before_blind():
    one = {"vqa": VQA}
    columns, rows = tables.score_rows({"scores": {"blind": one, "rank 8": one, "moe": one}})
    assert columns == ["moe", "rank 8", "blind"] and rows[0].values == [50.0] * 3 and not rows[0].clear


def test_score_table_prints_the_same_scores():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(tables.score_table(METRICS))
    text = console.export_text()
    for part in ("Detection", "recall@0.5", "35.0 \u2013 65.0", "50.0", "25.0", "+25.0", "difference to Blind"):
        assert part in text
    console.print(tables.score_table({}))


def test_plots_write_what_there_is(tmp_path):
    plots.plots(tmp_path / "plots", METRICS, {"moe": LOSS, "lora": LOSS[:1]}, ROUTING)
    for name in ("loss.png", "scores.png", "routing.png"):
        width, height = Image.open(tmp_path / "plots" / name).size
        assert width > 500 and height > 200
    plots.plots(tmp_path / "none", {}, {}, {})
    assert list((tmp_path / "none").iterdir()) == []
