"""One thread that answers everybody: between two decoding steps it takes in who waits and lets go who left.

Requests come from the event loop; their text goes back to it. The model runs in this thread alone.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from octavius.model.decoder import Answer, Decoder, Options
from octavius.model.octavius import Octavius
from octavius.model.prompt import Prompt
from octavius.serve.limits import Limits, Refused

PREFILL = 1024  # padded prompt tokens that are read between two steps, so that nobody's answer stalls
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request on its way: its answer, and what has been made of it but not yet been fetched.

    A client that does not read leaves at most its answer's tokens in `pieces`, and keeps nobody waiting.
    """

    answer: Answer
    loop: asyncio.AbstractEventLoop
    deadline: float
    pieces: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    late: bool = False

    def give(self, text: str | None) -> None:
        """Hand over a piece, None at the end; called from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, text)
        except RuntimeError:  # the loop has ended, and the client with it
            self.answer.cancelled = True

    async def stream(self) -> AsyncIterator[str]:
        """The answer's pieces.

        Raises:
            Refused: the answer could not be made, or not in time.
        """
        try:
            while (piece := await self.pieces.get()) is not None:
                yield piece
        finally:
            self.answer.cancelled = True  # whoever stops reading early has left; a finished answer does not mind
        if self.late and not self.answer.tokens:
            raise Refused("no answer within the time limit: the server is busy; try again", 503, "timeout")
        if self.answer.finish == "error":
            raise Refused(self.answer.error, 500, "server_error")


class Engine:
    """A decoder, its thread, and the line before it.

    Args:
        model: no one else may use it while the engine runs.
        limits: rows, waiting and seconds count here.
    """

    def __init__(self, model: Octavius, limits: Limits):
        self.model, self.limits = model, limits
        self.decoder = Decoder(model, limits.rows, limits.context)
        self.waiting: deque[Ticket] = deque()
        self.running: dict[Answer, Ticket] = {}
        self.steps, self.tokens, self.answered = 0, 0, 0
        self._change, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="octavius-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; open answers end as errors."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, prompt: Prompt, options: Options) -> Ticket:
        """Stand in line; called on the event loop.

        Raises:
            Refused: the line is full.
            ValueError: the prompt or the options do not fit the model.
        """
        answer = self.decoder.open(prompt, options)
        ticket = Ticket(answer, asyncio.get_running_loop(), time.monotonic() + self.limits.seconds)
        with self._change:
            if len(self.waiting) >= self.limits.waiting:
                raise Refused(f"{self.limits.waiting} requests wait already; try again in a moment", 429, "rate_limit")
            if self._closed:
                raise Refused("the server is being shut down", 503, "server_error")
            self.waiting.append(ticket)
            self._change.notify()
        return ticket

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self.waiting or self.decoder.active or self._closed)
                if self._closed:
                    break
                entering = self._next()
            try:
                self._turn(entering)
            except Exception as error:  # the thread must outlive it: everybody else's answers depend on it
                log.exception("a decoding step failed")
                self.decoder.drop_all(f"the model failed: {error}")
                self._end([*self.running.values(), *(ticket for ticket in entering)], str(error))
        with self._change:
            left = [*self.running.values(), *self.waiting]
            self.waiting.clear()
        self.decoder.drop_all("the server was shut down")
        self._end(left, "the server was shut down")

    def _next(self) -> list[Ticket]:
        """Take from the line who can be read now: as many as fit, whoever is late or gone left out."""
        entering, longest = [], 0
        while self.waiting and len(entering) < self.decoder.free:
            ticket = self.waiting[0]
            longest = max(longest, len(ticket.answer.prompt))
            if entering and longest * (len(entering) + 1) > PREFILL:
                break
            self.waiting.popleft()
            ticket.late = time.monotonic() > ticket.deadline
            if ticket.late or ticket.answer.cancelled:
                ticket.answer.finish = "cancelled"
                ticket.give(None)
            else:
                entering.append(ticket)
        return entering

    def _turn(self, entering: list[Ticket]) -> None:
        self.running |= {ticket.answer: ticket for ticket in entering}
        now = time.monotonic()
        for ticket in self.running.values():
            if now > ticket.deadline:
                ticket.late = ticket.answer.cancelled = True
        gained = self.decoder.admit([ticket.answer for ticket in entering]) if entering else []
        gained += self.decoder.step()
        self.steps += 1
        for answer, text in gained:
            ticket = self.running.get(answer)
            if ticket is None:
                continue
            self.tokens += 1
            if text:
                ticket.give(text)
            if answer.finish is not None and self.running.pop(answer, None):
                self.answered += 1
                ticket.give(None)

    def _end(self, tickets: list[Ticket], error: str) -> None:
        for ticket in tickets:
            ticket.answer.finish, ticket.answer.error = "error", error
            ticket.give(None)
        self.running.clear()
