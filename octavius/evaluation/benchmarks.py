"""Benchmarks by name: a data set, a metric, a prompt, and a row in the paper's tables.

A program adds its own with `register_benchmark`; an installed package, through the entry points of the group
`octavius.benchmarks`. `octavius eval --list` names them all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from octavius.data.loading import Scenes, data_folder, read_scenes
from octavius.data.meta_files import read_clouds, read_images, read_llava
from octavius.data.records import Record, read_records
from octavius.evaluation.metrics import METRICS, Metric
from octavius.registry import Registry

Reader = Callable[[Path], tuple[list[Record], Scenes]]


@dataclass(frozen=True)
class Benchmark:
    """A data set with the question that is asked of it and the metric of the answers.

    Args:
        title: its row in the tables.
        metric: how answers are scored.
        read: folder → the records, and the objects of point clouds that the data bring along ({} if there are none).
        data: the folder, or embedded data such as `mini-lamm:demo`, where none is given.
        prompt: the question that the model gets; `{question}` stands for the record's own.
        inferencer: how an answer is made, a name of `octavius.evaluation.inferencers.INFERENCERS`.
        max_new_tokens: an answer's length at most.
    """

    title: str
    metric: Metric
    read: Reader
    data: str | None = None
    prompt: str = "{question}"
    inferencer: str = "Direct"
    max_new_tokens: int = 128


def _check(name: str, benchmark: Benchmark) -> None:
    if not isinstance(benchmark, Benchmark):
        raise TypeError(f"the benchmark {name!r} must be an octavius.Benchmark, got {type(benchmark).__name__}")


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "octavius.benchmarks", _check)


def register_benchmark(name: str, benchmark: Benchmark) -> None:
    """Let `octavius eval --benchmark NAME` and data files use a benchmark.

    Raises:
        TypeError, ValueError: it is no Benchmark, or the name is taken.
    """
    BENCHMARKS.register(name, benchmark)


def benchmark_records(name: str, data: str | Path | None = None) -> tuple[list[Record], Scenes]:
    """The records of a benchmark, with its prompt, and the objects that the data bring along.

    Args:
        name: of the benchmark.
        data: a folder, or embedded data such as `mini-lamm:mini`; the benchmark's own when None.
    Raises:
        ValueError: no such benchmark, no data, or data of another layout.
    """
    benchmark = BENCHMARKS[name]
    source = data or benchmark.data
    if source is None:
        raise ValueError(f"the data of benchmark {name} must be given: --data FOLDER")
    folder = data_folder(str(source))
    if not folder.is_dir():
        raise ValueError(f"the data of benchmark {name} must be a folder, got {folder}")
    records, scenes = benchmark.read(folder)
    if not records:
        raise ValueError(f"{folder}: must hold records of benchmark {name}, got none")
    return [_prompted(record, name, benchmark) for record in records], scenes


def _prompted(record: Record, name: str, benchmark: Benchmark) -> Record:
    *before, (question, answer) = record.turns
    turns = [*before, (benchmark.prompt.replace("{question}", question), answer)]
    truth = {key: value for key, value in record.truth.items() if key != "metric"} | {"benchmark": name}
    return replace(record, turns=turns, truth=truth)


def _mini(name: str) -> Reader:
    """Reads the records of one mini benchmark from the test split of mini-LAMM or mini-Scan2Inst."""

    def read(folder: Path) -> tuple[list[Record], Scenes]:
        records, scenes = (read_scenes if name.endswith("3d") else _images)(folder / "test.json")
        return [record for record in records if record.truth.get("benchmark") == name], scenes

    return read


def _images(file: Path) -> tuple[list[Record], Scenes]:
    return read_records(file), {}


def _images_of(name: str, metric: str) -> Reader:
    return lambda folder: (read_images(folder, name, metric), {})


def _clouds_of(name: str, metric: str) -> Reader:
    return lambda folder: read_clouds(folder, name, metric)


for _name, _title, _metric in (
    ("mini-detection", "Detection", "detection"),
    ("mini-vqa", "Visual QA", "choice"),
    ("mini-caption", "Captioning", "caption"),
    ("mini-classification", "Classification", "classification"),
    ("mini-hair", "Face: hair", "attribute"),
    ("mini-smile", "Face: smile", "attribute"),
    ("mini-classification3d", "3D classification", "classification"),
    ("mini-caption3d", "3D captioning", "caption"),
    ("mini-vqa3d", "3D question answering", "scene-answer"),
):
    _data = "mini-scan2inst:demo" if _name.endswith("3d") else "mini-lamm:demo"
    register_benchmark(_name, Benchmark(_title, METRICS[_metric], _mini(_name), _data))

for _name, _title, _file, _metric, _inferencer in (
    ("voc2012-detection", "VOC2012 detection", "Detection_VOC2012", "detection", "Direct"),
    ("scienceqa", "ScienceQA", "VQA_ScienceQA", "choice", "CoT"),
    ("flickr30k", "Flickr30k captioning", "Caption_flickr30k", "caption", "Direct"),
    ("cifar10", "CIFAR10", "Classification_CIFAR10", "classification", "Direct"),
    ("celeba-hair", "CelebA hair", "Facial_Classification_CelebA(Hair)", "attribute", "Direct"),
    ("celeba-smile", "CelebA smile", "Facial_Classification_CelebA(Smile)", "attribute", "Direct"),
):
    register_benchmark(
        _name, Benchmark(_title, METRICS[_metric], _images_of(f"{_file}.json", _metric), inferencer=_inferencer)
    )
for _name, _title, _file, _metric in (
    ("scannet-caption", "ScanNet captioning", "Caption_scannet", "caption"),
    ("scannet-vqa", "ScanNet VQA", "VQA_scannet", "caption"),
    ("scannet-classification", "ScanNet classification", "Classification_scannet", "classification"),
    ("shapenet-classification", "ShapeNet classification", "Classification_shapenet", "classification"),
    ("nr3d-caption", "Nr3D captioning", "Caption_nr3d", "caption"),
):
    register_benchmark(_name, Benchmark(_title, METRICS[_metric], _clouds_of(_file, _metric)))
register_benchmark("llava", Benchmark("LLaVA's set", METRICS["caption"], lambda folder: (read_llava(folder), {})))
