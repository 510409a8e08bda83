"""Test sets in the layouts of the released 2D and 3D benchmarks, as records.

{root}/meta_file/Detection_VOC2012.json               query, image, object: [{label, bbox}]
{root}/meta_file/VQA_ScienceQA.json                   query, image, gt_choice, gt_choices
{root}/meta_file/Caption_flickr30k.json               query, image, sentences
{root}/meta_file/Classification_CIFAR10.json          query, image, label
{root}/meta_file/Facial_Classification_CelebA(Hair).json, ...(Smile).json      query, image, attr
{root}/meta_file/{Task}_{set}.json                    3D: scene_id, object_name, object_id, task_type, conversations;
                                                      features in a pickle beside it, or in the folders around it
{root}/qa90_questions.jsonl, qa90_gpt4_answer.jsonl   LLaVA's set: question_id, image, text
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavius.data.loading import Scenes, read_scenes
from octavius.data.records import Record, make_records
from octavius.inputs.documents import read_json

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TASKS = {"detection": "detection", "choice": "VQA", "caption": "description"}  # the others classify


def read_images(folder: Path, name: str, kind: str) -> list[Record]:
    """Records of a 2D meta file.

    Args:
        folder: the benchmark's root; image paths start from it.
        name: of the file under `meta_file`.
        kind: the metric of its answers: detection, choice, caption, classification or attribute.
    Raises:
        ValueError: no such file, or another layout; the file, the record and the key are named.
    """
    file = folder / "meta_file" / name
    items = _items(file)
    labels = _labels(items, kind)
    records = []
    for index, item in enumerate(items):
        where = f"{file}: record {index}"
        question, image = _text(item, "query", where), _text(item, "image", where)
        truth = {key: value for key, value in item.items() if key not in ("query", "image", "id")}
        if labels:
            truth["labels"] = labels
        if kind == "classification":
            question = f"{question} Choose one of these: {', '.join(_shuffled(labels, index))}."
        made = {"id": str(item.get("id", index)), "image": image, "task_type": TASKS.get(kind, "classification")}
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": _reference(truth, kind)}]
        records.append(made | {"conversations": turns} | truth)
    return make_records(records, file, folder)


def read_clouds(folder: Path, name: str, kind: str) -> tuple[list[Record], Scenes]:
    """Records of a 3D meta file, and the objects that its pickle or the folders around it hold.

    Args:
        folder: the benchmark's root, or its folder `meta_file`.
        name: such as Caption_scannet.
        kind: the metric of its answers: caption or classification.
    Raises:
        ValueError: no such file, or another layout.
    """
    base = folder / "meta_file" if (folder / "meta_file").is_dir() else folder
    file = base / f"{name}.json"
    items = _items(file)
    pickled = file.with_suffix(".pickle")
    records, scenes = read_scenes(pickled if pickled.is_file() else file)
    if len(records) != len(items):
        raise ValueError(f"{pickled}: must hold the {len(items)} records of {file}, got {len(records)}")
    names = sorted({str(item["object_name"]) for item in items if item.get("object_name")})
    made = []
    for index, (record, item) in enumerate(zip(records, items, strict=True)):
        truth = record.truth | {"scene_id": item.get("scene_id"), "sentences": [record.turns[-1][1]]}
        if kind == "classification":
            truth |= {"label": _text(item, "object_name", f"{file}: record {index}"), "labels": names}
        made.append(replace(record, id=str(item.get("id", f"{name}-{index}")), truth=truth))
    return made, scenes


def read_llava(folder: Path) -> list[Record]:
    """LLaVA's questions, each with the answer that the paper's judge compares with; scored as captions here.

    Raises:
        ValueError: no such files, or another layout.
    """
    questions, answers = folder / "qa90_questions.jsonl", folder / "qa90_gpt4_answer.jsonl"
    said = {row.get("question_id"): row for row in _lines(answers)}
    items = []
    for index, row in enumerate(_lines(questions)):
        where = f"{questions}: line {index + 1}"
        number = row.get("question_id")
        if number not in said:
            raise ValueError(f"{where}: question_id {number!r} has no answer in {answers}")
        question, answer = _text(row, "text", where), _text(said[number], "text", str(answers))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        made = {"id": str(number), "image": _text(row, "image", where), "task_type": "conversation"}
        items.append(made | {"conversations": turns, "sentences": [answer], "category": row.get("category")})
    return make_records(items, questions, folder)


def _items(file: Path) -> list[dict[str, Any]]:
    items = read_json(file)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{file}: must be a list of records")
    return items


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as lines of JSON: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: every line must be an object")
    return rows


def _text(item: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(item.get(key), str):
        raise ValueError(f"{where}: field {key} must be a text, got {item.get(key)!r:.80}")
    return item[key]


def _labels(items: list[dict[str, Any]], kind: str) -> list[str]:
    """The labels among which an answer of this set chooses; [] where it does not."""
    if kind == "detection":
        boxes = [item.get("object") for item in items]
        named = {
            str(box.get("label")) for row in boxes if isinstance(row, list) for box in row if isinstance(box, dict)
        }
        return sorted({*VOC, *named})
    if kind == "classification":
        return sorted({*CIFAR10, *(str(item["label"]) for item in items if "label" in item)})
    if kind == "attribute":
        values = {str(item["attr"]) for item in items if "attr" in item}
        return ["no", "yes"] if values <= {"1", "-1"} else sorted(values)
    return []


def _reference(truth: dict[str, Any], kind: str) -> str:
    """The reference answer that reports show."""
    match kind:
        case "caption":
            sentences = truth.get("sentences")
            return str(sentences[0]) if isinstance(sentences, list) and sentences else ""
        case "choice":
            return str(truth.get("gt_choice", ""))
        case "detection":
            return json.dumps(truth.get("object"))
        case _:
            return str(truth.get("label", truth.get("attr", "")))


def _shuffled(labels: list[str], seed: int) -> list[str]:
    """The labels in an order that the record's number alone decides; the release draws another in every run."""
    labels = list(labels)
    random.Random(seed).shuffle(labels)
    return labels
