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

from octavius.facts import COLOURS

Ask = Callable[[str], str]

PROMPT = (
    "Rephrase this question in other words, so that it has the same answer. Keep the names of all objects. "
    "Write the new question only.\nQuestion: {}"
)
KEPT = {*COLOURS, "left", "right", "larger", "bigger", "corner", "color", "many", "number", "where"}
SAME = (
    {"over", "above", "top"},
    {"beneath", "below", "under", "underneath", "on"},
    {"next", "beside", "close", "near", "neighbour", "adjacent"},
    {"larger", "bigger", "size", "space"},
    {"many", "number", "count"},
    {"where", "side", "direction", "position", "located", "location"},
    {"color", "colour", "colored", "coloured"},
)
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

    Words that fix the answer (sides, colours, what is asked for) must stay, or be replaced by a word of their own kind.
    """
    if not question or question.count("?") != 1 or len(question.split()) > LONGEST:
        return False
    if question.casefold() == source.casefold():
        return False
    had, has = _words(source), _words(question)
    forms = {name: {name, f"{name}s", f"{name}es", {"person": "people"}.get(name, name)} for name in names}
    for spelt in forms.values():
        if _says(source, spelt) != _says(question, spelt):
            return False
    for word in had & KEPT | {word for group in SAME for word in group if word in had}:
        same = next((group for group in SAME if word in group), {word})
        if not has & same:
            return False
    opposite = {"left": "right", "right": "left"}
    return not any(word in had and other in has and other not in had for word, other in opposite.items())


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.casefold()))


def _says(text: str, forms: set[str]) -> bool:
    return any(re.search(rf"\b{re.escape(form)}\b", text.casefold()) for form in forms)
