"""Benchmarks by name: this package's, those of a program, and those of an installed package."""

import json
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from octavius import cli
from octavius.data.records import read_records
from octavius.evaluation import benchmarks
from octavius.evaluation.benchmarks import BENCHMARKS, Benchmark, benchmark_records, register_benchmark
from octavius.evaluation.evaluate import load_benchmarks
from octavius.evaluation.metrics import METRICS
from octavius.evaluation.scoring import check, score
from tests.support import clouds, tiny

PACKAGE = """
from octavius.data.records import read_records
from octavius.evaluation.benchmarks import Benchmark
from octavius.evaluation.metrics import METRICS

def read(folder):
    return read_records(folder / "asked.json"), {}

COLOURS = Benchmark("Colours of squares", METRICS["classification"], read, prompt="{question} Answer in one word.")
BROKEN = Benchmark
"""


@pytest.fixture(autouse=True)
def _own_names(monkeypatch, tmp_path):
    """What a test registers is gone after it, and what it caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(BENCHMARKS, "parts", dict(BENCHMARKS.parts))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with one benchmark that works and one that does not, as pip would lay it out."""
    (tmp_path / "colours_of_squares.py").write_text(PACKAGE)
    facts = tmp_path / "colours_of_squares-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: colours-of-squares\nVersion: 1.0\n")
    lines = [
        "[octavius.benchmarks]",
        "square-colours = colours_of_squares:COLOURS",
        "broken = colours_of_squares:BROKEN",
    ]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("colours_of_squares", None)


def squares(folder):
    """A folder of three questions about one image each."""
    items = [item for item in tiny.lamm() if item["benchmark"] == "mini-classification"]
    for index in range(len(tiny.COLOURS)):
        tiny.draw(folder / f"{index}.png", index)
    (folder / "asked.json").write_text(json.dumps(items))
    return folder


def read(folder):
    return read_records(folder / "asked.json"), {}


def test_every_mini_set_is_registered():
    names = ("detection", "vqa", "caption", "classification", "hair", "smile")
    names += ("classification3d", "caption3d", "vqa3d")
    assert {f"mini-{name}" for name in names} <= set(BENCHMARKS)


def test_registered_benchmark_gives_its_records_with_its_prompt(tmp_path):
    squares(tmp_path)
    register_benchmark("squares", Benchmark("Squares", METRICS["classification"], read, prompt="Say: {question} {x}"))
    records, scenes = benchmark_records("squares", tmp_path)
    assert [record.turns[-1][0] for record in records][1] == "Say: Which colour has the square here? {x}"
    assert {record.truth["benchmark"] for record in records} == {"squares"} and scenes == {}
    assert {"green", "purple", "blue"} == {record.truth["label"] for record in records}


def test_name_is_taken_once(tmp_path):
    one = Benchmark("One", METRICS["caption"], read)
    register_benchmark("taken", one)
    register_benchmark("taken", one)
    with pytest.raises(ValueError, match="'taken' is registered already"):
        register_benchmark("taken", replace(one, title="Two"))
    with pytest.raises(TypeError, match=r"must be an octavius\.Benchmark, got str"):
        register_benchmark("text", "caption")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a text"):
        register_benchmark(" ", one)


def test_unknown_name_is_met_with_the_nearest():
    with pytest.raises(ValueError, match=r"mini-detection, .*got 'mini-detecton'; did you mean 'mini-detection'"):
        benchmark_records("mini-detecton")


def test_data_must_be_given_and_be_a_folder(tmp_path):
    register_benchmark("bare", Benchmark("Bare", METRICS["caption"], read))
    with pytest.raises(ValueError, match="must be given: --data FOLDER"):
        benchmark_records("bare")
    with pytest.raises(ValueError, match=r"must be a folder, got .*/none"):
        benchmark_records("bare", tmp_path / "none")
    (tmp_path / "asked.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold records of benchmark bare, got none"):
        benchmark_records("bare", tmp_path)


