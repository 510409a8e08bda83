"""A chat request in OpenAI's form, as what the model is asked.

    {"model", "messages": [{"role": "user", "content": text or parts}, {"role": "assistant", "content": text}, ...],
     "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}

Parts of a user's content: {"type": "text"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
{"type": "file", "file": {"file_id"} or {"filename", "file_data": "data:...;base64,..."}} for a file that was sent
before, or an image or point cloud inline. An address is never fetched. Ours beside them: "experts" ("gate", "none", or
{"0": 0.3, "2": 0.7}), "blind" (true: the text alone), "task_type".
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from octavius.language.prompts import SYSTEM
from octavius.model.decoder import Options
from octavius.model.prompt import Exchange, Seen
from octavius.serve.limits import Limits, Refused
from octavius.serve.uploads import Uploads

IGNORED = ("user", "metadata", "store", "n", "presence_penalty", "frequency_penalty", "logprobs")
KNOWN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream")
KNOWN += ("stream_options", "experts", "blind", "task_type", *IGNORED)


@dataclass(frozen=True)
class ChatRequest:
    """A checked request. turns: the last is open; usage: the stream ends with the counts of tokens."""

    model: str
    turns: list[Exchange]
    options: Options
    blind: bool
    task_type: str
    stream: bool
    usage: bool


def read_request(body: Any, uploads: Uploads, limits: Limits) -> ChatRequest:
    """Check a parsed JSON body; runs in a worker thread, since it encodes images and clouds.

    Raises:
        Refused: what must hold, and what it got.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body must be a JSON object, got {type(body).__name__}")
    for key in body:
        if key not in KNOWN:
            raise Refused(f"{key!r:.80} is no field of a chat request; known are {', '.join(KNOWN)}")
    if body.get("n") not in (None, 1):
        raise Refused(f"n must be 1, got {body['n']!r:.80}")
    turns = _turns(body.get("messages"), uploads, limits)
    task_type = _typed(body, "task_type", str, "normal")
    if task_type not in SYSTEM:
        raise Refused(f"task_type must be one of {', '.join(SYSTEM)}, got {task_type!r:.80}")
    stream_options = _typed(body, "stream_options", dict, {})
    return ChatRequest(
        _typed(body, "model", str, ""),
        turns,
        _options(body, limits),
        _typed(body, "blind", bool, False),
        task_type,
        _typed(body, "stream", bool, False),
        stream_options.get("include_usage") is True,
    )


def _options(body: dict[str, Any], limits: Limits) -> Options:
    most = _typed(body, "max_completion_tokens", int, None) or _typed(body, "max_tokens", int, 128)
    if not 1 <= most <= limits.max_tokens:
        raise Refused(f"max_tokens must be in 1..{limits.max_tokens}, got {most}")
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise Refused("stop must be a text or a list of texts")
    return Options(
        most,
        float(_typed(body, "temperature", float, 0.0)),
        float(_typed(body, "top_p", float, 1.0)),
        _typed(body, "seed", int, None),
        tuple(stop),
        _experts(body.get("experts")),
    )


def _experts(value: Any) -> dict[int, float] | None:
    if value in (None, "gate"):
        return None
    if value == "none":
        return {}
    if not isinstance(value, dict) or len(value) > 1024:
        raise Refused(f'experts must be "gate", "none" or an object like {{"0": 0.5}}, got {value!r:.80}')
    try:
        return {int(expert): float(weight) for expert, weight in value.items()}
    except (TypeError, ValueError) as error:
        raise Refused(f"experts must map numbers to weights: {error}") from error


def _typed(body: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{key} must be {kind.__name__}, got {value!r:.80}")
    return value


def _turns(messages: Any, uploads: Uploads, limits: Limits) -> list[Exchange]:
    """User and assistant in turn; a system message may come first and is read with the first question."""
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message")
    if len(messages) > 2 * limits.turns:
        raise Refused(f"a conversation may have {limits.turns} turns, got {len(messages)} messages", 413)
    system, open_turn, turns = "", None, []
    counted = {"characters": 0, "shown": 0}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer") and index == 0:
            system, _ = _content(message.get("content"), where, uploads, limits, counted)
        elif role == "user" and open_turn is None:
            text, seen = _content(message.get("content"), where, uploads, limits, counted)
            open_turn = Exchange(f"{system}\n{text}".strip() if system and not turns else text, seen)
        elif role == "assistant" and open_turn is not None:
            answer, seen = _content(message.get("content"), where, uploads, limits, counted)
            if seen:
                raise Refused(f"{where}: an assistant's message must be text")
            turns.append(Exchange(open_turn.question, open_turn.seen, answer))
            open_turn = None
        else:
            raise Refused(f"{where}: user and assistant must take turns, the user first; got role {role!r:.40}")
    if open_turn is None:
        raise Refused("the last message must be the user's")
    if not open_turn.question.strip():
        raise Refused("question must be a text, got an empty one")
    return [*turns, open_turn]


def _content(
    content: Any, where: str, uploads: Uploads, limits: Limits, counted: dict[str, int]
) -> tuple[str, tuple[Seen, ...]]:
    """Text and what is shown of one message."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Refused(f"{where}: content must be a text or a list of parts")
    texts, seen = [], []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            counted["characters"] += len(part["text"])
            if counted["characters"] > limits.characters:
                raise Refused(f"a conversation may have {limits.characters} characters of text", 413)
        elif kind in ("image_url", "file"):
            counted["shown"] += 1
            if counted["shown"] > limits.shown:
                raise Refused(f"a conversation may show {limits.shown} images and clouds", 413)
            seen.append(_shown(part.get(kind), kind, where, uploads, limits))
        else:
            raise Refused(f"{where}: a part must be text, image_url or file, with what it needs; got {kind!r:.40}")
    return "\n".join(texts), tuple(seen)


def _shown(value: Any, kind: str, where: str, uploads: Uploads, limits: Limits) -> Seen:
    if not isinstance(value, dict):
        raise Refused(f"{where}: {kind} must be an object")
    if kind == "file" and isinstance(value.get("file_id"), str):
        return uploads.get(value["file_id"]).seen
    name = "image" if kind == "image_url" else value.get("filename")
    data = value.get("url") if kind == "image_url" else value.get("file_data")
    if not isinstance(name, str) or not isinstance(data, str):
        raise Refused(f"{where}: a file must have file_id, or filename and file_data")
    header, comma, coded = data.partition(",")
    if not comma or not header.startswith("data:") or not header.endswith(";base64"):
        raise Refused(f"{where}: must be a data: URL in base64 (addresses are not fetched), got {data!r:.40}")
    if len(coded) > 4 * limits.upload_bytes // 3 + 4:
        raise Refused(f"a file may have {limits.upload_bytes >> 20} MB, this one is larger", 413)
    try:
        raw = base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{where}: not base64: {error}") from error
    return uploads.add(raw, name).seen
