"""The page in a real browser, offline, at desk and phone width, with a real tiny model behind it."""

import io
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from octavius.serve.app import Service, build_app
from octavius.serve.limits import Limits
from octavius.serve.samples import read_samples
from tests.octavius.serve.test_endpoint import bomb
from tests.support import clouds

pytestmark = pytest.mark.slow
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += (
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex='0']"


@pytest.fixture(scope="module")
def playwright():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as made:
        yield made


@pytest.fixture(scope="module")
def browser(playwright):
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium: apt install chromium, or give its path in CHROMIUM")
    browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return clouds.save_clouds(tmp_path_factory.mktemp("clouds"))


@pytest.fixture(scope="module")
def address(parts, root, tmp_path_factory):
    """A server with experts, a single LoRA, and two samples."""
    file = tmp_path_factory.mktemp("run") / "answers.jsonl"
    image = {"id": "c1", "benchmark": "classification", "image": str(parts.data.parent / "1.png")}
    cloud = {"id": "q2", "benchmark": "vqa3d", "pcl": str(root / "clouds/2.npz")}
    rows = [row | {"question": f"What is {row['id']}?", "reference": "green"} for row in (image, cloud)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = clouds.make(parts, root), clouds.make(parts, root, seed=4)
    app = build_app(Service(*models, read_samples(file), None, Limits()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(params=SIZES)
def page(browser, address, request):
    """The page, opened; at the end nothing has left the machine, nothing failed in it, and it is not too wide."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    requests, failures = [], []
    page.on("request", lambda asked: requests.append(asked.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    page.locator("#samples li").first.wait_for()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith((address, "blob:"))] == [] and failures == []
    context.close()


def ask(page, question):
    """Ask and wait for all answers; returns their cards."""
    turns = page.locator(".turn").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator(".turn").nth(turns).locator(".answer:not(.open)").first.wait_for(timeout=20_000)
    page.locator("#send:enabled").wait_for(timeout=20_000)
    return page.locator(".turn").nth(turns).locator(".answer")


def shares(card):
    return [float(value) for value in card.locator(".bar").evaluate_all("bars => bars.map(bar => bar.dataset.share)")]


def test_upload_and_three_turns(page, parts):
    page.set_input_files("#file", parts.data.parent / "2.png")
    page.locator("#stage[data-kind=image]").wait_for()
    start = time.monotonic()
    for question in ("What colour is it?", "Where?", "Describe it."):
        card = ask(page, question)
        assert card.locator(".text").inner_text().strip()
        assert sum(shares(card)) == pytest.approx(1, abs=1e-3)
    assert time.monotonic() - start < 60
    assert page.locator(".turn").count() == 3
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_answers_side_by_side_and_overridden_experts(page, parts):
    page.set_input_files("#file", parts.data.parent / "2.png")
    page.locator("#stage[data-kind=image]").wait_for()
    gate = ask(page, "What colour is it?")
    before = gate.locator(".text").inner_text(), shares(gate)
    page.click("#new")
    page.check("#withsingle")
    page.check("#withblind")
    page.check("input[value=one]")
    page.select_option("#first", "3")
    cards = ask(page, "What colour is it?")
    assert cards.locator("h3").all_inner_texts() == ["Expert 3", "Single LoRA", "Blind"]
    assert shares(cards.nth(0)) == [0, 0, 0, 1] != before[1]
    assert len({before[0], *cards.locator(".text").all_inner_texts()}) == 4
    page.check("input[value=two]")
    page.locator("#balance").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert shares(ask(page, "What?").nth(0)) == [0, pytest.approx(0.01), 0, pytest.approx(0.99)]


def test_cloud_turns_under_the_mouse_and_the_keys(page):
    page.select_option("#task", "vqa3d")
    page.click("#samples button")
    canvas = page.locator("#cloud")
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    shots = [canvas.screenshot()]
    assert len(set(Image.open(io.BytesIO(shots[0])).convert("RGB").getdata())) > 8  # something is drawn
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 180, box["y"] + 120, steps=4)
    page.mouse.up()
    shots.append(canvas.screenshot())
    canvas.focus()
    page.keyboard.press("ArrowRight")
    shots.append(canvas.screenshot())
    assert len(set(shots)) == 3
    page.click("#objects summary")
    rows = page.locator("#objectlist .bar")
    assert rows.count() == 3
    assert sum(float(rows.nth(i).get_attribute("data-share")) for i in range(3)) == pytest.approx(1, abs=1e-3)
    assert page.input_value("#question") == "What is q2?"
    ask(page, "What is q2?")
    assert "Reference: green" in page.locator(".reference").inner_text()


def test_bad_files_give_a_sentence(page, tmp_path):
    files = {"broken.png": b"\x89PNG nonsense", "big.png": bomb(20_000, 10_000), "room.ply": b"ply\nnonsense"}
    messages = ("cannot be read as an image", "64 megapixels", "cannot be read as a point cloud")
    for (name, data), message in zip(files.items(), messages, strict=True):
        Path(tmp_path / name).write_bytes(data)
        page.set_input_files("#file", tmp_path / name)
        page.locator("#problem", has_text=message).wait_for()
    assert page.locator("#stage").get_attribute("data-kind") == "empty"


def test_every_control_is_named_and_reached_by_keyboard(page, parts):
    page.set_input_files("#file", parts.data.parent / "2.png")
    page.locator("#stage[data-kind=image]").wait_for()
    shown = page.locator(CONTROLS).evaluate_all(
        "all => all.filter(e => e.checkVisibility() && !e.disabled && !(e.type === 'radio' && !e.checked)).map("
        "e => e.id || e.name || e.textContent.slice(0, 20))"
    )
    reached = set()
    page.keyboard.press("Tab")
    for _ in range(2 * len(shown)):
        reached.add(
            page.evaluate(
                "(document.activeElement.id || document.activeElement.name || "
                "document.activeElement.textContent.slice(0, 20))"
            )
        )
        page.keyboard.press("Tab")
    assert set(shown) - reached == set()
    snapshot = page.locator("body").aria_snapshot()
    kinds = ("button", "textbox", "combobox", "radio", "checkbox", "slider", "img", "link")
    unnamed = [line for line in snapshot.splitlines() if line.strip().removeprefix("- ").rstrip(":") in kinds]
    assert unnamed == []


def test_boxes_stay_inside_the_image(page, parts):
    """The server's reply is a recorded one here: a tiny model writes no boxes."""
    boxes = [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.6]}, {"label": "dog", "box": [0.6, -0.5, 1.7, 3.0]}]
    about = {"experts": [0.5, 0.5, 0, 0], "boxes": boxes, "seconds": 1}
    delta = {"octavius": {"experts": about["experts"]}, "choices": [{"delta": {"content": "A cat at [0.1, ..."}}]}
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "octavius": about}
    usage = {"choices": [], "usage": {"completion_tokens": 9}}
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in (delta, last, usage)) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=text, content_type="text/event-stream"))
    page.set_input_files("#file", parts.data.parent / "2.png")
    page.locator("#stage[data-kind=image]").wait_for()
    ask(page, "List every object with its box.")
    frame = page.locator("#image").bounding_box()
    drawn = [page.locator(".box").nth(i).bounding_box() for i in range(2)]
    for box in drawn:
        assert box["x"] >= frame["x"] - 1 and box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
        assert box["y"] >= frame["y"] - 1 and box["y"] + box["height"] <= frame["y"] + frame["height"] + 1
    assert drawn[0]["width"] == pytest.approx(0.4 * frame["width"], abs=1.5)
    assert page.locator(".box span").all_inner_texts() == ["cat", "dog"]
