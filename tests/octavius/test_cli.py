"""The command: train, chat, eval; a user's mistake is one line and exit code 1."""

import json
import subprocess
import sys

import moe_lora
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import octavius
from octavius import cli
from octavius.config import Config
from octavius.data.loading import load_data
from octavius.model.octavius import Octavius
from tests.support import clouds, tiny


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """(YAML file, output folder) of a run that `octavius train` has done."""
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "run.yaml"
    lora = {"num_experts": 4, "top_k": 2, "rank": 3, "alpha": 6, "dropout": 0.0}
    model = {"llm": str(parts.llm), "tower": str(parts.tower), "dtype": "float32", "lora": lora}
    data = {"root": str(parts.data.parent), "cache_features": False}
    train = {"output": str(folder / "out"), "steps": 9, "batch_size": 3, "learning_rate": 0.01}
    file.write_text(yaml.safe_dump({"model": model, "data": data, "train": train}))
    done = CliRunner().invoke(cli.app, ["train", "--config", str(file), "--set", "train.steps=2"])
    assert done.exit_code == 0, done.output
    assert "2 steps, " in done.output and "tokens/s; model in" in done.output
    return file, folder / "out"


def test_train_writes_a_model(run):
    assert {"octavius.json", "adapter_model.safetensors", "train.json"} <= {path.name for path in run[1].iterdir()}
    assert json.loads((run[1] / "train.json").read_text())["steps"] == 2


