"""`octavius chat`: a conversation in a terminal, or line by line for scripts."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from octavius.session.conversation import Reply, Scan, Session

HELP = """\
/image FILE           show an image with the next question
/points FILE [UNIT]   show a point cloud or mesh; its unit is m (default), cm or mm
/experts gate         let the gate choose the experts (default)
/experts 2            this expert alone; 0=0.3,2=0.7 for several with weights; none for the frozen model
/blind on|off         answer from the text alone
/compare QUESTION     with the experts, with the single LoRA if one is loaded, and blind; the conversation stays
/new                  begin a new conversation
/help, /quit"""


class Terminal:
    """Reads questions and commands, writes answers.

    Args:
        session: the conversation.
        console: where text goes.
        as_json: write one JSON object a line instead.
    """

    def __init__(self, session: Session, console: Console, as_json: bool = False):
        self.session, self.console, self.as_json = session, console, as_json

    def run(self, lines: Iterable[str]) -> bool:
        """Answer line by line until /quit or the end; a mistake is told and the conversation goes on.

        Returns:
            whether every line could be done.
        """
        good = True
        for line in lines:
            text = line.strip()
            if text == "/quit":
                break
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self.ask(text)
            except (ValueError, OSError) as error:
                good = False
                self._tell({"error": " ".join(str(error).split())}, f"error: {error}", "bold red")
            except KeyboardInterrupt:  # the answer, not the conversation, is broken off
                self.console.print("\n(broken off)", style="dim")
        return good

    def ask(self, question: str) -> Reply:
        """Ask and write the answer: in pieces as it is made, or as JSON when it is whole."""
        for piece in self.session.ask(question):
            if not self.as_json:
                self.console.out(piece, end="", highlight=False)
                self.console.file.flush()
        reply = self.session.reply
        assert reply
        if not self.as_json:
            self.console.out("")
        self._tell({"question": question, **_fields(reply)}, _experts(reply), "dim")
        return reply

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "/image" if rest:
                self._show(Path(rest))
            case "/points" if rest:
                file, _, unit = rest.rpartition(" ")
                self._show(Scan(Path(file), unit) if unit in ("m", "cm", "mm") and file else Scan(Path(rest)))
            case "/experts" if rest:
                self.session.use_experts(parse_experts(rest))
                self._tell({"experts": rest}, f"experts: {rest}", "dim")
            case "/blind" if rest in ("on", "off"):
                self.session.blind = rest == "on"
                self._tell({"blind": self.session.blind}, f"blind: {rest}", "dim")
            case "/compare" if rest:
                replies = self.session.compare(rest)
                shown = "\n".join(f"{name}: {reply.text}" for name, reply in replies.items())
                self._tell({"question": rest, "compared": {n: _fields(r) for n, r in replies.items()}}, shown, "")
            case "/new":
                self.session.forget()
                self._tell({"new": True}, "a new conversation", "dim")
            case "/help":
                self._tell({"help": HELP}, HELP, "")
            case _:
                raise ValueError(f"a command must be one of those of /help, with what it needs; got {text!r}")

    def _show(self, source: Path | Scan) -> None:
        self.session.show(source)
        file = source.file if isinstance(source, Scan) else source
        self._tell({"shown": str(file)}, f"the next question shows {file}", "dim")

    def _tell(self, fields: dict[str, Any], text: str, style: str) -> None:
        if self.as_json:
            self.console.out(json.dumps(fields), highlight=False)
        else:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def parse_experts(text: str) -> dict[int, float] | None:
    """Experts as a user writes them: "gate" → None, "none" → {}, "2" → {2: 1}, "0=0.3,2=0.7" → {0: 0.3, 2: 0.7}.

    Raises:
        ValueError: another text.
    """
    if text == "gate":
        return None
    if text == "none":
        return {}
    experts: dict[int, float] = {}
    try:
        for part in text.split(","):
            number, _, weight = part.partition("=")
            experts[int(number)] = float(weight or 1)
    except ValueError as error:
        raise ValueError(f"experts must be gate, none, a number, or number=weight,...; got {text!r}") from error
    return experts


def typed_lines(console: Console) -> Iterator[str]:
    """Lines that a user types, each after a prompt, until the end of input."""
    import readline  # noqa: F401  gives input() its history and editing

    while True:
        try:
            yield console.input("[bold]>[/] ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n/quit ends", style="dim")


def lines(console: Console) -> Iterable[str]:
    """Questions from the terminal, or from a pipe."""
    return typed_lines(console) if sys.stdin.isatty() else sys.stdin


def _fields(reply: Reply) -> dict[str, Any]:
    experts = [[expert, round(weight, 4)] for expert, weight in reply.experts]
    return {"answer": reply.text, "experts": experts, "finish": reply.finish, "tokens": reply.tokens}


def _experts(reply: Reply) -> str:
    return "experts: " + (", ".join(f"{expert} ({weight:.2f})" for expert, weight in reply.experts) or "none")
