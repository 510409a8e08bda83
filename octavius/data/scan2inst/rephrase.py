"""More phrasings of questions by a chat model: questions are rephrased, answers never touched.

A rephrased question is kept only if it still is one question and names what its source names (objects, numbers,
colours, sides); each keeps its source as `source_question`. The chat model is a local one, or any server that speaks
OpenAI's `/chat/completions`.
"""

import copy
import json
import re
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavius.data.scan2inst.relations import COLOURS

Ask = Callable[[str], str]

PROMPT = (
    "Rephrase this question in other words, so that it has the same answer. Keep the names of all objects. "
    "Write the new question only.\nQuestion: {}"
)
KEPT = {*COLOURS, "left", "right", "larger", "bigger", "corner", "color", "many", "number", "where"}
COMPARED = {"larger", "bigger", "size", "space"}
SAME = (
    {"over", "above", "top"},
    {"beneath", "below", "under", "underneath"},
    {"next", "beside", "close", "near", "neighbour", "adjacent"},
    COMPARED,
    {"many", "number", "count"},
    {"where", "side", "direction", "position", "located", "location"},
    {"color", "colour", "colored", "coloured"},
)
FIXED = KEPT.union(*SAME)
NEUTRAL = {"side", "position", "located", "location"}  # add nothing to a plainer word: "on the left side"
RELATIONS = {"left", "right"}.union(*SAME[:3])
REVERSED = {"smaller", "smallest", "less", "least", "not", "isn", "doesn", "never"}
LONGEST = 40  # words of a rephrased question


def local(model: str, max_new_tokens: int = 60) -> Ask:
    """A chat model of Hugging Face, by name or folder; greedy."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def ask(text: str) -> str:
        turns = [{"role": "user", "content": text}]
        made: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            out = llm.generate(**made, max_new_tokens=max_new_tokens, do_sample=False)
        return str(tokenizer.decode(out[0, made["input_ids"].shape[1] :], skip_special_tokens=True))

    return ask


def server(address: str, model: str, key: str = "", timeout: float = 60.0) -> Ask:
    """A server that speaks OpenAI's chat completions, such as http://localhost:8000/v1.

    Raises (when asked):
        ValueError: it cannot be reached, or answers something else.
    """

    def ask(text: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0.7}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{address.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{address}: no chat completion: {error}") from error

    return ask


def enrich(records: list[dict[str, Any]], ask: Ask, names: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """One rephrased copy of every record whose new question passes `keeps`.

    Args:
        records: of Scan2Inst, with one question each.
        names: of objects that questions may name.
    Returns:
        the new records alone, and how many were dropped.
    """
    known, made, dropped = tuple(names), [], 0
    for record in records:
        source = record["conversations"][0]["value"]
        question = clean(ask(PROMPT.format(source)))
        if not keeps(source, question, known):
            dropped += 1
            continue
        new = copy.deepcopy(record) | {"id": f"{record['id']}_enriched", "source_question": source}
        new["conversations"][0]["value"] = question
        made.append(new)
    return made, dropped


def clean(text: str) -> str:
    """The first line that asks something, without quotes or a leading label."""
    for line in text.strip().splitlines():
        line = re.sub(r"^\s*(?:[-*\d.)]+\s+)?(?:(?:new |rephrased )?question:)?\s*", "", line, flags=re.I).strip(
            " \"'*"
        )
        if line.endswith("?"):
            return line
    return ""


def keeps(source: str, question: str, names: Iterable[str]) -> bool:
    """The question is new, is one question of reasonable length, and names what its source does and nothing more.

    Words that fix the answer (sides, colours, what is asked for) must stay, or be replaced by a word of their own kind,
    and none may be added. Names keep their order. A single name stays what the relation is to ("left of the bed", not
    "left of what is the bed"), and of two names the same one stays what is looked from.
    """
    if not question or question.count("?") != 1 or len(question.split()) > LONGEST:
        return False
    if question.casefold() == source.casefold():
        return False
    forms = [{name, f"{name}s", f"{name}es", {"person": "people"}.get(name, name)} for name in names]
    places = [(_place(source, spelt), _place(question, spelt)) for spelt in forms]
    if any((old < 0) != (new < 0) for old, new in places):
        return False
    forms = [spelt for spelt, (old, _) in zip(forms, places, strict=True) if old >= 0]
    places = sorted(place for place in places if place[0] >= 0)
    order = [new for _, new in places]
    had, has = _words(source), _words(question)
    fixed = had & FIXED
    kinds = [next((group for group in SAME if word in group), {word}) for word in fixed - NEUTRAL or fixed]
    return (
        order == sorted(order)
        and all(has & kind for kind in kinds)
        and not has & REVERSED - had
        and not has & FIXED - NEUTRAL.union(had, *kinds)
        and (len(places) != 1 or _related_to(source, places[0][0]) in (None, _related_to(question, places[0][1])))
        and (len(places) != 2 or bool(had & COMPARED) or _seen_from(source, forms) == _seen_from(question, forms))
    )


def _related_to(text: str, place: int) -> bool | None:
    """Whether the relation, which "on" is where there is no other word, is to the name at `place`; None without one.

    It is not if the name comes first ("what is the bed left of"), or what is asked for stands between.
    """
    at = [_place(text, RELATIONS & _words(text)), _place(text, {"on"})]
    found = next((start for start in at if start >= 0), None)
    return None if found is None else found < place and not _words(text[found:place]) & {"what", "which"}


def _seen_from(text: str, forms: list[set[str]]) -> int | None:
    """The number of the name that stands behind "from" or "to", or, where none does, behind "of"."""
    for words in ("from|to", "of"):
        for number, spelt in enumerate(forms):
            names = "|".join(map(re.escape, spelt))
            if re.search(rf"\b(?:{words}) (?:the |an? )?(?:{names})\b", text.casefold()):
                return number
    return None


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.casefold()))


def _place(text: str, forms: set[str]) -> int:
    """Where one of the forms first stands in the text as a whole word; -1 if none does."""
    found = (re.search(rf"\b{re.escape(form)}\b", text.casefold()) for form in forms)
    return min((match.start() for match in found if match), default=-1)