def test_chat_prints_answer_and_experts(run, parts):
    arguments = ["chat", "--model", str(run[1]), "--image", str(parts.data.parent / "1.png"), "What colour is it?"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "experts: " in done.output and done.output.rstrip().count("(0.") == 2


def test_points_train_and_answer(run, parts, tmp_path):
    """Both kinds in one run from the command line, then a question about a cloud with boxes and one without."""
    root = clouds.save_clouds(tmp_path / "clouds")
    branch = f"model.clouds={{encoder: {root / 'encoder'}, queries: 3, heads: 2}}"
    settings = [branch, f"data.root_3d={root}", "train.steps=2", f"train.output={tmp_path / 'out'}"]
    train = ["train", "--config", str(run[0]), *(word for item in settings for word in ("--set", item))]
    done = CliRunner().invoke(cli.app, train)
    assert done.exit_code == 0, done.output
    np.save(tmp_path / "boxes.npy", np.load(root / "clouds/2.npz")["boxes"])
    ask = ["chat", "--model", str(tmp_path / "out"), "--points", str(root / "clouds/2.npz"), "What is left?"]
    for more in ([], ["--boxes", str(tmp_path / "boxes.npy"), "--draw", str(tmp_path / "seen.png")]):
        done = CliRunner().invoke(cli.app, [*ask, *more])
        assert done.exit_code == 0 and "experts: " in done.output, done.output
    assert (tmp_path / "seen.png").exists()


def test_chat_question_needs_something_to_look_at():
    done = CliRunner().invoke(cli.app, ["chat", "What?"])
    assert done.exit_code == 1 and "give --image or --points" in str(done.exception)


def test_chat_is_a_conversation_and_loads_once(run, parts, monkeypatch):
    """Three questions from a pipe, an image shown in between, as JSON; a mistake does not end it."""
    loads, load = [], Octavius.from_folder
    monkeypatch.setattr(Octavius, "from_folder", lambda folder: loads.append(folder) or load(folder))
    image = parts.data.parent / "1.png"
    script = [f"/image {image}", "What colour is it?", "/image none.png", "/experts 2", "Where?", "/compare Who?"]
    script = "\n".join([*script, "/new", "Who?", "/quit", "No."])
    done = CliRunner().invoke(cli.app, ["chat", "--json", "--max-tokens", "9", "--model", str(run[1])], input=script)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(loads) == 1 and done.exit_code == 1, done.output
    assert [next(iter(row)) for row in rows] == [
        *("shown", "question", "error", "experts", "question", "question", "new", "question")
    ]
    assert "got none.png" in rows[2]["error"]
    assert sum(weight for _, weight in rows[1]["experts"]) == pytest.approx(1, abs=1e-3)
    assert rows[4]["experts"] == [[2, 1.0]] and set(rows[5]["compared"]) == {"experts", "blind"}
    assert all(row["tokens"] <= 9 and isinstance(row["answer"], str) for row in rows if "answer" in row)


def test_unknown_encoder_preset_is_named():
    done = CliRunner().invoke(cli.app, ["pretrain-points", "--preset", "huge"])
    assert done.exit_code == 1 and "preset must be one of small, ulip" in str(done.exception)


def test_eval_prints_scores_and_writes_answers(run, parts):
    file, folder = run
    done = CliRunner().invoke(cli.app, ["eval", "--config", str(file), "--model", str(folder), "--file", "train.json"])
    assert done.exit_code == 0, done.output
    for benchmark in ("detection", "caption", "classif", "visual"):  # the table breaks long words
        assert benchmark in done.output.lower()
    lines = (folder / "answers-train.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [item["id"] for item in tiny.lamm()]


@pytest.mark.parametrize(
    "command", [[], ["train"], ["chat"], ["eval"], ["assets"], ["demo"], ["pretrain-points"]], ids=str
)
def test_help_exists(command):
    done = CliRunner().invoke(cli.app, [*command, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output


def test_train_needs_a_config():
    assert CliRunner().invoke(cli.app, ["train"]).exit_code == 2


MISTAKES = {
    "key": (["train", "--config", "{file}", "--set", "train.step=3"], "did you mean 'steps'"),
    "preset": (["train", "--config", "dmo"], "presets demo, mini"),
    "markup": (["train", "--config", "[/red]"], "got '[/red]'"),
    "list": (["train", "--config", "{file}", "--set", "train.steps=[a, b]"], "steps: must be int, got ['a', 'b']"),
    "yaml": (["train", "--config", "{file}", "--set", "train.steps=[a"], "cannot set 'train.steps=[a'"),
    "data": (["train", "--config", "{file}", "--set", "data.train=none.json"], "none.json: cannot be read as JSON"),
    "llm": (["train", "--config", "{file}", "--set", "model.llm=/no/such/llm"], "/no/such/llm"),
    "tower": (["train", "--config", "{file}", "--set", "model.tower={llm}"], "tower must be EfficientNet-Lite0 or a"),
    "output": (["train", "--config", "{file}", "--set", "train.output={file}/x"], "run.yaml"),
    "question": (["chat", "--model", "{out}", "--image", "{image}", " "], "question must be a text"),
    "image": (["chat", "--model", "none", "--image", "none.png", "Who?"], "readable image, got none.png"),
    "points": (
        ["chat", "--model", "none", "--points", "none.ply", "Who?"],
        "points must be a readable file, got none.ply",
    ),
    "boxes": (
        ["chat", "--model", "none", "--points", "{image}", "--boxes", "no.npy", "Who?"],
        "boxes must be a readable",
    ),
    "no-image": (["chat", "--model", "{out}", "--image", "{file}", "Who?"], "readable image, got"),
    "model": (["chat", "--model", "{llm}", "--image", "{image}", "Who?"], "must be a folder that training wrote"),
    "asset": (["assets", "nosuch"], "asset must be one of"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_ends_in_one_line(run, parts, monkeypatch, capsys, name):
    arguments, message = MISTAKES[name]
    places = {"file": run[0], "out": run[1], "llm": parts.llm, "image": parts.data.parent / "0.png"}
    monkeypatch.setattr(sys, "argv", ["octavius", *(text.format(**places) for text in arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and message in lines[0]


LIGHT = """
import sys
from octavius import cli
try:
    cli.app({arguments})
except SystemExit as end:
    print("loaded:", sorted({{"torch", "transformers", "moe_lora", "octavius.config"}} & set(sys.modules)), end.code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]], ids=str)
def test_help_and_version_load_no_torch(arguments):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(arguments=arguments)], capture_output=True, text=True)
    assert "loaded: [] 0" in done.stdout, done.stdout + done.stderr


def test_version_is_the_packages():
    done = CliRunner().invoke(cli.app, ["--version"])
    assert done.exit_code == 0 and done.output.strip() == octavius.__version__ == moe_lora.__version__


def test_a_missing_file_is_reported_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("octavius.model.octavius.Octavius.from_folder", lambda folder: pytest.fail("it was loaded"))
    for given in (["--image", "no.png"], ["--points", "no.ply"], ["--points", __file__, "--boxes", "no.npy"]):
        done = CliRunner().invoke(cli.app, ["chat", "What?", *given])
        assert done.exit_code == 1 and "there is no such file" in str(done.exception)


def test_top_of_the_package_offers_its_parts_lazily():
    code = "import sys, octavius; assert 'torch' not in sys.modules and 'train' in dir(octavius); octavius.load_config"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(octavius.__all__) >= {"Octavius", "load_config", "train", "evaluate", "chat"}
    for name in octavius.__all__:
        assert callable(getattr(octavius, name))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        octavius.trian  # noqa: B018


@pytest.mark.parametrize("package", ["typer", "transformers", "yaml"])
def test_without_its_extra_the_script_names_it_in_one_line(package):
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = {['octavius', 'train', '--config', 'demo']}; "
    code += "from octavius.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: {package} is not installed; run: ")
    assert "[octavius]" in line


def test_process_ends_with_exit_code_1_and_no_traceback(run):
    command = [sys.executable, "-m", "octavius", "train", "--config", str(run[0]), "--set", "model.llmm=x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "did you mean 'llm'" in done.stderr


def test_settings_of_the_file_reach_the_data(run, parts):
    model = tiny.make(parts)
    config = Config(data=tiny.data_config(parts))
    records, store = load_data(config.data, "train.json", **model.readers())
    assert len(records) == 7 and store.images.folder is None
