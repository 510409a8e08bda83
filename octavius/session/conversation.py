"""A conversation with one loaded model: a history of turns with images and point clouds, answers that stream."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavius.inputs.images import open_image
from octavius.model.decoder import Answer, Decoder, Options
from octavius.model.octavius import Octavius
from octavius.model.prompt import Exchange, Seen, SeenCloud, check_alike, make_prompt, see_cloud, see_image
from octavius.points.cloud import UNITS, read_cloud
from octavius.points.proposals import Boxes, boxes_within
from octavius.points.render import render


@dataclass(frozen=True)
class Scan:
    """A point cloud to ask about: its file, the unit of its points and boxes, its boxes (None: proposals).

    draw: an image file that receives the cloud, the boxes and the attention they got.
    """

    file: Path
    unit: str = "m"
    boxes: Boxes | None = None
    draw: Path | None = None


@dataclass(frozen=True)
class Reply:
    """An answer. experts: (expert, weight) of those that gave it, heaviest first; finish: "stop" or "length"."""

    text: str
    experts: list[tuple[int, float]]
    finish: str
    tokens: int


@dataclass
class Session:
    """One model, one conversation.

    Args:
        model: loaded once; all questions use it.
        options: how answers are made, its experts too.
        task_type: of models that were trained with system messages.
        blind: answer from the text alone.
        single: a single LoRA's model; `compare` asks it the same.
    """

    model: Octavius
    options: Options = field(default_factory=Options)
    task_type: str = "normal"
    blind: bool = False
    single: Octavius | None = None
    history: list[Exchange] = field(default_factory=list, init=False)
    reply: Reply | None = field(default=None, init=False)
    _sources: list[Path | Scan] = field(default_factory=list, init=False)  # shown by the next question

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.model, rows=1)
        if self.single is not None:
            check_alike(self.model, self.single)

    def show(self, source: Path | str | Scan) -> None:
        """Add an image or a point cloud to the next question.

        Raises:
            ValueError: it cannot be read, or the model does not read such.
        """
        source = Path(source) if isinstance(source, str) else source
        see(self.model, source)
        self._sources.append(source)

    def forget(self) -> None:
        """Begin a new conversation."""
        self.history, self._sources = [], []

    def ask(self, question: str) -> Iterator[str]:
        """Ask; yields the answer in pieces as it is made, then `reply` has it whole and the history goes on.

        Raises:
            ValueError: an empty question, a conversation that is too long, or options that do not fit the model.
        """
        seen = tuple(see(self.model, source) for source in self._sources)
        turns = [*self.history, Exchange(question, seen)]
        answer = self._decoder.open(make_prompt(self.model, turns, self.task_type, self.blind), self.options)
        yield from stream(self._decoder, answer)
        self.reply = reply_of(answer)
        self.history.append(replace(turns[-1], answer=answer.text))
        self._sources = []

    def say(self, question: str) -> Reply:
        """Ask, and wait for the whole answer."""
        for _ in self.ask(question):
            pass
        assert self.reply
        return self.reply

    def compare(self, question: str) -> dict[str, Reply]:
        """Answer with the experts, with the single LoRA (if there is one) and blind; the history does not go on."""
        seen = tuple(see(self.model, source) for source in self._sources)
        turns = [*self.history, Exchange(question, seen)]
        columns = {"experts": (self.model, False), "single LoRA": (self.single, False), "blind": (self.model, True)}
        replies = {}
        for name, (model, blind) in columns.items():
            if model is None:
                continue
            own = self.options if model is self.model else replace(self.options, experts=None)
            decoder = Decoder(model, rows=1)
            answer = decoder.open(make_prompt(model, turns, self.task_type, blind), own)
            for _ in stream(decoder, answer):
                pass
            replies[name] = reply_of(answer)
        return replies

    def use_experts(self, experts: Mapping[int, float] | None) -> None:
        """Answer with these experts from now on; {} for none, None for the gate's choice."""
        options = replace(self.options, experts=experts)
        options.check(self.model.settings.lora.num_experts)
        self.options = options


def stream(decoder: Decoder, answer: Answer) -> Iterator[str]:
    """Pieces of one answer, alone in a decoder.

    Raises:
        ValueError: the model could not answer.
    """
    try:
        pieces = decoder.admit([answer])
        while True:
            yield from (text for _, text in pieces if text)
            if answer.finish is not None:
                break
            pieces = decoder.step()
    finally:
        decoder.active.clear()  # the caller may stop in the middle
    if answer.finish == "error":
        raise ValueError(answer.error)


def see(model: Octavius, source: Path | Scan) -> Seen:
    """Read and encode a file.

    Raises:
        ValueError: it cannot be read, or the model does not read such.
    """
    if isinstance(source, Scan):
        return _see_scan(model, source)
    if model.tower[0] is None:
        raise ValueError("this model reads point clouds alone: it was trained without model.tower")
    try:
        return see_image(model, open_image(source))
    except ValueError as error:
        raise ValueError(f"image must be a readable image, got {error}") from error


def _see_scan(model: Octavius, scan: Scan) -> SeenCloud:
    cloud, boxes = read_cloud(scan.file, scan.unit), scan.boxes
    if boxes is None and scan.file.suffix == ".npz":
        boxes = boxes_within(scan.file)
    if boxes is not None:
        boxes = Boxes(boxes.boxes * UNITS[scan.unit], boxes.names)
    seen = see_cloud(model, cloud, boxes)
    if scan.draw:
        labels = [f"{100 * share:.0f}" for share in seen.attention.tolist()]
        scan.draw.parent.mkdir(parents=True, exist_ok=True)
        render(cloud, 480, yaw=20.0, pitch=40.0, boxes=seen.boxes.numpy(), labels=labels, dot=2).save(scan.draw)
    return seen


def reply_of(answer: Answer) -> Reply:
    """The whole of a finished answer."""
    assert answer.weights is not None and answer.finish
    used = [(expert, weight) for expert, weight in enumerate(answer.weights.tolist()) if weight > 0]
    return Reply(answer.text, sorted(used, key=lambda pair: -pair[1]), answer.finish, answer.tokens)


def chat(
    model: Octavius, seen: Path | Scan, question: str, task_type: str = "normal", max_new_tokens: int = 128
) -> tuple[str, list[tuple[int, float]]]:
    """Ask one question about an image or a point cloud.

    Returns:
        the answer, and (expert, weight) of the experts that gave it, heaviest first.

    Raises:
        ValueError: the image or the cloud cannot be read, or the model does not read such.
    """
    session = Session(model, Options(max_tokens=max_new_tokens), task_type)
    session.show(seen)
    reply = session.say(question)
    return reply.text, reply.experts
