"""What an answer in free text says: boxes, a label, a choice. Nothing here raises on any text."""

import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import NamedTuple

Box = tuple[float, float, float, float]
IRREGULAR: dict[str, str] = {"man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice"}
IRREGULAR |= {"goose": "geese", "foot": "feet", "tooth": "teeth"}
SINGULAR = {plural: word for word, plural in IRREGULAR.items()}
HIDDEN = "\0"  # stands in for a parsed box: neither word nor space
WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*(?![^\W_])|[^\W_]+")
BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")
NOTHING = re.compile(r"\b(?:no|not any|none|nothing|without)\b", re.IGNORECASE)
STOP = re.compile(r"[.!?;](?=\s|$)|\n")


class Mention(NamedTuple):
    start: int
    end: int
    label: str


def parse_boxes(text: str, labels: Sequence[str]) -> list[tuple[str | None, Box]]:
    """Boxes of an answer, in order, each with its label.

    A box is four finite numbers in square or round brackets with x1 <= x2 and y1 <= y2, or five, the last of which is
    a confidence; anything else is skipped. Its
    label is looked for in its sentence, as whole words, longest first, singular or plural: where a label stands
    before the sentence's first box, a box takes the nearest label before it ("a bird at [...] and a cat at [...]"),
    otherwise the nearest after it ("at [...] there is an object of the cat category"). Never raises.

    Args:
        text: the answer.
        labels: names to look for; the label is returned as spelt here.
    """
    return [(label, box) for label, box, _ in parse_confident_boxes(text, labels)]


def parse_confident_boxes(text: str, labels: Sequence[str]) -> list[tuple[str | None, Box, float | None]]:
    """Boxes like `parse_boxes` finds, each with its confidence, the fifth number in its brackets, or None."""
    boxes = [(match, numbers) for match in BRACKETS.finditer(text) if (numbers := _numbers(match[1])) is not None]
    masked = _masked(text, [match.span() for match, _ in boxes])
    named = mentions(masked, labels)
    inside = iter(named)  # a stop within a name is none: "a St. Bernard"
    name, stops = next(inside, None), []
    for stop in (match.start() for match in STOP.finditer(masked)):
        while name and name.end <= stop:
            name = next(inside, None)
        if name is None or stop <= name.start:
            stops.append(stop)
    sentences: dict[int, list[Mention]] = {}
    for mention in named:
        sentences.setdefault(bisect(stops, mention.start), []).append(mention)
    first: dict[int, int] = {}
    found: list[tuple[str | None, Box, float | None]] = []
    for match, (box, confidence) in boxes:
        start, sentence = match.start(), bisect(stops, match.start())
        first.setdefault(sentence, start)
        own = sentences.get(sentence, [])
        place = bisect(own, start, key=lambda mention: mention.start)
        before, after = own[place - 1] if place else None, own[place] if place < len(own) else None
        label_first = bool(own) and own[0].start < first[sentence]
        nearest = before if label_first else after or before
        if box[0] <= box[2] and box[1] <= box[3]:
            found.append((nearest.label if nearest else None, box, confidence))
    return found


def says_none(text: str) -> bool:
    """Whether an answer says that there is nothing to find, as the training data's "There is no object." does."""
    return bool(NOTHING.search(text))


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that the answer names as whole words (singular or plural), or None if it names none or several.

    Of overlapping names the longest counts: "a polar bear" names "polar bear" and not "bear". Upstream accepts any
    answer that contains the right word beside wrong ones, and scores a smile answer without "no" as yes.
    """
    named = {mention.label for mention in mentions(text, labels)}
    return named.pop() if len(named) == 1 else None


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The chosen letter of a multiple-choice answer, by the first rule that gives one, or None.

    "the answer is (X)" → "ANSWER: X" → the whole answer is X → exactly one letter in brackets, "(X)" → exactly one
    choice's text is present as whole words. Of several "the answer is" the last counts: reasoning comes before the
    conclusion. Letters beyond the choices do not count.

    Args:
        text: the answer.
        choices: the texts of choices A, B, C, ... ("(A) " before a text is allowed).
    """
    letters = ascii_uppercase[: len(choices)]
    stated = r"\(([A-Za-z])\)|([A-Z])(?=\s*(?:[.,:;!)\n]|$))"  # a bare letter must close its clause: not "a cat"
    for rule in (rf"(?i:answer\s+is)[\s:]*(?:{stated})", rf"(?i:answer):\s*(?:{stated})", rf"^\s*(?:{stated})\W*$"):
        named = [(match[1] or match[2]).upper() for match in re.finditer(rule, text)]
        named = [letter for letter in named if letter in letters]
        if named:
            return named[-1]
    bracketed = {letter for letter in re.findall(r"\(([A-Z])\)", text) if letter in letters}
    if len(bracketed) == 1:
        return bracketed.pop()
    texts = [_choice_text(choice) for choice in choices]
    label = parse_label(text, texts)
    return None if label is None else letters[texts.index(label) :][:1] or None  # letters end at Z


def mentions(text: str, labels: Sequence[str]) -> list[Mention]:
    """Labels in the text, in order, longest first, without overlap."""
    forms = _forms(tuple(labels))
    longest = max(map(len, forms), default=0)
    words = [(match.start(), match.end(), match[0].casefold()) for match in WORD.finditer(text)]
    found, i = [], 0
    while i < len(words):
        for size in range(min(longest, len(words) - i), 0, -1):
            label = forms.get(tuple(word for _, _, word in words[i : i + size]))
            if label is not None:
                found.append(Mention(words[i][0], words[i + size - 1][1], label))
                break
        else:
            size = 1
        i += size
    return found


@lru_cache(maxsize=256)
def _forms(labels: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    """Word sequence → label: the label itself, then its other number; labels with the same words are left out."""
    names = [(tuple(word.casefold() for word in WORD.findall(label)), label) for label in labels]
    count = Counter(words for words, _ in names)
    names = [(words, label) for words, label in names if words and count[words] == 1]
    forms = dict(names)
    for words, label in names:
        for last in _numbers_of(words[-1]):
            forms.setdefault((*words[:-1], last), label)
    return forms


def _numbers_of(word: str) -> list[str]:
    """Spellings that the plural or singular of an English noun may have."""
    forms = [f"{word}s", f"{word}es", IRREGULAR.get(word, ""), SINGULAR.get(word, "")]
    for one, many in (("y", "ies"), ("f", "ves"), ("fe", "ves"), ("", "es"), ("", "s")):
        if one and word.endswith(one):
            forms.append(word.removesuffix(one) + many)
        if word.endswith(many) and not word.endswith("ss"):
            forms.append(word.removesuffix(many) + one)
    return [form for form in forms if len(form) > 2]


def _numbers(text: str) -> tuple[Box, float | None] | None:
    """A box of four finite numbers, and the confidence that a fifth is."""
    try:
        values = [float(part) for part in re.split(r"\s*[,;]\s*|\s+", text.strip())]
    except ValueError:
        return None
    if len(values) not in (4, 5) or not all(map(math.isfinite, values)):
        return None
    x1, y1, x2, y2, *confidence = values
    return (x1, y1, x2, y2), confidence[0] if confidence else None


def _masked(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with HIDDEN in place of the spans."""
    pieces, last = [], 0
    for start, end in spans:
        pieces += [text[last:start], HIDDEN * (end - start)]
        last = end
    return "".join((*pieces, text[last:]))


def _choice_text(choice: str) -> str:
    return re.sub(r"^\s*\([A-Z]\)\s*", "", choice)
