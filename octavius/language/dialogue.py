"""A conversation that goes on: several questions, each of which may show images and point clouds.

The format is that of training (`octavius.language.prompts`); with one question about one image or cloud the ids are the
same. The gate reads the question that is being answered, so that each answer has experts of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from octavius.language.prompts import SYSTEM, ConversationFormat

STOP = "\n###"  # begins the next speaker's turn
BROKEN = "\ufffd"  # stands for bytes of a character that is not whole yet


@dataclass(frozen=True)
class Turn:
    """A question, the answer it got (None for the last, open one), and how many images and clouds it shows."""

    question: str
    answer: str | None = None
    images: int = 0
    clouds: int = 0


def encode_dialogue(
    conversation: ConversationFormat, turns: Sequence[Turn], task_type: str, image_tokens: int, cloud_tokens: int
) -> tuple[list[int], list[int]]:
    """Encode turns, the last without an answer, as a prompt.

    Args:
        conversation: the format.
        turns: at least one.
        task_type: one of `SYSTEM`'s keys.
        image_tokens, cloud_tokens: P and Q, tokens of one image and of one cloud.

    Returns:
        the ids [L], and [L] ones on what the gate reads.

    Raises:
        ValueError: an unknown task type.
    """
    if task_type not in SYSTEM:
        raise ValueError(f"task_type must be one of {', '.join(SYSTEM)}, got {task_type!r}")
    image = [conversation.image_start, *[conversation.image_token] * image_tokens, conversation.image_end]
    cloud = [conversation.cloud_start, *[conversation.cloud_token] * cloud_tokens, conversation.cloud_end]
    ids, gate = list(conversation.bos), [0] * len(conversation.bos)

    def add(tokens: list[int], read: bool = False) -> None:
        ids.extend(tokens)
        gate.extend([int(read)] * len(tokens))

    if conversation.system:
        add(conversation.tokens(SYSTEM[task_type] + "\n\n"), read=conversation.gate_system)
    for number, turn in enumerate(turns):
        add(conversation.tokens("\n### Human:" if number else "### Human:"))
        add(image * turn.images + cloud * turn.clouds)
        add(conversation.tokens(f" {turn.question.strip()}"), read=number == len(turns) - 1)
        add(conversation.tokens("\n### Assistant:"))
        if turn.answer is not None:
            add([*conversation.tokens(f" {turn.answer.strip()}"), conversation.eos])
    return ids, gate


class TextStream:
    """Text of an answer that grows token by token; what it gives is never taken back.

    Args:
        conversation: decodes.
        stop: texts that end the answer, beside the next speaker's turn; they are not part of it.
    """

    def __init__(self, conversation: ConversationFormat, stop: Sequence[str] = ()):
        self.conversation, self.stops = conversation, (STOP, *stop)
        self.ids: list[int] = []
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now, "" while a character or a stop may be incomplete."""
        self.ids.append(token)
        raw = self.conversation.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        ends = [raw.find(stop) for stop in self.stops if stop in raw]
        if ends:
            self.stopped = True
            return self._give(raw[: min(ends)])
        held = max((n for stop in self.stops for n in range(1, len(stop)) if raw.endswith(stop[:n])), default=0)
        return self._give(raw[: len(raw) - held].rstrip(BROKEN))

    def close(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        return self._give(self.conversation.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip())

    def _give(self, text: str) -> str:
        text = text.rstrip()
        if len(text) <= len(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new
