"""The wording of mini-LAMM: a few paraphrases per task, and records whose answers a blind guess cannot profit from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

Box = tuple[float, float, float, float]

DETECTION = (
    "Identify all objects in the picture and give their positions.",
    "Detect every object in this image and state its box.",
    "Which objects can you see, and where exactly are they?",
    "List all objects of the image with their bounding boxes.",
    "Find each object in the picture and report its coordinates.",
    "Locate the objects shown here and name their categories.",
)
CAPTION = (
    "What is the caption of the image?",
    "Describe this picture in one short sentence.",
    "Write a short caption for the picture.",
    "Give a brief description of what the image shows.",
    "Please caption this image in a few words.",
)
CLASSIFICATION = (
    "What kind of thing is shown in the picture?",
    "To which category does the object in the image belong?",
    "Classify the object in this picture.",
    "Name the class of the object in the image.",
    "What is the category of the pictured object?",
)
HAIR = (
    "What is the hair color of this person?",
    "Which color is the hair of the person shown?",
    "Tell me the color of this person's hair.",
    "What color of hair does the person in the picture have?",
    "Name the hair color of the face in the image.",
)
SMILE = (
    "Is the person in the picture smiling?",
    "Does this person smile, yes or no?",
    "Can you see a smile on this face?",
    "Is there a smile on the face of this person?",
    "Tell me whether the person in the image is smiling.",
)
COUNT = (
    "How many objects are in the picture?",
    "Count the objects in the image. How many are there?",
    "What is the number of objects shown in the picture?",
    "How many separate things can you see here?",
)
WHERE = (
    "Where is the {0} in the picture?",
    "In which part of the image is the {0}?",
    "Which corner of the picture is the {0} closest to?",
    "What is the position of the {0} in the image?",
)
RELATIVE = (
    "Where is the {0}, seen from the {1}?",
    "In which direction from the {1} is the {0}?",
    "What is the position of the {0} relative to the {1}?",
    "On which side of the {1} is the {0}?",
)
WHICH = (
    "Which of these is in the picture?",
    "Which of the following can be seen in the image?",
    "What does the picture show, among these?",
    "Which one of these things appears in the image?",
)

CORNERS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS: tuple[str, ...] = ("left", "right", "above", "below")
NUMBERS: tuple[str, ...] = ("1", "2", "3", "4")
MIDDLE = 0.07  # half width of the cross in the middle of the picture that belongs to no corner
LETTERS = "ABCD"


def record(name: str, image: str, task: str, question: str, answer: str, **truth: Any) -> dict[str, Any]:
    """One record in upstream's form plus `benchmark`, which is mini-{task}, and its ground truth."""
    tasks = {"detection": "detection", "caption": "description", "vqa": "VQA"}
    return {
        "id": f"{name}_{task}",
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "task_type": tasks.get(task, "classification"),
        "benchmark": f"mini-{task}",
        **truth,
    }


def phrase(rng: np.random.Generator, texts: Sequence[str], *names: str) -> str:
    return texts[int(rng.integers(len(texts)))].format(*names)


def detection_xml(labels: Sequence[str], boxes: Sequence[Box]) -> str:
    """Upstream's answer form: corners and class as attributes of <Item>, objects from left to right."""
    items = []
    for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
        items.append(f'<Item x1="{x1:.4f}" y1="{y1:.4f}" x2="{x2:.4f}" y2="{y2:.4f}" cls={quoteattr(label)}/>')
    return f"<Root>{''.join(items)}</Root>"


def corner(box: Box) -> str | None:
    """The quarter of the picture that a box's centre is in, or None near the middle lines."""
    x, y = (box[0] + box[2]) / 2 - 0.5, (box[1] + box[3]) / 2 - 0.5
    if abs(x) < MIDDLE or abs(y) < MIDDLE:
        return None
    return CORNERS[2 * (y > 0) + (x > 0)]


def direction(box: Box, other: Box) -> str | None:
    """Where `box` lies seen from `other`, or None if that is not clear (near a diagonal, or too close)."""
    dx = (box[0] + box[2] - other[0] - other[2]) / 2
    dy = (box[1] + box[3] - other[1] - other[3]) / 2
    if max(abs(dx), abs(dy)) < 0.15 or max(abs(dx), abs(dy)) < 1.6 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return DIRECTIONS[int(dx > 0)]
    return DIRECTIONS[2 + int(dy > 0)]


class ChoiceWriter:
    """Writes multiple-choice questions, always asking what has been the answer least often so far.

    Four kinds (count, where, relative, which), four choices each. Every answer of a kind, and every letter where the
    order is free, comes up equally often, so no constant answer does better than about one in four.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)  # categories that wrong choices are drawn from
        self.answers: Counter[tuple[str, str]] = Counter()
        self.letters: Counter[tuple[str, str]] = Counter()

    def write(
        self, rng: np.random.Generator, labels: Sequence[str], boxes: Sequence[Box], number: int
    ) -> list[tuple[str, str, list[str]]]:
        """Questions of different kinds about one picture: (question, right letter, texts of the choices)."""
        candidates = self.candidates(labels, boxes)
        written: list[tuple[str, str, list[str]]] = []
        kinds: set[str] = set()
        order = rng.permutation(len(candidates))
        for index in sorted(order, key=lambda i: self._use(candidates[int(i)])):
            kind, answer, names = candidates[int(index)]
            if kind in kinds or len(written) == number:
                continue
            kinds.add(kind)
            written.append(self._question(rng, kind, answer, names, labels))
        return written

    def candidates(self, labels: Sequence[str], boxes: Sequence[Box]) -> list[tuple[str, str, tuple[str, ...]]]:
        """(kind, answer, names in the question) of all that can be asked about a picture."""
        found: list[tuple[str, str, tuple[str, ...]]] = [("count", str(len(labels)), ())]
        once = [i for i, label in enumerate(labels) if labels.count(label) == 1] if len(labels) > 1 else [0]
        for i in once:
            where = corner(boxes[i])
            if where:
                found.append(("where", where, (labels[i],)))
            for j in once:
                side = direction(boxes[i], boxes[j]) if i != j else None
                if side:
                    found.append(("relative", side, (labels[i], labels[j])))
        found += [("which", label, ()) for label in sorted(set(labels))]
        return found

    def _use(self, candidate: tuple[str, str, tuple[str, ...]]) -> float:
        """How often an answer was asked for, in units that make the kinds equally frequent."""
        kind, answer, _ = candidate
        weight = len(self.names) / 4 if kind == "which" else 1.0
        return self.answers[kind, answer] * weight

    def _question(
        self, rng: np.random.Generator, kind: str, answer: str, names: tuple[str, ...], labels: Sequence[str]
    ) -> tuple[str, str, list[str]]:
        self.answers[kind, answer] += 1
        if kind == "count":
            texts, choices = COUNT, list(NUMBERS)
        else:
            texts = {"where": WHERE, "relative": RELATIVE, "which": WHICH}[kind]
            pool = {"where": CORNERS, "relative": DIRECTIONS}.get(kind, self.names)
            wrong = [name for name in pool if name != answer and (kind != "which" or name not in labels)]
            choices = [wrong[int(i)] for i in rng.permutation(len(wrong))[:3]]
            tie = rng.permutation(4)
            place = min(range(4), key=lambda i: (self.letters[kind, LETTERS[i]], tie[i]))
            choices.insert(place, answer)
        letter = LETTERS[choices.index(answer)]
        self.letters[kind, letter] += 1
        listed = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
        return f"{phrase(rng, texts, *names)} {listed}", letter, choices
