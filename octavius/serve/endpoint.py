"""The OpenAI-compatible endpoint: chat completions, models, files, health."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from octavius.evaluation.parsing import parse_boxes
from octavius.model.prompt import make_prompt
from octavius.serve.engine import Engine, Ticket
from octavius.serve.limits import Limits, Refused
from octavius.serve.requests import read_request
from octavius.serve.uploads import Upload, Uploads

NAMED = re.compile(r"([^\s\d\[\](),.;:!?][\w' -]{0,40}?)\s+(?:is\s+)?at\s*[\[(]")  # "A bird at [": what stands there
ARTICLES = re.compile(r"^(?:(?:there|is|are|and|an?|the|one)\s+)*", re.IGNORECASE)


class InMemoryParser(MultiPartParser):
    """Keeps uploads in memory: starlette would write those over a megabyte to a temporary file."""

    spool_max_size = 1 << 31


class Endpoint:
    """Routes of the endpoint.

    Args:
        engines: by the name that a request's `model` has; the first is the default.
        uploads: shared by all of them, since the models see alike.
        limits: stated by `/v1/models`.
    """

    def __init__(self, engines: dict[str, Engine], uploads: Uploads, limits: Limits):
        self.engines, self.uploads, self.limits = engines, uploads, limits
        self.created = int(time.time())
        self._reading = asyncio.Semaphore(4)  # bodies that are decoded at the same time
        self._bodies = 0

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/v1/files", self.send, methods=["POST"]),
            Route("/v1/files/{key}", self.file, methods=["GET", "DELETE"]),
            Route("/v1/files/{key}/content", self.content),
            Route("/health", self.health),
        ]

    async def health(self, request: Request) -> Response:
        """Whether every engine runs, and how much it has to do."""
        states = {
            name: {
                "alive": engine.alive,
                "running": len(engine.decoder.active),
                "waiting": len(engine.waiting),
                "steps": engine.steps,
                "tokens": engine.tokens,
                "answered": engine.answered,
            }
            for name, engine in self.engines.items()
        }
        good = all(state["alive"] for state in states.values())
        return JSONResponse({"status": "ok" if good else "failed", "engines": states}, 200 if good else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.engines]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._card(self._named(request.path_params["name"])))

    async def send(self, request: Request) -> Response:
        """Take one file, as multipart form: `file`, and `unit` of a cloud."""
        data, name, unit = await self._form(request)
        async with self._reading:
            upload = await run_in_threadpool(self.uploads.add, data, name, unit)
        return JSONResponse(self.described(upload))

    async def file(self, request: Request) -> Response:
        key = request.path_params["key"]
        if request.method == "DELETE":
            self.uploads.drop(key)
            return JSONResponse({"id": key, "object": "file", "deleted": True})
        return JSONResponse(self.described(self.uploads.get(key)))

    async def content(self, request: Request) -> Response:
        """What the page draws of a file: a JPEG, or a cloud's points (n, then float32 xyz, then uint8 rgb)."""
        upload = self.uploads.get(request.path_params["key"])
        kind = "image/jpeg" if upload.info["kind"] == "image" else "application/octet-stream"
        return Response(upload.view, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def chat(self, request: Request) -> Response:
        """Answer, in one piece or as server-sent events."""
        body = await self._json(request)
        async with self._reading:
            asked = await run_in_threadpool(read_request, body, self.uploads, self.limits)
        name = self._named(asked.model)
        engine = self.engines[name]
        prompt = await run_in_threadpool(make_prompt, engine.model, asked.turns, asked.task_type, asked.blind)
        ticket = engine.submit(prompt, asked.options)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if asked.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(
                _events(head, ticket, asked.usage), media_type="text/event-stream", headers=headers
            )
        text = await self._whole(request, ticket)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": _finish(ticket), "logprobs": None}
        full = head | {"object": "chat.completion", "choices": [choice], "usage": _usage(ticket)}
        return JSONResponse(full | {"octavius": about(ticket)})

    def described(self, upload: Upload) -> dict[str, Any]:
        """A file in OpenAI's form, with what the page needs under `octavius`."""
        fields = {"id": upload.id, "object": "file", "bytes": upload.size, "filename": upload.name}
        return fields | {
            "purpose": "vision",
            "created_at": self.created,
            "status": "processed",
            "octavius": upload.info,
        }

    async def _whole(self, request: Request, ticket: Ticket) -> str:
        """The whole answer; given up when the client leaves."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.2)
            ticket.answer.cancelled = True

        watching = asyncio.create_task(watch())
        try:
            return "".join([piece async for piece in ticket.stream()])
        finally:
            watching.cancel()

    def _named(self, name: str) -> str:
        name = name or next(iter(self.engines))
        if name not in self.engines:
            raise Refused(f"model must be one of {', '.join(self.engines)}, got {name!r:.80}", 404, "not_found")
        return name

    def _card(self, name: str) -> dict[str, Any]:
        settings = self.engines[name].model.settings
        about = {
            "llm": settings.llm.rsplit("/", 1)[-1],
            "images": settings.tower is not None,
            "clouds": settings.clouds is not None,
            "experts": settings.lora.num_experts,
            "top_k": settings.lora.top_k,
            "rank": settings.lora.rank,
            "limits": asdict(self.limits),
        }
        return {"id": name, "object": "model", "created": self.created, "owned_by": "octavius", "octavius": about}

    async def _json(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":  # what a foreign page may send without asking is of another type
            raise Refused(f"Content-Type must be application/json, got {kind!r:.80}", 415)
        data = b"".join([chunk async for chunk in self._bounded(request)])
        try:
            return await run_in_threadpool(json.loads, data)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body must be JSON: {error}") from error

    async def _form(self, request: Request) -> tuple[bytes, str, str]:
        try:
            parser = InMemoryParser(request.headers, self._bounded(request), max_files=1, max_fields=8)  # type: ignore[arg-type]
            form = await parser.parse()
        except (MultiPartException, KeyError, AssertionError) as error:
            raise Refused(f"the body must be a multipart form with one file: {error}") from error
        file = form.get("file")
        if file is None or isinstance(file, str):
            raise Refused("the form must have a file in its field `file`")
        data = await file.read()
        return data, file.filename or "file", str(form.get("unit") or "m")

    async def _bounded(self, request: Request) -> AsyncIterator[bytes]:
        """The body's chunks, within its limits of size and time; only so many bodies come in at once."""
        if self._bodies >= self.limits.waiting:
            raise Refused(f"{self.limits.waiting} requests are being read already; try again", 429, "rate_limit")
        self._bodies += 1
        size, stream = 0, request.stream()
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                async for chunk in stream:
                    size += len(chunk)
                    if size > self.limits.body_bytes:
                        raise Refused(f"a request may have {self.limits.body_bytes >> 20} MB, this one is larger", 413)
                    yield chunk
        except TimeoutError as error:
            raise Refused(f"the body must come within {self.limits.upload_seconds:.0f} s", 408, "timeout") from error
        except ClientDisconnect as error:
            raise HTTPException(499) from error
        finally:
            self._bodies -= 1


async def _events(head: dict[str, Any], ticket: Ticket, usage: bool) -> AsyncIterator[str]:
    """The answer as OpenAI's server-sent events; the last chunk carries the experts and the boxes."""

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': [choice]} | more)}\n\n"

    yield event({"role": "assistant", "content": ""})
    told = False
    try:
        async for piece in ticket.stream():
            yield event({"content": piece}, None, **({} if told else {"octavius": {"experts": _weights(ticket)}}))
            told = True
    except Refused as error:
        yield f"data: {json.dumps({'error': error_fields(error)})}\n\n"
        return
    yield event({}, _finish(ticket), octavius=about(ticket))
    if usage:
        full = head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(ticket)}
        yield f"data: {json.dumps(full)}\n\n"
    yield "data: [DONE]\n\n"


def about(ticket: Ticket) -> dict[str, Any]:
    """What stands beside an answer: the weight of every expert, boxes in fractions of the image, the time it took."""
    answer = ticket.answer
    seconds = answer.times.get("last", 0.0) - answer.times.get("first", 0.0)
    labels = [ARTICLES.sub("", match[1]) for match in NAMED.finditer(answer.text)]
    boxes = [{"label": label or "", "box": box} for label, box in parse_boxes(answer.text, [x for x in labels if x])]
    fields = {"experts": _weights(ticket), "boxes": boxes, "seconds": round(seconds, 3)}
    return fields | {"time_limit": True} if ticket.late else fields


def error_fields(error: Refused) -> dict[str, Any]:
    return {"message": str(error), "type": error.kind, "param": None, "code": error.status}


def _weights(ticket: Ticket) -> list[float]:
    weights = ticket.answer.weights
    return [] if weights is None else [round(weight, 5) for weight in weights.tolist()]


def _finish(ticket: Ticket) -> str:
    return "stop" if ticket.answer.finish == "stop" else "length"


def _usage(ticket: Ticket) -> dict[str, int]:
    read, made = len(ticket.answer.prompt), ticket.answer.tokens
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
