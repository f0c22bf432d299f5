"""The chat page in a real headless Chromium, against a scripted server on the loopback."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from browser import ENTER, ESCAPE, RELEASE, SHIFT, Browser, wait
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, ImageDraw

from revision_ray.serve.page import page

MODEL = "demo-realign-0.6m"
ANSWER = "There is a large red circle to the left of a small blue square, on a striped background."


# --- the server -------------------------------------------------------------------------------------------


@dataclass
class Script:
    """What the server does next, and what it was sent."""

    answer: str = ANSWER
    pause_s: float = 0.0
    key: str = ""
    finish: str | None = "stop"
    """None: the stream breaks off without one."""
    error: str = ""
    """An error object in the stream, after the answer."""
    refusals: list[tuple[int, str]] = field(default_factory=list)
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    left: bool = False
    """The client went away before the end."""


def scripted(script: Script) -> FastAPI:
    app = FastAPI()

    def unauthorized(request: Request) -> Response | None:
        if not script.key or request.headers.get("authorization") == f"Bearer {script.key}":
            return None
        return JSONResponse({"error": {"message": "Incorrect API key.", "code": "invalid_api_key"}}, 401)

    @app.get("/")
    def root() -> Response:
        html, policy = page()
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/v1/models")
    def models(request: Request):
        return unauthorized(request) or {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        refused = unauthorized(request)
        if refused:
            return refused
        script.requests.append(await request.json())
        script.headers.append(dict(request.headers))
        if script.refusals:
            status, message = script.refusals.pop(0)
            return JSONResponse({"error": {"message": message}}, status, {"Retry-After": "1"})
        return StreamingResponse(stream(), media_type="text/event-stream")

    async def stream():
        whole = False
        try:
            pieces = [script.answer[at : at + 5] for at in range(0, len(script.answer), 5)]
            for piece in pieces:
                yield event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
                await asyncio.sleep(script.pause_s)
            whole = True
        finally:
            script.left = not whole
        if script.error:
            yield event(error={"message": script.error})
        elif script.finish:
            yield event(choices=[{"index": 0, "delta": {}, "finish_reason": script.finish}])
            yield event(choices=[], usage={"prompt_tokens": 20, "completion_tokens": len(pieces)})
            yield "data: [DONE]\n\n"

    def event(**content) -> str:
        return f"data: {json.dumps(content)}\n\n"

    return app


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Script, str]]:
    script = Script()
    served = uvicorn.Server(uvicorn.Config(scripted(script), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=served.run)
    thread.start()
    wait(lambda: served.started, "uvicorn is ready")
    port = served.servers[0].sockets[0].getsockname()[1]
    yield script, f"http://127.0.0.1:{port}/"
    served.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def script(server) -> Script:
    server[0].__dict__.update(Script().__dict__)
    return server[0]


@pytest.fixture
def browser(window, server, script) -> Browser:
    """The page, freshly loaded: light, 1100 x 760, full motion."""
    view(window, 1100, 760)
    window.open(server[1])
    wait(lambda: window.text("#model") == MODEL, "the model's name is shown")
    window.complaints()
    return window


def view(
    browser: Browser, width: int, height: int, scheme: str = "light", motion: str = "no-preference"
) -> None:
    phone = width < 500
    browser.cdp(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=2 if phone else 1,
        mobile=phone,
    )
    browser.cdp(
        "Emulation.setEmulatedMedia",
        features=[
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ],
    )


def ask(browser: Browser, text: str = "What is in this image?") -> None:
    browser.type("#question", text + ENTER)


def answered(browser: Browser, count: int = 1) -> None:
    wait(
        lambda: browser.run("return document.querySelectorAll('.facts').length") == count,
        f"{count} answers are finished",
    )


# --- images -----------------------------------------------------------------------------------------------


def drawing(side: int = 480) -> Image.Image:
    """A red circle and a blue square, as the demo's world has them."""
    image = Image.new("RGB", (side, side), "#efe6d2")
    draw = ImageDraw.Draw(image)
    for stripe in range(0, side, side // 6):
        draw.rectangle((stripe, 0, stripe + side // 12, side), fill="#e3d6b8")
    draw.ellipse((side * 0.12, side * 0.25, side * 0.55, side * 0.68), fill="#c8352b")
    draw.rectangle((side * 0.66, side * 0.5, side * 0.86, side * 0.7), fill="#2b5fc8")
    return image


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    drawing().save(path)
    return path


def sent_images(request: dict) -> list[bytes]:
    parts = [part for message in request["messages"] for part in message["content"] if isinstance(part, dict)]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls]


def test_an_image_and_a_question_are_answered(browser, script, picture):
    browser.type("#files", str(picture))
    wait(lambda: browser.shown("#tray img"), "the preview is shown")
    ask(browser)
    answered(browser)
    assert browser.text(".assistant .said") == ANSWER
    (request,) = script.requests
    assert sent_images(request) == [picture.read_bytes()], "a small image goes byte for byte"
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "What is in this image?"}
    assert (request["model"], request["stream"], request["temperature"]) == (MODEL, True, 0)
    assert request["stream_options"] == {"include_usage": True}
    assert "18 tokens" in browser.text(".facts")
    assert browser.text("#tray") == "", "the tray is empty again"
    assert browser.complaints() == [], "the page's own policy allows all that it does"


def test_large_images_are_made_smaller_before_they_are_sent(browser, script, tmp_path):
    path = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(256, size=(1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((3000, 1500)).save(path)
    browser.type("#files", str(path))
    wait(lambda: browser.shown("#tray img"), "the preview is shown")
    ask(browser)
    answered(browser)
    (sent,) = sent_images(script.requests[0])
    image = Image.open(io.BytesIO(sent))
    assert (image.format, image.size) == ("JPEG", (1024, 512))
    assert len(sent) < path.stat().st_size / 5


def test_several_images_and_one_removed(browser, script, tmp_path):
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{colour}.png")
        browser.type("#files", str(tmp_path / f"{colour}.png"))
        wait(
            lambda count=number + 1: (
                browser.run("return document.querySelectorAll('#tray li').length") == count
            ),
            "it is attached",
        )
    assert browser.label("#tray li:nth-child(2) button") == "Remove green.png"
    browser.click("#tray li:nth-child(2) button")
    ask(browser)
    answered(browser)
    colours = [Image.open(io.BytesIO(sent)).getpixel((0, 0)) for sent in sent_images(script.requests[0])]
    assert colours == [(255, 0, 0), (0, 0, 255)]


TRANSFER = """
const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[2], {type: arguments[3]}));
const options = {bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer};
const Kind = arguments[0] === "paste" ? ClipboardEvent : DragEvent;
document.querySelector("main").dispatchEvent(new Kind(arguments[0], options));
"""


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(browser, script, picture, way):
    content = base64.b64encode(picture.read_bytes()).decode()
    if way == "drop":
        browser.run(TRANSFER, "dragenter", content, "scene.png", "image/png")
        assert browser.shown("#veil")
    browser.run(TRANSFER, way, content, "scene.png", "image/png")
    wait(lambda: browser.shown("#tray img"), "the preview is shown")
    assert not browser.shown("#veil")
    ask(browser)
    answered(browser)
    assert sent_images(script.requests[0]) == [picture.read_bytes()]


def test_what_is_no_image_is_said_kindly(browser):
    content = base64.b64encode(b"no image at all").decode()
    browser.run(TRANSFER, "drop", content, "notes.txt", "text/plain")
    wait(lambda: browser.shown("#trouble"), "the trouble is shown")
    assert browser.text("#trouble") == "notes.txt is not an image that this browser can read."
    assert browser.role("#trouble") == "alert"


# --- the conversation -------------------------------------------------------------------------------------


def test_text_appears_while_it_streams(browser, script):
    script.pause_s = 0.1
    ask(browser)
    wait(lambda: 5 < len(browser.text(".assistant .said")) < len(ANSWER), "a part of the answer is shown")
    assert browser.run("return document.querySelector('.assistant').getAttribute('aria-busy')") == "true"
    assert browser.shown("#stop")
    answered(browser)
    assert browser.text(".assistant .said") == ANSWER
    assert not browser.run("return document.querySelector('.assistant').hasAttribute('aria-busy')")
    assert browser.text("#status") == "Answer finished"


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_stream_and_keeps_what_was_said(browser, script, way):
    script.pause_s = 0.1
    ask(browser)
    wait(lambda: len(browser.text(".assistant .said")) > 5, "a part of the answer is shown")
    browser.click("#stop") if way == "button" else browser.type("#question", ESCAPE)
    answered(browser)
    said = browser.text(".assistant .said")
    assert 5 < len(said) < len(ANSWER)
    assert browser.text(".facts").startswith("stopped")
    wait(lambda: script.left, "the server sees that the client left")
    script.pause_s = 0.0
    ask(browser, "And now?")
    answered(browser, 2)
    roles = [(message["role"], message["content"]) for message in script.requests[1]["messages"]]
    assert roles == [
        ("user", "What is in this image?"),
        ("assistant", said),
        ("user", "And now?"),
    ]


def test_what_the_model_says_is_text_and_never_html(browser, script):
    hostile = (
        '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b> & &amp;\n\n  x'
    )
    script.answer = hostile
    ask(browser, "<i>mine</i>")
    answered(browser)
    assert browser.run("return document.querySelector('.assistant .said').textContent") == hostile
    assert browser.text(".user .said") == "<i>mine</i>"
    assert (
        browser.run("return document.querySelectorAll('#log img, #log script, #log b, #log i').length") == 0
    )
    assert browser.run("return document.title") == MODEL
    assert browser.complaints() == []


def test_the_policy_refuses_what_the_page_does_not_do(browser):
    """Were markup ever let in: no script of it runs, nothing is loaded from elsewhere."""
    browser.run(
        "const box = document.createElement('div'); document.body.append(box);"
        'box.innerHTML = \'<img src=x onerror="document.title=1"><img src="http://127.0.0.1:9/pixel">\';'
        "const script = document.createElement('script');"
        "script.textContent = 'document.title=2'; box.append(script);"
        "await new Promise(resolve => setTimeout(resolve, 200))"
    )
    assert browser.run("return document.title") == MODEL
    refused = "\n".join(browser.complaints())
    assert refused.count("Content Security Policy") >= 3


def test_keys_write_lines_and_send(browser, script):
    browser.type("#question", "one" + SHIFT + ENTER + RELEASE + "two")
    assert script.requests == []
    browser.type("#question", ENTER)
    answered(browser)
    assert script.requests[0]["messages"][0]["content"] == "one\ntwo"
    browser.type("#question", "   " + ENTER)
    assert len(script.requests) == 1, "nothing to ask, nothing sent"


def test_a_new_chat_forgets_the_old_one(browser, script):
    script.pause_s = 0.1
    ask(browser)
    wait(lambda: browser.text(".assistant .said"), "it streams")
    browser.click("#clear")
    wait(lambda: browser.shown("#welcome"), "the welcome is back")
    wait(lambda: script.left, "the stream was ended")
    script.pause_s = 0.0
    ask(browser, "Something else?")
    answered(browser)
    assert [message["content"] for message in script.requests[1]["messages"]] == ["Something else?"]


def test_an_answer_is_copied(browser):
    browser.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    ask(browser)
    answered(browser)
    browser.click(".under button")
    wait(lambda: browser.text(".under button") == "Copied", "the button says so")
    assert browser.run("return navigator.clipboard.readText()") == ANSWER


def test_settings_are_sent(browser, script):
    browser.click("summary")
    browser.run(
        "const range = document.querySelector('#temperature');"
        "range.value = 0.7; range.dispatchEvent(new Event('input'))"
    )
    assert browser.text("#temperature-shown") == "0.7"
    browser.run("document.querySelector('#max-tokens').value = ''")
    browser.type("#max-tokens", "33")
    script.finish = "length"
    browser.type("#question", ESCAPE)
    assert not browser.shown(".panel")
    ask(browser)
    answered(browser)
    assert (script.requests[0]["temperature"], script.requests[0]["max_tokens"]) == (0.7, 33)
    assert "cut off" in browser.text(".facts")


def test_an_idea_becomes_the_question(browser):
    browser.click(".ideas button")
    assert browser.run("return document.querySelector('#question').value") == "What is in this image?"
    assert browser.run("return document.activeElement.id") == "question"


# --- what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (503, "The queue is full.", "The server is busy right now. Please try again in a moment."),
        (429, "Slow down.", "The server is busy right now. Please try again in a moment."),
        (500, "internal", "Something went wrong on the server. Please try again."),
        (400, "The image has 16 frames.", "The image has 16 frames."),
        (
            413,
            "An image has 30 MB; at most 20.",
            "That is too much for one request. An image has 30 MB; at most 20.",
        ),
    ],
)
def test_a_refusal_is_said_kindly_and_can_be_tried_again(browser, script, picture, status, message, said):
    script.refusals = [(status, message)]
    browser.type("#files", str(picture))
    wait(lambda: browser.shown("#tray img"), "the preview is shown")
    ask(browser)
    wait(lambda: browser.shown(".notice"), "the notice is shown")
    assert browser.text(".notice span") == said
    assert browser.role(".notice") == "alert"
    browser.click(".notice button")
    answered(browser)
    assert browser.text(".assistant .said") == ANSWER
    assert not browser.shown(".notice")
    assert script.requests[0] == script.requests[1]


def test_the_images_of_a_question_that_failed_join_the_next_one(browser, script, picture):
    script.refusals = [(503, "full")]
    browser.type("#files", str(picture))
    wait(lambda: browser.shown("#tray img"), "the preview is shown")
    ask(browser)
    wait(lambda: browser.shown(".notice"), "the notice is shown")
    ask(browser, "What colour is it?")
    answered(browser)
    (message,) = script.requests[1]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == "What colour is it?"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"error": "A replica was lost; ask again."}, "A replica was lost; ask again."),
        ({"finish": None}, "The connection broke off before the answer was finished."),
    ],
)
def test_a_stream_that_breaks_off_says_so(browser, script, changes, said):
    script.__dict__.update(changes)
    ask(browser)
    wait(lambda: browser.shown(".notice"), "the notice is shown")
    assert browser.text(".notice span") == said
    assert browser.text(".assistant .said") == ANSWER, "what came is kept"
    script.error, script.finish = "", "stop"
    browser.click(".notice button")
    answered(browser)
    assert browser.run("return document.querySelectorAll('.assistant').length") == 1


