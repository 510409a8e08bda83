"""The server: the page, its samples, and the endpoint, behind one door."""

import hmac
import ipaddress
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavius.model.octavius import Octavius
from octavius.model.prompt import check_alike
from octavius.serve.endpoint import Endpoint, error_fields
from octavius.serve.engine import Engine
from octavius.serve.limits import Limits, Refused
from octavius.serve.samples import Sample, open_sample, read_samples
from octavius.serve.uploads import Uploads

STATIC = Path(__file__).parent / "static"
MAIN, SINGLE = "octavius", "octavius-single-lora"
COOKIE = "octavius_token"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Service:
    """What is served. single: a single LoRA of the same run; samples: of its test set; token: None on the loopback."""

    model: Octavius
    single: Octavius | None = None
    samples: list[Sample] = field(default_factory=list)
    token: str | None = None
    limits: Limits = field(default_factory=Limits)


def build_app(service: Service) -> Starlette:
    """The application; its engines start and end with it.

    Raises:
        ValueError: the two models do not see alike.
    """
    engines = {MAIN: Engine(service.model, service.limits)}
    if service.single is not None:
        check_alike(service.model, service.single)
        engines[SINGLE] = Engine(service.single, service.limits)
    uploads = Uploads(service.model, service.limits)
    endpoint = Endpoint(engines, uploads, service.limits)

    async def list_samples(request: Request) -> Response:
        return JSONResponse([sample.listed(index) for index, sample in enumerate(service.samples)])

    async def choose_sample(request: Request) -> Response:
        index = request.path_params["index"]
        upload = await run_in_threadpool(open_sample, service.samples, index, uploads)
        return JSONResponse(endpoint.described(upload))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for engine in engines.values():
            engine.start()
        yield
        for engine in engines.values():
            engine.close()

    routes = [
        *endpoint.routes(),
        Route("/samples", list_samples),
        Route("/samples/{index:int}", choose_sample, methods=["POST"]),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    handlers = {Refused: _refuse, ValueError: _refuse, HTTPException: _http}
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Door, token=service.token)],
        exception_handlers=handlers,  # type: ignore[arg-type]
    )


async def _refuse(request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, Refused) else Refused(str(error))
    headers = {"Retry-After": "2"} if refused.status in (429, 503) else None
    return JSONResponse({"error": error_fields(refused)}, refused.status, headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error_fields(Refused(error.detail, error.status_code))}, error.status_code)


class Door:
    """Lets in who may: the loopback's own names without a token, everybody else with it; no foreign page.

    A foreign page could reach a server on the loopback through its visitor's browser: such requests name the page's
    site in Sec-Fetch-Site or Origin, or, after rebinding a name, a Host that is not ours.
    """

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._check(request)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check(self, request: Request) -> Response | None:
        host = request.url.hostname or ""
        if request.headers.get("sec-fetch-site") == "cross-site" and request.method != "GET":
            return _closed("requests from other sites are not answered", 403)
        origin = request.headers.get("origin")
        if origin not in (None, "null") and origin.partition("//")[2] != request.headers.get("host"):
            return _closed("requests from other sites are not answered", 403)
        if self.token is None:
            if is_loopback(host):
                return None
            return _closed(f"Host must be the loopback's, got {host!r:.80}; serve with --host and a token instead", 403)
        if request.method == "GET" and _same(request.query_params.get("token", ""), self.token):
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")
        return None if _same(given, self.token) else _closed("a token is needed: open the address with ?token=...", 401)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _closed(message: str, status: int) -> Response:
    return JSONResponse({"error": error_fields(Refused(message, status, "permission_error"))}, status)


def is_loopback(host: str) -> bool:
    """Whether a host names this machine's loopback alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Address:
    """Where the server listens. token: of other addresses than the loopback; None draws one there."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None

    def checked(self) -> "Address":
        """The address with the token that it needs.

        Raises:
            ValueError: a token that can be guessed.
        """
        if self.token is not None and len(self.token) < 16:
            raise ValueError(f"a token must have at least 16 characters, got {len(self.token)}")
        if self.token is None and not is_loopback(self.host):
            return Address(self.host, self.port, secrets.token_urlsafe(24))
        return self

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/" + (f"?token={self.token}" if self.token else "")


def load_service(folder: Path, single: Path | None, token: str | None, limits: Limits) -> Service:
    """Load a run's model; the single LoRA and the samples of the same run are taken where they are.

    Args:
        folder: of the model, as training wrote it.
        single: of a single LoRA; None looks beside the model.
        token: who sends it is let in.
        limits: of the server.
    """
    beside = folder.parent / "lora/model"
    if single is None and (beside / "octavius.json").is_file():
        single = beside
    answers = folder.parent / "answers.jsonl"
    model = Octavius.from_folder(folder)
    other = None if single is None else Octavius.from_folder(single)
    return Service(model, other, read_samples(answers) if answers.is_file() else [], token, limits)


def run(service: Service, address: Address) -> None:
    """Serve until interrupted."""
    uvicorn.run(
        build_app(service),
        host=address.host,
        port=address.port,
        log_level="warning",
        limit_concurrency=4 * service.limits.waiting,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=5,
        server_header=False,
        ws="none",
    )
