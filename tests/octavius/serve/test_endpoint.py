"""The endpoint with a real tiny model: OpenAI's form, streaming, many at once, and those who behave badly."""

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from octavius.model.decoder import Decoder, Options
from octavius.model.prompt import Exchange, make_prompt, see_image
from octavius.serve.app import MAIN, SINGLE, Address, Service, build_app
from octavius.serve.limits import Limits
from octavius.serve.samples import read_samples
from tests.support import clouds

LIMITS = Limits(rows=8, waiting=40, max_tokens=64, upload_bytes=4 << 20, body_bytes=6 << 20, seconds=60)
BASE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return clouds.save_clouds(tmp_path_factory.mktemp("clouds"))


@pytest.fixture(scope="module")
def samples(parts, root, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "answers.jsonl"
    image = {"id": "c1", "benchmark": "classification", "image": str(parts.data.parent / "1.png"), "answer": "x"}
    cloud = {"id": "q2", "benchmark": "vqa3d", "pcl": str(root / "clouds/2.npz"), "answer": "x", "object": 11}
    gone = image | {"id": "gone", "image": "/no/such.png"}
    rows = [row | {"question": "What is it?", "reference": "green", "experts": []} for row in (image, gone, cloud)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(file)


@pytest.fixture(scope="module")
def model(parts, root):
    return clouds.make(parts, root)


@pytest.fixture(scope="module")
def client(model, parts, root, samples):
    single = clouds.make(parts, root, seed=4)
    with TestClient(build_app(Service(model, single, samples, None, LIMITS)), base_url=BASE) as client:
        yield client


@pytest.fixture(scope="module")
def live(model, samples):
    """The same on a real socket, for clients that are not starlette's."""
    config = uvicorn.Config(build_app(Service(model, None, samples, None, LIMITS)), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def data_url(file):
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def image_part(file):
    return {"type": "image_url", "image_url": {"url": data_url(file)}}


def ask(text, *parts, **more):
    content = [*parts, {"type": "text", "text": text}]
    return {"model": MAIN, "messages": [{"role": "user", "content": content}], "max_tokens": 12} | more


def said(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def alone(model, parts, number, question, options):
    image = see_image(model, Image.open(parts.data.parent / f"{number}.png"))
    decoder = Decoder(model)
    answer = decoder.open(make_prompt(model, [Exchange(question, (image,))]), options)
    decoder.admit([answer])
    while decoder.active:
        decoder.step()
    return answer


def test_answer_is_the_models(client, model, parts):
    expected = alone(model, parts, 1, "What colour is it?", Options(12))
    answer = client.post(
        "/v1/chat/completions", json=ask("What colour is it?", image_part(parts.data.parent / "1.png"))
    )
    assert said(answer) == expected.text
    body = answer.json()
    assert body["octavius"]["experts"] == pytest.approx(expected.weights.tolist(), abs=1e-4)
    assert body["usage"]["completion_tokens"] == expected.tokens
    assert body["usage"]["prompt_tokens"] == len(expected.prompt)


def test_openai_client_streams_images_and_clouds(live, model, parts, root):
    """A client of another maker: models, files, images inline, clouds by id and inline, streaming with usage."""
    maker = openai.OpenAI(base_url=f"{BASE}:{live}/v1", api_key="none", max_retries=0)
    assert [card.id for card in maker.models.list()] == [MAIN]
    sent = maker.files.create(file=root / "clouds/2.npz", purpose="vision")
    cloud = {"type": "file", "file": {"file_id": sent.id}}
    coded = "data:application/octet-stream;base64," + base64.b64encode((root / "clouds/2.npz").read_bytes()).decode()
    inline = {"type": "file", "file": {"filename": "2.npz", "file_data": coded}}
    texts = []
    for part in (cloud, inline, image_part(parts.data.parent / "0.png")):
        stream = maker.chat.completions.create(
            **ask("What is left?", part), stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
        assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason in ("stop", "length")
        assert sum(chunk.choices != [] and bool(chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert texts[0] == texts[1] != texts[2]
    whole = maker.chat.completions.create(**ask("What is left?", cloud))
    assert whole.choices[0].message.content == texts[0]
    with pytest.raises(openai.NotFoundError, match="model must be one of"):
        maker.chat.completions.create(**ask("What?") | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError, match="addresses are not fetched"):
        maker.chat.completions.create(
            **ask("What?", {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}})
        )


def test_many_mixtures_at_once_get_what_they_get_alone(client, model, parts):
    """24 requests with 24 mixtures over 8 rows: the texts are those of each request alone."""
    rng = np.random.default_rng(0)
    mixtures = [{0: w, 3: 1 - w} if i % 2 else {1: w, 2: 1 - w} for i, w in enumerate(rng.random(24).tolist())]
    expected = [
        alone(model, parts, i % 5, "What colour is it?", Options(10 + i % 7, experts=mixture)).text
        for i, mixture in enumerate(mixtures)
    ]
    got = [""] * 24

    def one(i):
        experts = {str(e): w for e, w in mixtures[i].items()}
        body = ask("What colour is it?", image_part(parts.data.parent / f"{i % 5}.png"), experts=experts)
        got[i] = said(client.post("/v1/chat/completions", json=body | {"max_tokens": 10 + i % 7}))

    before = client.get("/health").json()["engines"][MAIN]
    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = client.get("/health").json()["engines"][MAIN]
    assert got == expected and len(set(expected)) > 12
    steps, tokens = after["steps"] - before["steps"], after["tokens"] - before["tokens"]
    assert tokens > 2 * steps  # they did share steps


def test_experts_blind_single_and_history_change_the_answer(client, parts):
    image = image_part(parts.data.parent / "2.png")
    bodies = {
        "gate": ask("What colour is it?", image),
        "one": ask("What colour is it?", image, experts={"1": 1}),
        "none": ask("What colour is it?", image, experts="none"),
        "blind": ask("What colour is it?", image, blind=True),
        "single": ask("What colour is it?", image, model=SINGLE),
    }
    bodies["later"] = {
        **bodies["gate"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            *bodies["gate"]["messages"],
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "What colour is it?"},
        ],
    }
    answers = {name: client.post("/v1/chat/completions", json=body) for name, body in bodies.items()}
    assert len({said(answer) for answer in answers.values()}) == 6
    assert answers["one"].json()["octavius"]["experts"] == [0, 1, 0, 0]
    assert answers["none"].json()["octavius"]["experts"] == [0, 0, 0, 0]
    assert sum(answers["gate"].json()["octavius"]["experts"]) == pytest.approx(1, abs=1e-3)


def test_samples_bring_their_file_and_reference(client):
    listed = client.get("/samples").json()
    assert [(row["id"], row["kind"], row["reference"]) for row in listed] == [
        *(("c1", "image", "green"), ("q2", "cloud", "green"))
    ]
    cloud = client.post("/samples/1").json()
    assert len(cloud["octavius"]["objects"]) == 1  # the sample's own object alone
    points = client.get(f"/v1/files/{cloud['id']}/content").content
    (count,) = struct.unpack("<I", points[:4])
    assert count == cloud["octavius"]["points"] == 150 and len(points) == 4 + 15 * count
    assert client.post("/samples/7").status_code == 404


def test_upload_is_described_kept_and_forgotten(client, parts, root):
    file = parts.data.parent / "3.png"
    sent = client.post("/v1/files", files={"file": ("3.png", file.read_bytes())}).json()
    assert (sent["octavius"]["width"], sent["octavius"]["height"]) == Image.open(file).size
    shown = client.get(f"/v1/files/{sent['id']}/content")
    assert shown.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(shown.content)).format == "JPEG"
    assert client.delete(f"/v1/files/{sent['id']}").json()["deleted"]
    assert client.get(f"/v1/files/{sent['id']}").status_code == 404
    cloud = client.post("/v1/files", files={"file": ("2.npz", (root / "clouds/2.npz").read_bytes())}).json()
    assert sum(thing["attention"] for thing in cloud["octavius"]["objects"]) == pytest.approx(1, abs=1e-3)


def test_image_is_turned_as_its_camera_says(client, model):
    """EXIF orientation 6: the file's left half is the image's top."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("blue", (0, 0, 20, 20))
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(data, "JPEG", exif=exif, quality=95)
    sent = client.post("/v1/files", files={"file": ("a.jpg", data.getvalue())}).json()
    shown = Image.open(io.BytesIO(client.get(f"/v1/files/{sent['id']}/content").content))
    assert shown.size == (20, 40) and shown.getpixel((10, 8))[2] > 200 > shown.getpixel((10, 8))[0]


def bomb(width, height):
    """A tiny PNG whose header promises width × height pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def array_bomb():
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)})
    return out.getvalue()


def zip_bomb():
    out = io.BytesIO()
    np.savez_compressed(out, xyz=np.zeros((12_000_000, 3), np.float32))
    return out.getvalue()


BAD_FILES = {
    "megapixels": ("big.png", lambda: bomb(20_000, 10_000), 413, "may have 64 megapixels, this one has more"),
    "pixels": ("big.png", lambda: bomb(10_000, 8_000), 413, "may have 64 megapixels, this one has 80 (10000 by 8000)"),
    "broken": ("broken.png", lambda: b"\x89PNG\r\n\x1a\n nonsense", 400, "cannot be read as an image"),
    "cut": ("cut.png", lambda: bomb(100, 100), 400, "cannot be read as an image"),
    "text": ("notes.txt", lambda: b"hello", 400, "cannot be read as an image"),
    "svg": ("a.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "cannot be read as an image"),
    "eps": ("a.eps", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, "cannot be read as an image"),
    "large": ("large.png", lambda: bytes(5 << 20), 413, "a file may have 4 MB"),
    "huge": ("huge.png", lambda: bytes(7 << 20), 413, "a request may have 6 MB"),
    "header": ("a.npy", array_bomb, 400, "its header claims"),
    "zip": ("a.npz", zip_bomb, 413, "may unpack to"),
    "pickle": ("a.npy", lambda: npy(np.array([{}], object)), 400, "cannot be read as a point"),
    "ply": (
        "a.ply",
        lambda: b"ply\nformat ascii 1.0\nelement vertex 9\nend_header\n",
        400,
        "cannot be read as a point",
    ),
    "empty": ("a.ply", lambda: b"", 400, "cannot be read as a point"),
    "millimetres": ("mm.npy", lambda: npy(np.random.rand(50, 3) * 1e4), 400, "must be in metres"),
}


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_gives_a_sentence(client, name):
    file, data, status, message = BAD_FILES[name]
    answer = client.post("/v1/files", files={"file": (file, data())})
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text


DEEP = "[" * 100_000 + "]" * 100_000
BAD_BODIES = {
    "nonsense": (b"\xff" * (1 << 20), 400, "must be JSON"),
    "deep": (DEEP.encode(), 400, "must be JSON"),
    "list": (b"[]", 400, "must be a JSON object"),
    "field": (b'{"messages": [], "modle": 1}', 400, "'modle' is no field"),
    "empty": (b'{"messages": []}', 400, "at least one message"),
    "role": (b'{"messages": [{"role": "assistant", "content": "x"}]}', 400, "must take turns"),
    "part": (b'{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', 400, "a part must be"),
    "null": (b'{"messages": [{"role": "user", "content": null}]}', 400, "content must be"),
    "long": (json.dumps(ask("x" * 20_000)).encode(), 413, "16000 characters"),
    "tokens": (json.dumps(ask("x", max_tokens=10**9)).encode(), 400, "max_tokens must be in 1..64"),
    "heat": (json.dumps(ask("x", temperature="hot")).encode(), 400, "temperature must be float"),
    "nan": (json.dumps(ask("x", temperature=float("nan"))).encode(), 400, "temperature must be in 0..2"),
    "expert": (json.dumps(ask("x", experts={"9": 1})).encode(), 400, "experts must be in 0..3"),
    "blank": (json.dumps(ask(" ")).encode(), 400, "question must be a text"),
    "file": (json.dumps(ask("x", {"type": "file", "file": {"file_id": "no"}})).encode(), 404, "no file 'no'"),
    "base64": (
        json.dumps(ask("x", {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}})).encode(),
        *(400, "not base64"),
    ),
    "context": (json.dumps(ask("word " * 3000)).encode(), 400, "shorter than 512 tokens"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_request_gives_a_sentence(client, name):
    data, status, message = BAD_BODIES[name]
    answer = client.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text


def test_one_who_hangs_leaves_or_sends_nonsense_costs_nobody(live, model, parts):
    """While some connections stall, vanish in mid-answer and send junk, the answers of others are right and in time."""
    expected = alone(model, parts, 1, "What colour is it?", Options(12)).text
    body = json.dumps(ask("What colour is it?", image_part(parts.data.parent / "1.png"), stream=True, max_tokens=64))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    held = []
    for kind in ("hang", "leave", "slow", "junk") * 3:
        connection = socket.create_connection(("127.0.0.1", live))
        held.append(connection)
        if kind == "slow":  # promises a body that never comes
            connection.sendall(f"{head}Content-Length: 999999\r\n\r\n{{".encode())
        elif kind == "junk":
            connection.sendall(b"\x16\x03\x01" + bytes(range(256)) * 64)
        else:
            connection.sendall(request)
            if kind == "leave":
                connection.recv(10)
                connection.close()
    maker = openai.OpenAI(base_url=f"{BASE}:{live}/v1", api_key="none", max_retries=0, timeout=30)
    for _ in range(3):
        answer = maker.chat.completions.create(**ask("What colour is it?", image_part(parts.data.parent / "1.png")))
        assert answer.choices[0].message.content == expected
    for connection in held:
        connection.close()


def test_client_that_leaves_frees_its_row(live, parts):
    with openai.OpenAI(base_url=f"{BASE}:{live}/v1", api_key="none") as maker:
        stream = maker.chat.completions.create(**ask("What?", max_tokens=64), stream=True)
        next(iter(stream))
        stream.close()
        health = f"{BASE}:{live}/health"
        for _ in range(100):
            state = maker._client.get(health).json()["engines"][MAIN]
            if not state["running"]:
                break
            time.sleep(0.05)
        assert state["running"] == 0


def test_full_line_is_refused_and_late_requests_are_told(model):
    """The fourth request for one row and two places gets 429; one that has no time at all, 503."""
    limits = replace(LIMITS, rows=1, waiting=2)

    async def rush():
        from octavius.serve.engine import Engine
        from octavius.serve.limits import Refused

        engine = Engine(model, limits)  # not started: whoever comes must wait
        prompt = make_prompt(model, [Exchange("What?")])
        tickets = [engine.submit(prompt, Options(4)) for _ in range(2)]
        with pytest.raises(Refused, match="2 requests wait already"):
            engine.submit(prompt, Options(4))
        engine.start()
        texts = ["".join([piece async for piece in ticket.stream()]) for ticket in tickets]
        late = replace(limits, seconds=-1.0)
        engine.limits = late
        ticket = engine.submit(prompt, Options(4))
        with pytest.raises(Refused, match="time limit"):
            [piece async for piece in ticket.stream()]
        engine.close()
        return texts

    texts = asyncio.run(rush())
    assert texts[0] == texts[1]


def test_door(model):
    """The loopback's names alone; with a token, only who has it; no foreign page."""
    inside = TestClient(build_app(Service(model, limits=LIMITS)), base_url=BASE)
    assert inside.get("/v1/models").status_code == 200
    assert inside.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert inside.post("/v1/files", headers={"Origin": "http://evil.example"}).status_code == 403
    assert inside.post("/v1/files", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert "default-src 'none'" in inside.get("/").headers["content-security-policy"]
    token = "0123456789abcdef"
    outside = TestClient(build_app(Service(model, token=token, limits=LIMITS)), base_url="http://box.example")
    assert outside.get("/v1/models").status_code == 401
    assert outside.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert outside.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert outside.get("/", params={"token": token}).status_code == 200  # a redirect that leaves a cookie
    assert outside.get("/v1/models").status_code == 200


def test_address_asks_for_a_token_beyond_the_loopback():
    assert Address().checked().token is None
    assert len(Address("0.0.0.0").checked().token) >= 16
    with pytest.raises(ValueError, match="at least 16 characters"):
        Address(token="short").checked()


def test_page_is_complete_and_loads_nothing_from_elsewhere(client):
    page = client.get("/").text
    assert "<title>" in page and "http://" not in page and "https://" not in page
    for name in ("app.js", "cloud.js", "style.css", "three/three.module.js", "three/LICENSE"):
        assert client.get(f"/{name}").status_code == 200