def test_a_server_that_asks_for_a_key_gets_one(browser, script, server):
    script.key = "sk-right"
    browser.open(server[1])
    wait(lambda: browser.shown("#key-form"), "the key is asked for")
    assert browser.label("#key") == "API key"
    assert browser.text("#model") == "locked"
    browser.type("#key", "sk-wrong" + ENTER)
    wait(lambda: "not accepted" in browser.text("#key-why"), "the wrong key is refused")
    browser.type("#key", "sk-right" + ENTER)
    wait(lambda: browser.text("#model") == MODEL, "the model's name is shown")
    assert not browser.shown("#key-form")
    ask(browser)
    answered(browser)
    assert script.headers[0]["authorization"] == "Bearer sk-right"
    kept = "return localStorage.length + sessionStorage.length + document.cookie.length"
    assert browser.run(kept) == 0
    assert "sk-right" not in browser.run("return document.documentElement.outerHTML")


def test_a_key_that_was_withdrawn_is_asked_for_again(browser, script):
    script.key = "sk-new"
    ask(browser)
    wait(lambda: browser.shown("#key-form"), "the key is asked for")
    browser.type("#key", "sk-new" + ENTER)
    answered(browser)
    assert browser.text(".assistant .said") == ANSWER, "the question was not lost"


# --- how it looks -----------------------------------------------------------------------------------------