def test_two_benchmarks_of_one_metric_have_a_row_each():
    truth = {"prediction": "A cat at [0, 0, 1, 1].", "labels": ["cat"]}
    truth |= {"object": [{"label": "cat", "bbox": [0, 0, 1, 1]}], "metric": "detection"}
    scores = score([{"benchmark": name, **truth} for name in ("voc", "coco", "voc")])
    assert {name: entry["n"] for name, entry in scores.items()} == {"voc": 2, "coco": 1}
    assert scores["voc"]["title"] == "voc" and scores["coco"]["recall@0.5"] == 1
    with pytest.raises(ValueError, match=r"record 0: metric must be one of detection, .*got 'mAP'"):
        check([{"benchmark": "voc", **truth, "metric": "mAP"}])
    with pytest.raises(ValueError, match="record 1: all records of benchmark voc must have the same metric"):
        check([{"benchmark": "voc", **truth}, {"benchmark": "voc", "metric": "caption", "sentences": ["a cat"]}])


def test_benchmark_of_an_installed_package_is_listed_and_scored(installed, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=200))  # CI has no terminal whose width counts
    squares(tmp_path)
    model = tiny.make(parts)
    model.save(tmp_path / "model")
    listed = CliRunner().invoke(cli.app, ["eval", "--list"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and "Colours of squares" in listed.output and "mini-detection" in listed.output
    assert "'broken' (colours_of_squares:BROKEN) cannot be loaded: TypeError" in " ".join(listed.output.split())
    arguments = ["eval", "--benchmark", "square-colours", "--data", str(tmp_path), "--model", str(tmp_path / "model")]
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "Colours of squares" in done.output and "Acc@1" in done.output
    lines = (tmp_path / "model/answers-square-colours.jsonl").read_text().splitlines()
    assert len(lines) == 3 and "Answer in one word." in json.loads(lines[0])["question"]
    again = CliRunner().invoke(cli.app, ["score", str(tmp_path / "model/answers-square-colours.jsonl")])
    assert again.exit_code == 0 and "Acc@1" in again.output


def test_eval_needs_one_source_of_questions():
    for given in ([], ["--config", "demo", "--benchmark", "mini-vqa"]):
        done = CliRunner().invoke(cli.app, ["eval", *given])
        assert done.exit_code == 1 and "one of --benchmark NAME, --config and --recipe" in str(done.exception)


def test_recipe_of_chef_is_followed(parts, tmp_path):
    (tmp_path / "meta_file").mkdir()
    tiny.draw(tmp_path / "0.png", 0)
    entry = {"query": "What?", "image": "0.png", "gt_choice": 0, "gt_choices": ["one", "two"]}
    (tmp_path / "meta_file/VQA_ScienceQA.json").write_text(json.dumps([entry]))
    tiny.make(parts).save(tmp_path / "model")
    inference = "{inferencer_type: PPL, batch_size: 1, max_new_tokens: 4}"
    scenario = f"{{dataset_name: ScienceQA, base_data_path: {tmp_path}}}"
    (tmp_path / "recipe.yaml").write_text(f"scenario_cfg: {scenario}\neval_cfg: {{inferencer_cfg: {inference}}}\n")
    arguments = [
        "eval",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--model",
        str(tmp_path / "model"),
        "--shard",
        "1/1",
    ]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    (line,) = (tmp_path / "model/answers-scienceqa-1-of-1.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] in ("(A) one", "(B) two")


def test_model_must_read_what_the_benchmark_shows(parts, tmp_path):
    squares(tmp_path)
    register_benchmark("squares", Benchmark("Squares", METRICS["classification"], read))
    with pytest.raises(ValueError, match="benchmark squares asks about images, which this model does not read"):
        load_benchmarks(["squares"], tmp_path, tower=None, encoder=None, clouds=True)
    root = clouds.save_clouds(tmp_path / "clouds")
    (root / "train.json").rename(root / "test.json")
    with pytest.raises(ValueError, match="benchmark mini-vqa3d asks about clouds, which"):
        load_benchmarks(["mini-vqa3d"], root, **tiny.make(parts).readers())


def test_mini_reader_takes_its_own_records(tmp_path):
    root = clouds.save_clouds(tmp_path / "clouds")
    (root / "train.json").rename(root / "test.json")
    for name in ("mini-classification3d", "mini-caption3d", "mini-vqa3d"):
        records, _ = benchmark_records(name, root)
        assert len(records) == 3 and {record.truth["benchmark"] for record in records} == {name}
    assert benchmarks.BENCHMARKS["mini-vqa3d"].data == "mini-scan2inst:demo"
