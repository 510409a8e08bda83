"""The command `octavius`.

Commands import what they need when they run: torch and transformers take seconds, `octavius --help` none of them.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octavius.assets import registry
from octavius.training.stopped import EXIT_PREEMPTED, PreemptedError, TrainingStoppedError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
# OSError: files, and transformers' unknown models
ERRORS = (ValueError, OSError, registry.DamagedError, TrainingStoppedError)
ConfigOption = Annotated[str, typer.Option("--config", help="A YAML file, or a preset: demo, mini-2d+3d, octavius-2d.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, wins over the file. May be repeated.")
]
Checkpoint = Annotated[Path, typer.Option("--model", help="A folder that training wrote.")]


def show_version(shown: bool) -> None:
    """Print the version and stop."""
    if shown:
        try:
            console.print(importlib.metadata.version("octavius-moe-lora"), highlight=False)
        except importlib.metadata.PackageNotFoundError:
            import moe_lora

            console.print(moe_lora.__version__, highlight=False)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, ask and score a multimodal model with experts."""


def check_files(**files: Path | None) -> None:
    """Refuse a file that is not there, before a model is loaded for it."""
    for option, file in files.items():
        if file is not None and not file.is_file():
            wanted = "a readable image" if option == "image" else "a readable file"
            raise ValueError(f"{option} must be {wanted}, got {file}: there is no such file")


@app.command("assets")
def assets_command(names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None) -> None:
    """Fetch and check the embedded weights and images."""
    registry.fetch(names or None)
    console.print(registry.status_table())


@app.command()
def train(config: ConfigOption, settings: Settings = None, resume: bool = False) -> None:
    """Train a model."""
    from octavius.config import load_config
    from octavius.training.train import train as run_train

    parsed = load_config(config, settings)
    _, report = run_train(parsed, resume)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        console.print(
            f"{report['steps']} steps, {report['tokens_per_second']:.0f} tokens/s; model in {parsed.train.output}"
        )