# WCAG 2: the contrast of every text that is shown with the first opaque background behind it.
CONTRASTS = """
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b]
  .map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = channels(getComputedStyle(element).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!own || !element.checkVisibility() || element.disabled || element.closest("script")) continue;
  const [a, b] = [light(channels(getComputedStyle(element).color)), light(behind(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) found.push([element.outerHTML.slice(0, 80), contrast]);
}
return found;
"""
# What sticks out at the sides, or is too small for a finger.
OUTSIDE = """
const width = arguments[0];
return [...document.querySelectorAll("body *:not(.unseen)")].filter(element => element.checkVisibility())
  .map(element => [element.outerHTML.slice(0, 80), element.getBoundingClientRect()])
  .filter(([, box]) => box.left < -1 || box.right > width + 1).map(([name]) => name);
"""
SMALL = """
return [...document.querySelectorAll("button, summary")].filter(element => element.checkVisibility())
  .map(element => [element.id || element.className, element.getBoundingClientRect()])
  .filter(([, box]) => Math.min(box.width, box.height) < 24).map(([name]) => name);
"""


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [
        ("light", 1100, 760, "light"),
        pytest.param("dark", 1100, 760, "dark", marks=pytest.mark.slow),
        pytest.param("phone", 360, 740, "light", marks=pytest.mark.slow),
        ("phone_dark", 360, 740, "dark"),
    ],
)
def test_every_state_is_readable_in(browser, script, server, picture, tmp_path, name, width, height, scheme):
    """Every state of the chat page is readable, light and dark, on a desk and a phone.

    Contrast of AA (4.5), nothing wider than the screen, targets of 24 pixels; a picture of each state."""
    view(browser, width, height, scheme, motion="reduce")
    browser.open(server[1])
    wait(lambda: browser.text("#model") == MODEL, "the model's name is shown")

    def look(state: str) -> None:
        browser.run("document.activeElement.blur()")
        browser.screenshot(tmp_path / f"{name}_{state}.png")
        assert browser.run(CONTRASTS) == [], state
        assert browser.run(OUTSIDE, width) == [], state
        assert browser.run(SMALL) == [], state

    look("1_welcome")
    browser.click("summary")
    look("2_settings")
    browser.type("#question", ESCAPE)
    for number in range(2):
        browser.type("#files", str(picture))
        wait(
            lambda count=number + 1: (
                browser.run("return document.querySelectorAll('#tray li').length") == count
            ),
            "it is attached",
        )
    browser.click("#tray li:last-child button")
    browser.type("#question", "What is to the left of the square?")
    look("3_attached")
    script.pause_s = 0.15
    browser.type("#question", ENTER)
    wait(lambda: len(browser.text(".assistant .said")) > 40, "it streams")
    look("4_streaming")
    answered(browser)
    script.pause_s = 0.0
    script.answer = "Stripes.\n\n" + "They run from top to bottom, in two shades of sand. " * 3
    ask(browser, "What is the background like? Please say it in a few sentences.")
    answered(browser, 2)
    look("5_conversation")
    script.refusals = [(503, "full")]
    ask(browser, "Is there a triangle?")
    wait(lambda: browser.shown(".notice"), "the notice is shown")
    look("6_busy")
    script.key = "sk-other"
    browser.open(server[1])
    wait(lambda: browser.shown("#key-form"), "the key is asked for")
    look("7_key")
    moving = "return document.getAnimations().filter(each => each.playState === 'running').length"
    assert browser.run(moving) == 0, "reduced motion is respected"


