"""Bounds of one server, all of them; the page and `/v1/models` state them."""

from dataclasses import dataclass


class Refused(ValueError):
    """A request that is refused. status: of the HTTP answer; kind: the error's type in OpenAI's form."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    upload_bytes: of one image or cloud; body_bytes: of one request, with what it carries inline.
    pixels, points: of one image and one cloud, looked at before they are decoded where the format allows it.
    kept_bytes, kept_files: of uploads that are kept in memory; the oldest goes first.
    characters: of one conversation's text; turns: of it; shown: images and clouds in it.
    max_tokens: of one answer; context: tokens of a conversation with its answer.
    rows: answers that are made at the same time; waiting: requests that wait beside them.
    seconds: until an answer must be done, waiting included; upload_seconds: until a request's body must have come.
    """

    upload_bytes: int = 32 << 20
    body_bytes: int = 48 << 20
    pixels: int = 64_000_000
    points: int = 2_000_000
    kept_bytes: int = 256 << 20
    kept_files: int = 128
    characters: int = 16_000
    turns: int = 32
    shown: int = 8
    max_tokens: int = 512
    context: int = 2048
    rows: int = 32
    waiting: int = 64
    seconds: float = 120.0
    upload_seconds: float = 60.0
