"""Upstream's instruction JSON, 2D and 3D: a file → records.

A file is a list of {"image", "conversations": [{"from": "human" | "gpt", "value"}, ...], "task_type"}; a detection
answer is an XML string of <Item x1= y1= x2= y2= cls=> with corners in fractions of the image (LAMM v2). Records about
point clouds have `pcl`, the cloud's file, and `object_id` where they are about one object (Scan2Inst).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from octavius.inputs.boxes import fraction_box
from octavius.inputs.documents import read_json
from octavius.language.prompts import SYSTEM, box_answer
from octavius.points.object_store import Region

MAX_UNREADABLE = 0.01  # of the records; more than this stops the run
console = Console(stderr=True)


@dataclass(frozen=True)
class Record:
    """One conversation about one image or point cloud; `truth` is the rest of its JSON, such as labels."""

    id: str
    image: Path | None
    turns: list[tuple[str, str]]
    task_type: str
    truth: dict[str, Any]
    cloud: Region | None = None

    @property
    def task(self) -> str:
        """The name of what it asks for: its benchmark where it names one, else its task type."""
        return self.truth.get("benchmark", self.task_type)

    @property
    def source(self) -> Path:
        """The file of the image or of the cloud."""
        assert self.image or self.cloud
        return self.image or self.cloud.cloud  # type: ignore[union-attr, return-value]


def read_records(file: str | Path, images: str | Path | None = None) -> list[Record]:
    """Read a JSON file of conversations.

    Args:
        file: the JSON list.
        images: folder that relative paths of images and clouds start from; None: the file's folder.

    Raises:
        ValueError: not JSON, or a malformed record: the file, the record and the field are named.
    """
    file = Path(file)
    folder = Path(images) if images else file.parent
    return make_records(read_json(file), file, folder)


def make_records(items: Any, file: Path, folder: Path) -> list[Record]:
    """Records of a parsed JSON list; errors name `file`."""
    if not isinstance(items, list):
        raise ValueError(f"{file}: must be a list of records, got {type(items).__name__}")
    records = [_record(item, folder, f"{file}: record {index}") for index, item in enumerate(items)]
    kept = [record for record in records if record is not None]
    if len(kept) < len(items):
        without = len(items) - len(kept)
        console.print(f"{file}: {without} of {len(items)} records have no image or cloud and are skipped")
    return kept


def _record(item: Any, folder: Path, where: str) -> Record | None:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: must be an object, got {type(item).__name__}")
    if "id" in item:
        where = f"{where} (id {item['id']})"
    if item.get("image") is None and item.get("pcl") is None:
        return None
    for field in ("image", "pcl"):
        if not isinstance(item.get(field), str | None):
            raise ValueError(f"{where}: field {field} must be a path, got {item[field]!r}")
    task_type = item.get("task_type", "normal")
    if not isinstance(task_type, str) or task_type not in SYSTEM:
        raise ValueError(f"{where}: field task_type must be one of {', '.join(SYSTEM)}, got {task_type!r}")
    conversations = item.get("conversations")
    if not isinstance(conversations, list) or not conversations or len(conversations) % 2:
        raise ValueError(
            f"{where}: field conversations must hold pairs of human and gpt turns, got {conversations!r:.80}"
        )
    texts, truth = [], {}
    for index, turn in enumerate(conversations):
        speaker = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"{where}: field conversations[{index}] must be from {speaker} with a text value, got {turn!r:.80}"
            )
        text = turn["value"]
        if speaker == "gpt" and task_type == "detection" and text.lstrip().startswith("<"):
            truth["object"] = _objects(text, f"{where}: field conversations[{index}]")
            text = box_answer(truth["object"])
        texts.append(re.sub(r"<(image|pcl)>\n|\n?<(image|pcl)>", "", text))
    known = ("id", "image", "pcl", "conversations", "task_type")
    truth |= {key: value for key, value in item.items() if key not in known}
    if isinstance(truth.get("object"), list):
        truth["object"] = [_boxed(entry, f"{where}: field object") for entry in truth["object"]]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    image = None if item.get("image") is None else folder / item["image"]
    cloud = None if item.get("pcl") is None else Region(folder / item["pcl"], _object(item, task_type, where))
    return Record(str(item.get("id", where)), image, turns, task_type, truth, cloud)


def _object(item: dict, task_type: str, where: str) -> int | None:
    """The number of the object that a record shows alone: that of classification and description."""
    if task_type not in ("classification3d", "description3d") or item.get("object_id") is None:
        return None
    try:
        return int(item["object_id"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: field object_id must be a number, got {item['object_id']!r}") from error


def _objects(text: str, where: str) -> list[dict]:
    """Objects of a detection answer in XML; a value may be an attribute of <Item> or its child element."""
    try:
        root = ElementTree.fromstring(f"<all>{text}</all>")
        return [
            {
                "label": item.get("cls") or item.findtext("cls") or "object",
                "bbox": fraction_box(item.get(k) or item.findtext(k) or "" for k in ("x1", "y1", "x2", "y2")),
            }
            for item in root.iter("Item")
        ]
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} must be XML <Item>s with x1, y1, x2, y2 and cls: {error}; got {text!r:.80}"
        ) from error


def _boxed(entry: Any, where: str) -> Any:
    """An object of a record's ground truth, its box cut to the image."""
    if not isinstance(entry, dict) or "bbox" not in entry:
        return entry
    try:
        return entry | {"bbox": fraction_box(entry["bbox"])}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def drop_unreadable(records: list[Record], bad: dict[Path | Region, str]) -> list[Record]:
    """Leave out the records of unreadable images or clouds, and of objects that their cloud lacks, naming them.

    Args:
        bad: file, or object of a cloud → why it cannot be read.

    Raises:
        ValueError: more than MAX_UNREADABLE of the records would go.
    """
    kept = [record for record in records if record.source not in bad and record.cloud not in bad]
    if not bad:
        return kept
    files = [(key.cloud if isinstance(key, Region) else key, why) for key, why in bad.items()]
    names = "; ".join(f"{path}: {why}" for path, why in files[:5])
    lost = len(records) - len(kept)
    count = f"{lost} of {len(records)} records have an unreadable image or cloud"
    count += f" ({len({path for path, _ in files})} files: {names})"
    if lost > MAX_UNREADABLE * len(records):
        raise ValueError(f"{count}; at most {MAX_UNREADABLE:.0%} may be")
    console.print(f"skipped: {count}")
    return kept