@app.command("chat")
def chat_command(
    question: Annotated[str | None, typer.Argument(help="One question; without, a conversation begins.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image.")] = None,
    points: Annotated[Path | None, typer.Option(help="A point cloud or mesh: .ply, .pcd, .npy, .obj ...")] = None,
    boxes: Annotated[Path | None, typer.Option(help="Boxes of its objects; without, they are proposed.")] = None,
    unit: Annotated[str, typer.Option(help="Of the coordinates of cloud and boxes: m, cm, mm.")] = "m",
    draw: Annotated[Path | None, typer.Option(help="Image file for the cloud and its objects' attention.")] = None,
    model: Checkpoint = Path("runs/demo/model"),
    single: Annotated[Path | None, typer.Option(help="A single LoRA's folder, for /compare.")] = None,
    experts: Annotated[str, typer.Option(help="gate, none, a number, or number=weight,...")] = "gate",
    blind: Annotated[bool, typer.Option("--blind", help="Answer from the text alone.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 128,
    task: Annotated[str, typer.Option(help="Task type, for models trained with system messages.")] = "normal",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Talk about images and point clouds; shows the experts beside each answer. In it, /help lists the commands."""
    if question is not None and image is None and points is None:
        raise ValueError("a question needs something to look at: give --image or --points")
    check_files(image=image, points=points)
    from octavius.model.decoder import Options
    from octavius.model.octavius import Octavius
    from octavius.points.proposals import read_boxes
    from octavius.session import Scan, Session
    from octavius.session.terminal import Terminal, lines, parse_experts

    options = Options(max_tokens, experts=parse_experts(experts))
    if boxes is not None and not boxes.exists():
        raise ValueError(f"boxes must be a readable file or folder, got {boxes}: there is no such file")
    given = read_boxes(boxes) if boxes else None  # a mistake in it is told before a model is loaded
    loaded = Octavius.from_folder(model), Octavius.from_folder(single) if single else None
    session = Session(loaded[0], options, task, blind, loaded[1])
    if image is not None:
        session.show(image)
    if points is not None:
        session.show(Scan(points, unit, given, draw))
    terminal = Terminal(session, console, as_json)
    if question is not None:
        terminal.ask(question)
    elif not terminal.run(lines(console)) and as_json:
        raise SystemExit(1)


@app.command("serve")
def serve_command(
    model: Checkpoint = Path("runs/demo/model"),
    single: Annotated[Path | None, typer.Option(help="A single LoRA's folder; by default the one beside.")] = None,
    host: Annotated[str, typer.Option(help="Others than the loopback need the token.")] = "127.0.0.1",
    port: int = 8000,
    token: Annotated[str | None, typer.Option(help="At least 16 characters; drawn where one is needed.")] = None,
    rows: Annotated[int, typer.Option(help="Answers made at the same time.")] = 32,
    waiting: Annotated[int, typer.Option(help="Requests that may wait beside them.")] = 64,
    seconds: Annotated[float, typer.Option(help="Until an answer must be done.")] = 120.0,
) -> None:
    """Serve a page to try a model, and an OpenAI-compatible endpoint at /v1."""
    try:
        from octavius.serve.app import Address, load_service, run
        from octavius.serve.limits import Limits
    except ModuleNotFoundError as error:
        raise ValueError(
            f"octavius serve needs {error.name}: pip install 'octavius-moe-lora[octavius,serve]'"
        ) from error

    address = Address(host, port, token).checked()
    limits = Limits(rows=rows, waiting=waiting, seconds=seconds)
    service = load_service(model, single, address.token, limits)
    console.print(f"page: {address.url}", highlight=False, soft_wrap=True)
    console.print(f"endpoint: http://{host}:{port}/v1; stop with Ctrl-C", style="dim", highlight=False, soft_wrap=True)
    run(service, address)


@app.command("eval")
def evaluate_command(
    config: Annotated[str | None, typer.Option(help="A YAML file or preset whose `data` holds the questions.")] = None,
    settings: Settings = None,
    model: Checkpoint = Path("runs/demo/model"),
    file: Annotated[str, typer.Option(help="With --config: the file of questions under `data.root`.")] = "test.json",
    benchmark: Annotated[list[str] | None, typer.Option(help="A benchmark's name. May be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="With --benchmark: its folder, or such as mini-lamm:mini.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe of ChEF: its benchmark, folder and options.")] = None,
    inferencer: Annotated[str | None, typer.Option(help="Direct, PPL or CoT; the benchmark's when left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that the model gets at once.")] = 32,
    shard: Annotated[str | None, typer.Option(help="NUMBER/COUNT, such as 1/2: answer this part alone.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the answers; the model's when left out.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the benchmarks and stop.")] = False,
) -> None:
    """Score a model on benchmarks, or on a file of questions, with their own images and blind.

    A run that was killed goes on where it stopped. Shards are scored together by `octavius score FILES`.
    """
    if listed:
        console.print(benchmark_table())
        return
    if bool(config) + bool(benchmark) + bool(recipe) != 1:
        raise ValueError("eval needs one of --benchmark NAME, --config and --recipe; eval --list names the benchmarks")
    from dataclasses import replace

    from octavius.config import load_config
    from octavius.data.loading import load_data
    from octavius.evaluation.answering import Plan, answer_file, parse_shard
    from octavius.evaluation.chef import read_recipe
    from octavius.evaluation.evaluate import exchange_images, load_benchmarks, read_answers
    from octavius.evaluation.scoring import score
    from octavius.model.octavius import Octavius
    from octavius.report.tables import score_table

    plan = Plan(batch_size, None, inferencer, parse_shard(shard))
    if recipe:
        read = read_recipe(recipe)
        benchmark, data, plan = [read.benchmark], data or read.data, replace(read.plan, shard=plan.shard)
    loaded = Octavius.from_folder(model)
    if config:
        records, stores = load_data(load_config(config, settings).data, file, **loaded.readers())
    else:
        records, stores = load_benchmarks(benchmark or [], data, **loaded.readers())
    name = "+".join(benchmark or [Path(file).stem]) + (f"-{plan.shard[0]}-of-{plan.shard[1]}" if shard else "")
    folder = output or model
    scores = {}
    for column, questions in (("moe", records), ("blind", exchange_images(records))):
        path = folder / f"answers-{name}{'-blind' if column == 'blind' else ''}.jsonl"
        answer_file(loaded, questions, stores, path, plan)
        scores[column] = score(read_answers([path]))
    console.print(score_table({"scores": scores}), f"answers in {folder}/answers-{name}.jsonl")


@app.command("score")
def score_command(
    files: Annotated[list[Path], typer.Argument(help="Files of answers that eval wrote.")],
    meteor: Annotated[bool | None, typer.Option(help="METEOR of captions; on where Java is.")] = None,
    upstream: Annotated[bool, typer.Option("--upstream-metrics", help="Also as the released code counts.")] = False,
) -> None:
    """Score written answers anew, without the model."""
    from octavius.evaluation.captions import has_java
    from octavius.evaluation.evaluate import read_answers
    from octavius.evaluation.scoring import score
    from octavius.report.tables import score_table

    java = has_java() if meteor is None else meteor
    console.print(score_table({"scores": {"moe": score(read_answers(files), java, upstream)}}))


@app.command("pretrain-points")
def pretrain_points(
    output: Annotated[Path | None, typer.Option(help="A folder; by default the cache's, where models look.")] = None,
    preset: Annotated[str, typer.Option(help="small, or ulip: the paper's sizes.")] = "small",
    steps: Annotated[int | None, typer.Option(help="Training steps; by default as many as the encoder needs.")] = None,
    seed: int = 0,
) -> None:
    """Train the point encoder on furniture models against text and images, and score it on held-out models."""
    from octavius.points.pointbert import PRESETS, default_folder
    from octavius.report.tables import pretrain_table
    from octavius.training.point_encoder import PretrainConfig, pretrain

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    folder = output or default_folder(preset)
    steps = PretrainConfig.steps if steps is None else steps
    report = pretrain(folder, PretrainConfig(preset=preset, steps=steps, seed=seed))
    took = f"{report['all_seconds']:.0f} s, {report['seconds']:.0f} of them training"
    console.print(pretrain_table(report), f"encoder in {folder}, {took}")


@app.command()
def demo(
    config: ConfigOption = "demo", settings: Settings = None, resume: bool = False, baseline: bool = False
) -> None:
    """Train, route, answer, score: the whole job, with a report to look at."""
    from octavius.config import load_config
    from octavius.demo import demo as run_demo
    from octavius.report.tables import score_table

    metrics = run_demo(load_config(config, settings), resume, baseline)
    console.print(score_table(metrics), score_table(metrics, "zeroshot"))


def benchmark_table() -> Table:
    """Every benchmark with its title, main metric and data; one that cannot be loaded, with the reason."""
    from octavius.evaluation.benchmarks import BENCHMARKS

    table = Table()
    table.add_column("benchmark", no_wrap=True)
    for name in ("title", "metric", "data"):
        table.add_column(name)
    for name in BENCHMARKS:
        try:
            entry = BENCHMARKS[name]
            table.add_row(name, entry.title, entry.metric.main, entry.data or "--data FOLDER")
        except ValueError as error:
            table.add_row(name, escape(str(error)))
    return table


@app.command()
def ablate(
    table: Annotated[
        str, typer.Option(help="interference, gates, experts, rank, balance, token, modalities, systems.")
    ],
    budget: Annotated[str, typer.Option(help="smoke (not interference), small or full.")] = "small",
    resume: Annotated[bool, typer.Option(help="Go on from the finished runs; also beside another process.")] = False,
    folder: Annotated[Path, typer.Option(help="Receives the lines of finished runs and the table.")] = Path(
        "docs/results"
    ),
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many minutes.")] = None,
) -> None:
    """Do the runs of a table that are not finished, and write what is complete and what is missing."""
    from octavius.experiments.tables import ablate as run_ablation

    console.print(run_ablation(table, budget, folder, resume, minutes), markup=False, highlight=False)


def main() -> None:
    """Run the command; a user's mistake ends in one line, not in a traceback."""
    try:
        app(prog_name="octavius")
    except PreemptedError as error:
        Console(stderr=True).print(str(error), highlight=False, soft_wrap=True)
        raise SystemExit(EXIT_PREEMPTED) from error
    except ERRORS as error:
        text = escape(" ".join(str(error).split()))
        Console(stderr=True).print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