def test_every_control_has_a_name_and_shows_its_focus(browser, picture):
    browser.type("#files", str(picture))
    wait(lambda: browser.shown("#tray img"), "the preview is shown")
    browser.click("summary")
    names = {
        css: browser.label(css)
        for css in (
            "#question",
            "#send",
            "#attach",
            "#clear",
            "summary",
            "#temperature",
            "#max-tokens",
            "#tray button",
        )
    }
    assert [css for css, name in names.items() if not name] == []
    assert names["#question"] == "Your question"
    assert browser.role("#log") == "log"
    assert browser.run("return document.querySelector('#log').ariaLive") == "polite"
    outlines = browser.run(
        "const seen = [];"
        "for (const element of document.querySelectorAll('button:not(:disabled), summary, input')) {"
        "  if (!element.checkVisibility()) continue;"
        "  document.activeElement.blur();"
        "  element.focus({focusVisible: true});"
        "  if (getComputedStyle(element).outlineStyle !== 'solid') seen.push(element.outerHTML);"
        "}"
        "return seen"
    )
    assert outlines == []


def test_the_page_is_whole_in_itself():
    """No address of any other place, no inline handler or style that its policy would refuse."""
    html, policy = page()
    text = html.decode()
    for forbidden in ("https://", "//cdn", "@import", " onclick=", " style=", "innerHTML", "eval("):
        assert forbidden not in text, forbidden
    assert text.count("http://") == text.count("http://www.w3.org/")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert len(html) < 64 * 1024
