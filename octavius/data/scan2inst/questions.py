"""Scan2Inst: instruction data for point clouds from annotated scenes (Octavius, arXiv 2311.02684, section 3.3).

classification3d and description3d ask about one object, VQA3D about the scene: what is left, right, over, beneath, next
to or in the corner, which colour, how many, which is larger. Answers come from the annotations alone. What people
wrote (ScanRefer's captions, ScanQA's questions) is used as it is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavius.data.scan2inst.relations import (
    COLOURS,
    OPPOSITE,
    Scene,
    SceneObject,
    gap,
    in_corner,
    once,
    related,
    relation,
    volume,
)

CLASSIFICATION = (
    "What kind of object is this point cloud?",
    "Classify the object in the point cloud.",
    "Which category does this 3D object belong to?",
    "Name the class of the scanned object.",
    "What object do these points show?",
    "Tell me the category of the object given as points.",
)
CAPTION = (
    "What is the caption of the point cloud?",
    "Describe the object in the point cloud.",
    "Give a short description of this 3D object.",
    "How would you describe the scanned object?",
    "Write a caption for the object given as points.",
    "Please describe what these points show.",
)
QUESTIONS: dict[str, tuple[str, ...]] = {
    "left": (
        "What is to the left of the {0}?",
        "What is located to the left of the {0}?",
        "Which object stands left of the {0}?",
        "What can be found on the left side of the {0}?",
    ),
    "right": (
        "What is to the right of the {0}?",
        "What is located to the right of the {0}?",
        "Which object stands right of the {0}?",
        "What can be found on the right side of the {0}?",
    ),
    "over": (
        "What is over the {0}?",
        "What is located above the {0}?",
        "Which object is over the {0}?",
        "What can be found above the {0}?",
    ),
    "beneath": (
        "What is beneath the {0}?",
        "What is located below the {0}?",
        "Which object is below the {0}?",
        "What can be found under the {0}?",
    ),
    "next to": (
        "What is next to the {0}?",
        "Which object stands beside the {0}?",
        "What is close to the {0}?",
        "What is the neighbour of the {0}?",
    ),
    "side": (
        "Where is the {0}, seen from the {1}?",
        "Which side of the {1} is the {0} positioned on?",
        "In which direction from the {1} is the {0}?",
        "What is the position of the {0} relative to the {1}?",
    ),
    "corner": (
        "What is in the corner of the room?",
        "Which object stands in the corner?",
        "What can be found in a corner of this scene?",
        "What has been put into the corner?",
    ),
    "colour": (
        "What is the color of the {0}?",
        "Which color does the {0} have?",
        "What color is the {0} in this room?",
        "Tell me the color of the {0}.",
    ),
    "count": (
        "How many {0} are in the room?",
        "Count the {0} in this scene.",
        "What is the number of {0} here?",
        "How many {0} does the scan show?",
    ),
    "size": (
        "Which is larger, the {0} or the {1}?",
        "Is the {0} or the {1} bigger?",
        "Of the {0} and the {1}, which takes more space?",
        "Compare the {0} with the {1}: which one is larger?",
    ),
}
SUPPORT = {  # further phrasings, true only where the two touch
    "over": ("What is on top of the {0}?", "What stands on the {0}?"),
    "beneath": ("What does the {0} stand on?", "On top of what is the {0}?"),
}
TOUCHING = 0.05  # metres between two boxes of which one stands on the other
DIRECTIONS = {
    "left": "On the left side.",
    "right": "On the right side.",
    "over": "It is over it.",
    "beneath": "Beneath it.",
}
NUMBERS = ("1", "2", "3", "4", "5", "6")
PLURALS = {"bookcase": "bookcases", "person": "people", "bench": "benches", "box": "boxes", "shelf": "shelves"}


@dataclass(frozen=True)
class Asked:
    """A question that a scene can answer: its kind, the names in it, the answer, the object it is about, the labels."""

    kind: str
    names: tuple[str, ...]
    text: str
    label: str
    labels: tuple[str, ...]
    about: int
    touching: bool = False


class Builder:
    """Writes records, always asking what has been the answer least often so far, so that guessing gains little.

    Args:
        names: all classes.
        seed: of the phrasings.
        per_scene: (classifications, descriptions, questions) of each scene, at most.
    """

    def __init__(self, names: Sequence[str], seed: int = 0, per_scene: tuple[int, int, int] = (2, 2, 4)):
        self.names, self.per_scene = tuple(names), per_scene
        self.rng = np.random.default_rng(seed)
        self.used: Counter[tuple[str, str]] = Counter()
        self.kinds: Counter[str] = Counter()
        self.larger_first = 0  # questions of size that name the larger first, less those that name it last

    def write(self, scene: Scene) -> list[dict[str, Any]]:
        """The records of one scene."""
        classes, captions, questions = self.per_scene
        records = [self._classify(scene, item) for item in self._rarest(scene.objects, "class", classes)]
        records += [self._describe(scene, item) for item in self._rarest(scene.objects, "caption", captions)]
        for _ in range(questions):
            asked = self._choose(candidates(scene, self.names), {r["question_key"] for r in records[-questions:]})
            if asked is not None:
                records.append(self._ask(scene, asked))
        for number, (question, answers) in enumerate(scene.questions):
            key = f"q{number}"
            truth = {"label": answers[0], "labels": sorted(set(answers)), "accepted": answers, "sentences": answers}
            records.append(_record(scene, key, "vqa3d", question, answers[0], None, **truth))
        for record in records:
            record.pop("question_key", None)
        return records

    def _classify(self, scene: Scene, item: SceneObject) -> dict[str, Any]:
        truth = {"label": item.name, "labels": list(self.names)}
        question = self._phrase(CLASSIFICATION)
        return _record(scene, f"class_{item.id}", "classification3d", question, item.name, item, **truth)

    def _describe(self, scene: Scene, item: SceneObject) -> dict[str, Any]:
        captions = list(item.captions) or [describe(item)]
        question = self._phrase(CAPTION)
        return _record(scene, f"caption_{item.id}", "caption3d", question, captions[0], item, sentences=captions)

    def _ask(self, scene: Scene, asked: Asked) -> dict[str, Any]:
        self.used[asked.kind, asked.label] += 1
        self.kinds[asked.kind] += 1
        key = f"{asked.kind.replace(' ', '_')}_{'_'.join(asked.names).replace(' ', '_')}"
        names, labels = self._order(asked)
        further = SUPPORT.get(asked.kind, ()) if asked.touching else ()
        question = self._phrase(QUESTIONS[asked.kind] + further, *names)
        item = next((o for o in scene.objects if o.id == asked.about), None)
        truth = {"label": asked.label, "labels": labels, "sentences": [asked.text], "kind": asked.kind}
        record = _record(scene, key, "vqa3d", question, asked.text, item, **truth)
        return record | {"question_key": (asked.kind, asked.names)}

    def _order(self, asked: Asked) -> tuple[tuple[str, ...], list[str]]:
        """Names and labels as they are written: of two sizes the larger comes first and last equally often."""
        if asked.kind != "size":
            return asked.names, list(asked.labels)
        first = bool(self.rng.integers(2)) if self.larger_first == 0 else self.larger_first < 0
        self.larger_first += 1 if first else -1
        names = asked.names if first else asked.names[::-1]
        return names, list(names)

    def _phrase(self, texts: Sequence[str], *names: str) -> str:
        return texts[int(self.rng.integers(len(texts)))].format(*names)

    def _rarest(self, objects: list[SceneObject], kind: str, count: int) -> list[SceneObject]:
        order = [objects[int(i)] for i in self.rng.permutation(len(objects))]
        chosen: list[SceneObject] = []
        while order and len(chosen) < count:
            item = min(order, key=lambda o: self.used[kind, o.name])
            self.used[kind, item.name] += 1
            order.remove(item)
            chosen.append(item)
        return chosen

    def _choose(self, found: list[Asked], already: set) -> Asked | None:
        found = [asked for asked in found if (asked.kind, asked.names) not in already]
        if not found:
            return None
        tie = self.rng.permutation(len(found))
        best = min(
            range(len(found)),
            key=lambda i: (self.kinds[found[i].kind], self.used[found[i].kind, found[i].label], tie[i]),
        )
        return found[best]


def candidates(scene: Scene, names: Sequence[str]) -> list[Asked]:
    """All that can be asked about a scene with exactly one right answer."""
    single, labels = once(scene.objects), tuple(names)
    found: list[Asked] = []
    for anchor in single:
        for kind in (*OPPOSITE, "next to"):
            near = related(scene.objects, kind, anchor)
            if len(near) == 1 and near[0].name != anchor.name:
                touching = gap(anchor.box, near[0].box) < TOUCHING
                found.append(Asked(kind, (anchor.name,), _named(near[0]), near[0].name, labels, near[0].id, touching))
        for other in single:
            side = relation(anchor.box, other.box) if other.id != anchor.id else None
            if side:
                found.append(
                    Asked("side", (anchor.name, other.name), DIRECTIONS[side], side, tuple(DIRECTIONS), anchor.id)
                )
            if other.id != anchor.id and volume(anchor.box) > 2 * volume(other.box):
                pair, text = (anchor.name, other.name), f"The {anchor.name} is larger."
                found.append(Asked("size", pair, text, anchor.name, pair, anchor.id))
        if anchor.colour:
            text = f"It is {anchor.colour}."
            found.append(Asked("colour", (anchor.name,), text, anchor.colour, COLOURS, anchor.id))
    corner = [item for item in scene.objects if in_corner(item.box, scene.room)]
    if len(corner) == 1:
        found.append(Asked("corner", (), _named(corner[0]), corner[0].name, labels, corner[0].id))
    for name, number in sorted(Counter(item.name for item in scene.objects).items()):
        if number <= len(NUMBERS):
            about = next(item.id for item in scene.objects if item.name == name)
            found.append(Asked("count", (plural(name),), NUMBERS[number - 1], NUMBERS[number - 1], NUMBERS, about))
    return found


def describe(item: SceneObject) -> str:
    """ "This is a brown chair. It is 0.9 m high." """
    words = f"{item.colour} {item.name}".strip()
    return f"This is {_article(words)}. It is {item.box[5] - item.box[2]:.1f} m high."


def plural(name: str) -> str:
    """Plural of an object's name."""
    return PLURALS.get(name, name if name.endswith("s") else f"{name}s")


def _named(item: SceneObject) -> str:
    words = _article(f"{item.colour} {item.name}".strip())
    return f"{words[0].upper()}{words[1:]}."


def _article(words: str) -> str:
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


TASKS = {"classification3d": "classification3d", "caption3d": "description3d", "vqa3d": "VQA3D"}


def _record(
    scene: Scene, key: str, task: str, question: str, answer: str, item: SceneObject | None, **truth: Any
) -> dict[str, Any]:
    """One record in upstream's form plus `pcl`, the cloud's file, `benchmark`, mini-{task}, and its ground truth."""
    about = {} if item is None else {"object_id": item.id, "object_name": item.name}
    return {
        "id": f"{scene.id}_{key}",
        "scene_id": scene.id,
        "pcl": scene.cloud,
        **about,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "task_type": TASKS[task],
        "benchmark": f"mini-{task}",
        "question_key": None,
        **truth,
    }
