"""Samples of a test set with their references: what `octavius demo` answered, as a list to try."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavius.serve.limits import Refused
from octavius.serve.uploads import Upload, Uploads

MOST = 240  # samples that the page lists, the tasks in turn


@dataclass(frozen=True)
class Sample:
    """One question of a test set. file: its image or cloud; number: of the object that it shows alone."""

    id: str
    task: str
    file: Path
    number: int | None
    question: str
    reference: str

    def listed(self, index: int) -> dict[str, Any]:
        """What the page lists."""
        kind = "cloud" if self.file.suffix.lower() == ".npz" else "image"
        shown = {"index": index, "id": self.id, "task": self.task, "kind": kind}
        return shown | {"question": self.question, "reference": self.reference}


def read_samples(file: Path) -> list[Sample]:
    """Read the answers that a run wrote; those whose file is gone are left out.

    Args:
        file: one JSON object a line: id, benchmark, image or pcl, question, reference; object where it shows one alone.
    Raises:
        ValueError: the file is not such.
    """
    groups: dict[str, list[Sample]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            task = str(row.get("benchmark") or "")
            path, number = Path(row.get("image") or row["pcl"]), row.get("object")
            sample = Sample(str(row["id"]), task, path, number, str(row["question"]), str(row["reference"]))
            if path.is_file():
                groups.setdefault(task, []).append(sample)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: must be answers that octavius demo or eval wrote: {error}") from error
    share = max(1, MOST // max(1, len(groups)))
    return [sample for members in groups.values() for sample in members[:share]]


def open_sample(samples: list[Sample], index: int, uploads: Uploads) -> Upload:
    """Read a sample's file as if it had been sent.

    Raises:
        Refused: there is no such sample, or its file cannot be read.
    """
    if not 0 <= index < len(samples):
        raise Refused(f"sample must be in 0..{len(samples) - 1}, got {index}", 404, "not_found")
    sample = samples[index]
    try:
        return uploads.add(sample.file.read_bytes(), sample.file.name, number=sample.number)
    except OSError as error:
        raise Refused(f"the sample's file cannot be read: {error}", 404, "not_found") from error
