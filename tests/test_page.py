"""The page at /ui, in a real Chromium against a real server."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from predictor.protocols.parameters import Parameters
from tests.conftest import ROOT, left_out
from tests.processes import ServerProcess, serving, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Route

BARD = ROOT / "models" / "bard"
MODEL, OTHER = "aitextgen", "second"
PREDICT = f"/v1/models/{MODEL}:predict"

# What the page decides itself.
NOT_SHOWN = {"stream", "details", "return_full_text"}

LABELS = ["prompt", "max new tokens", "temperature", "top k", "top p", "seed", "samples", "stop"]

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("page") / "log"
    with serving(log, "--model", f"{MODEL}={BARD}", "--model", f"{OTHER}={BARD}") as running:
        running.wait_until_ready(OTHER)
        running.wait_until_ready(MODEL)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        left_out("playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        left_out("chromium is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


class Visits:
    """Pages on the server, and whatever went wrong or out in them."""

    def __init__(self, browser: Browser, server: ServerProcess) -> None:
        self._browser, self.url = browser, server.url
        self._contexts: list[BrowserContext] = []
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def __call__(self, fragment: str = "", **options: Any) -> Page:
        """A page in a browser of its own, loaded."""
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))
        with page.expect_response("**/v1/models"):
            page.goto(f"{self.url}/ui{fragment}")
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def visit(browser: Browser, server: ServerProcess) -> Iterator[Visits]:
    """Opens pages; after the test, none of them has complained or asked for anything but the page and the models."""
    visits = Visits(browser, server)
    yield visits
    visits.close()
    # The browser says this of every 4xx; that the page says it too is what tests look at.
    complaints = [each for each in visits.complaints if "Failed to load resource" not in each]
    assert complaints == []
    known = {"GET /ui", "GET /v1/models", f"POST {PREDICT}", f"POST /v1/models/{OTHER}:predict"}
    asked = {each.replace(visits.url, "").split("#")[0] for each in visits.requests if "blob:" not in each}
    assert asked <= known


def generate(page: Page, wait: str = "Done.", **fields: str) -> None:
    """Fill the controls whose labels are given with `_` for a space, generate, and wait for the status."""
    for label, text in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(text)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("status").get_by_text(wait).wait_for()


def endless(page: Page) -> None:
    """Begin what takes a quarter of a minute if nobody stops it, and wait for its first tokens."""
    page.get_by_text("More", exact=True).click()
    page.get_by_label("context overflow").select_option("slide")
    page.get_by_label("ignore the end token").check()
    page.get_by_label("max new tokens").fill("4000")
    page.get_by_role("button", name="Generate").click()
    page.locator(".token").nth(3).wait_for()


def predictions(server: ServerProcess, prompt: str, **parameters: Any) -> list[Any]:
    answer = server.predict(MODEL, {"instances": [{"prompt": prompt, "details": True, **parameters}]})
    assert answer.status_code == 200, answer.text
    (told,) = answer.json()["predictions"]
    return told if isinstance(told, list) else [told]


def sent(page: Page, act: Callable[[], None]) -> str:
    """The body that `act` makes the page send."""
    with page.expect_request(lambda request: request.method == "POST") as caught:
        act()
    assert caught.value.post_data is not None
    return caught.value.post_data


def answer_with(page: Page, *events: Any) -> None:
    """From now on `:predict` answers these events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/*:predict", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def token_event(delta: str, *tokens: str, **more: Any) -> dict[str, Any]:
    logprobs = {
        "token_ids": [5] * len(tokens),
        "tokens": tokens,
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": [[{"token_id": 5, "token": token, "logprob": -0.5}] for token in tokens],
    }
    return {"index": 0, "delta": delta, "logprobs": logprobs, **more}


LAST = {"finish_reason": "length", "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "seed": 1}


def test_the_page_is_one_file_with_strict_headers(server: ServerProcess) -> None:
    page = server.get("/ui")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    for directive in ("default-src 'none'", "connect-src 'self'", "script-src 'sha256-", "frame-ancestors 'none'"):
        assert directive in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert server.get("/ui/").text == page.text
    head = httpx.head(server.url + "/ui")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", page.headers["etag"])


def test_a_browser_that_has_the_page_is_told_so(server: ServerProcess) -> None:
    etag = server.get("/ui").headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        again = httpx.get(server.url + "/ui", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["cache-control"]) == (304, b"", "no-cache")
    assert httpx.get(server.url + "/ui", headers={"If-None-Match": '"other"'}).status_code == 200


def test_every_label_of_the_contract_names_one_control(visit: Visits) -> None:
    page = visit()
    for label in LABELS:
        for exact in (True, False):
            assert page.get_by_label(label, exact=exact).count() == 1, label
        assert page.get_by_label(label).is_editable()
    for name in ("Generate", "Stop"):
        assert page.get_by_role("button", name=name).count() == 1


def test_every_parameter_of_the_server_has_a_control_with_its_range(visit: Visits) -> None:
    page = visit()
    for name, described in Parameters.model_json_schema(by_alias=False)["properties"].items():
        if name in NOT_SHOWN:
            continue
        control = page.locator(f"#{name}")
        limits = described | next((each for each in described.get("anyOf", [])), {})
        if limits["type"] in ("integer", "number"):
            low = limits.get("minimum", limits.get("exclusiveMinimum"))
            assert control.get_attribute("min") == str(low)
            assert control.get_attribute("max") == str(limits.get("maximum", ""))
        if limits.get("default") is not None and limits["type"] in ("integer", "number"):
            assert float(control.input_value()) == limits["default"]
        assert page.locator(f"label[for={name}]").count() == 1


def test_the_text_is_what_the_server_answers(visit: Visits, server: ServerProcess) -> None:
    page = visit()
    generate(page, prompt="KING RICHARD:\nA horse!", seed="7", max_new_tokens="40", temperature="0.9", top_k="20")
    (wanted,) = predictions(server, "KING RICHARD:\nA horse!", seed=7, max_new_tokens=40, temperature=0.9, top_k=20)
    assert page.locator(".card .text").text_content() == wanted["text"]
    assert page.locator("#asked").text_content() == "KING RICHARD:\nA horse!"
    assert "40 tokens · seed 7 · finish: length" in page.locator(".card").inner_text()
    meter = page.locator("#meter").inner_text()
    assert meter.startswith("40 tokens · ")
    assert "tokens/s" in meter
    assert "first token after" in meter


def test_an_empty_prompt_is_asked_as_it_is(visit: Visits, server: ServerProcess) -> None:
    page = visit()
    generate(page, seed="3", max_new_tokens="8")
    assert page.locator(".card .text").text_content() == predictions(server, "", seed=3, max_new_tokens=8)[0]["text"]


def test_samples_are_cards_of_their_own(visit: Visits, server: ServerProcess) -> None:
    page = visit()
    generate(page, prompt="O ", seed="11", max_new_tokens="12", samples="3")
    wanted = predictions(server, "O ", seed=11, max_new_tokens=12, n=3)
    assert page.locator(".card .text").all_text_contents() == [each["text"] for each in wanted]
    for place, seed in enumerate((11, 12, 13)):
        assert f"seed {seed}" in page.locator(".card").nth(place).inner_text()


def test_text_comes_live_and_stop_frees_the_sequence(visit: Visits, server: ServerProcess) -> None:
    page = visit()
    endless(page)
    assert server.metric("predictor_requests_running") == 1
    assert page.get_by_role("button", name="Generate").is_disabled()
    some = page.locator(".token").count()
    page.locator(".token").nth(some + 5).wait_for()  # it goes on
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").get_by_text("Stopped.").wait_for()
    wait_for(lambda: server.metric("predictor_requests_running") == 0, 5)
    assert server.metric("predictor_kv_tokens_used") == 0
    assert server.metric("predictor_requests_total", 'code="499"') >= 1
    assert page.locator(".token").count() < 3500
    assert "stopped" in page.locator(".card .fact").inner_text()
    assert page.get_by_role("button", name="Generate").is_enabled()


def test_the_keyboard_generates_and_stops(visit: Visits, server: ServerProcess) -> None:
    page = visit("#max_new_tokens=4000&context_overflow=slide&ignore_eos=true")
    page.get_by_label("prompt").focus()
    page.keyboard.type("Now is")
    page.keyboard.press("Control+Enter")
    page.locator(".token").nth(3).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("status").get_by_text("Stopped.").wait_for()
    wait_for(lambda: server.metric("predictor_requests_running") == 0, 5)


def test_the_focus_is_kept_and_seen(visit: Visits) -> None:
    page = visit()
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("Done.").wait_for()
    assert page.evaluate("document.activeElement.id") == "generate"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "share"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


WRONG = [
    ("temperature", "101", "must be 0 to 100, got 101"),
    ("top p", "0", "must be above 0 to 1, got 0"),
    ("samples", "17", "must be 1 to 16, got 17"),
    ("samples", "1.5", "must be a whole number"),
    ("seed", "18446744073709551616", "must be 0 to 2^64 - 1"),
    ("seed", "-1", "must be 0 to 2^64 - 1"),
    ("stop", "a\\x", "\\x is unknown"),
    ("stop", "\n".join("abcdefghijklmnopq"), "up to 16 lines of 256 characters, got 17"),
    ("stop", "x" * 257, "up to 16 lines of 256 characters"),
    ("token bias", "7 = 3", "7 = 3 is no line such as"),
    ("token bias", "7: 101", "must be -100 to 100, got 101"),
    ("token bias", "7: 1\n7: 2", "token 7 stands twice"),
]


def test_a_wrong_value_is_told_beside_its_control_and_not_sent(visit: Visits) -> None:
    page = visit()
    page.get_by_text("More", exact=True).click()
    for label, text, told in WRONG:
        generate(page, f"Not sent: {label}.", **{label: text})
        control = page.get_by_label(label)
        name = control.get_attribute("id")
        assert control.get_attribute("aria-invalid") == "true"
        assert page.evaluate("document.activeElement.id") == name
        assert told in page.locator(f"#{name}-error").inner_text()
        control.fill("")
        assert page.locator(f"#{name}-error").text_content() == ""
    assert not any("predict" in each for each in visit.requests)


def test_half_a_number_is_told_and_not_sent(visit: Visits) -> None:
    page = visit()
    page.get_by_label("temperature").fill("")
    page.get_by_label("temperature").press_sequentially("1e")
    generate(page, wait="Not sent: temperature.")
    assert page.locator("#temperature-error").inner_text() == "is not a number"


REFUSED = [
    ("max_new_tokens=300", "max_new_tokens", "max_new_tokens must be at most 255"),
    ("top_k=5000", "top_k", "top_k must be at most the vocabulary of 2048"),
    ("min_new_tokens=9&max_new_tokens=8", "min_new_tokens", "must be at most max_new_tokens (8)"),
    ("timeout_s=99999", "timeout_s", "timeout_s must be at most this server's 300"),
    ("logit_bias=2048%3A+1", "logit_bias", "token ids must be below the vocabulary of 2048"),
    ("prompt=" + "word+" * 400, "prompt", "the prompt has"),
]


def test_what_the_server_refuses_is_told_beside_the_control(visit: Visits) -> None:
    page = visit()
    for fragment, name, told in REFUSED:
        page.evaluate("(fragment) => { location.hash = fragment; }", fragment)
        generate(page, told)
        assert told in page.locator(f"#{name}-error").inner_text()
        assert page.locator(f"#{name}").is_visible()
        assert page.evaluate("document.activeElement.id") == name


def test_the_seed_keeps_its_64_bits(visit: Visits) -> None:
    page = visit()
    body = sent(page, lambda: generate(page, seed="18446744073709551615", max_new_tokens="2", samples="2"))
    assert json.loads(body)["parameters"]["seed"] == 2**64 - 1
    assert f"seed {2**64 - 1} " in page.locator(".card").first.inner_text()
    assert "seed 0 " in page.locator(".card").nth(1).inner_text()


def test_the_body_is_what_the_controls_say(visit: Visits) -> None:
    page = visit()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("max new tokens").fill("4")
    page.get_by_label("stop").fill("\\n\\n\n Enter\nback\\\\slash\n")
    page.get_by_label("banned words").fill("love")
    page.get_by_label("token bias").fill("5: -100\n 7 : 1.5\n")
    page.get_by_label("draw at random").uncheck()
    page.get_by_label("alternatives").fill("")
    body = json.loads(sent(page, lambda: generate(page, prompt="é😀")))
    assert body == {
        "instances": ["é😀"],
        "parameters": {
            "max_new_tokens": 4, "temperature": 0.7, "top_p": 1, "n": 1, "min_new_tokens": 0, "repetition_penalty": 1,
            "presence_penalty": 0, "frequency_penalty": 0, "context_overflow": "error", "do_sample": False,
            "ignore_eos": False, "stop": ["\n\n", " Enter", "back\\slash"], "bad_words": ["love"],
            "logit_bias": {"5": -100, "7": 1.5}, "stream": True, "details": True,
        },
    }  # fmt: skip
    assert page.locator(".token").count() == 0
    assert page.locator(".card .text").text_content()


def test_a_link_restores_everything_and_generates_nothing(visit: Visits) -> None:
    page = visit()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("model").select_option(OTHER)
    page.get_by_label("ignore the end token").check()
    page.get_by_label("context overflow").select_option("slide")
    fields = {
        "prompt": "To be & not=#to\n<b>é😀",
        "max new tokens": "9",
        "temperature": "0",
        "top k": "3",
        "top p": "0.5",
        "seed": "18446744073709551615",
        "samples": "2",
        "stop": "\\n\\n\n end ",
        "token bias": "3: 4",
    }
    for label, text in fields.items():
        page.get_by_label(label).fill(text)
    page.get_by_role("button", name="Share").click()
    page.get_by_role("status").get_by_text("The link is copied.").wait_for()
    link = urlsplit(page.url)
    assert (link.path, link.query) == ("/ui", "")
    assert parse_qs(link.fragment)["temperature"] == ["0"]
    shared = visit("#" + link.fragment)
    for label, text in fields.items():
        assert shared.get_by_label(label).input_value() == text
    assert shared.get_by_label("model").input_value() == OTHER
    assert shared.get_by_label("ignore the end token").is_checked()
    assert shared.get_by_label("context overflow").input_value() == "slide"
    assert not any("predict" in each for each in visit.requests)


def test_a_link_with_what_cannot_be_is_told(visit: Visits) -> None:
    page = visit("#temperature=warm&colour=red&context_overflow=never&model=third&do_sample=maybe")
    page.get_by_role("status").get_by_text("third").wait_for()
    for name, text in (("temperature", "warm"), ("context_overflow", "never"), ("do_sample", "maybe")):
        assert text in page.locator(f"#{name}-error").inner_text()
    assert "colour" in visit("#colour=red").get_by_role("status").inner_text()


def test_output_is_text_and_never_elements(visit: Visits) -> None:
    page = visit()
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    generate(page, prompt=attack, max_new_tokens="2")
    assert page.locator("#asked").text_content() == attack
    answer_with(page, token_event(attack, attack), token_event("", "<b>", **LAST))
    generate(page)
    page.locator(".token").hover()
    assert attack.replace(" ", "␣") in page.get_by_role("tooltip").inner_text()
    assert page.locator(".card .text").text_content() == attack
    assert page.locator("img, b, script:not([type]), script[src]").count() == 1  # the page's own script
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    visit.complaints.clear()  # of that


def test_hovering_tells_how_likely_a_token_was(visit: Visits, server: ServerProcess) -> None:
    page = visit()
    generate(page, prompt="KING", seed="2", max_new_tokens="12", temperature="1.5")
    (wanted,) = predictions(server, "KING", seed=2, max_new_tokens=12, temperature=1.5, logprobs=5)
    logprobs = wanted["logprobs"]
    assert page.locator(".token").all_text_contents() == logprobs["tokens"]
    page.locator(".token").nth(3).hover()
    tip = page.get_by_role("tooltip")
    alternatives = {each["token_id"] for each in logprobs["top_logprobs"][3]} | {logprobs["token_ids"][3]}
    assert tip.locator("tr").count() == len(alternatives)
    chosen = tip.locator(".chosen td").nth(1).inner_text()
    assert float(chosen.removesuffix(" %")) == pytest.approx(100 * math.exp(logprobs["token_logprobs"][3]), rel=0.01)
    page.get_by_role("button", name="Generate").hover()
    assert tip.is_hidden()


def test_tokens_are_reached_by_keyboard(visit: Visits) -> None:
    page = visit()
    generate(page, prompt="KING", max_new_tokens="6")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")
    assert page.get_by_role("tooltip").is_visible()
    assert page.locator(".token").nth(1).get_attribute("aria-describedby") == "tip"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[5]")
    page.keyboard.press("Escape")
    assert page.get_by_role("tooltip").is_hidden()
    assert page.locator(".token[tabindex='0']").count() == 1


def test_tokens_of_one_character_are_shown_together(visit: Visits) -> None:
    page = visit()
    answer_with(
        page,
        token_event("a", "a"),
        token_event("", "�"),
        token_event("é", "�"),
        token_event("", " st"),  # held back: it might become a stop string
        token_event(" star", "ar", **LAST),
    )
    generate(page)
    assert page.locator(".token").all_text_contents() == ["a", "é", " st", "ar"]
    page.locator(".token").nth(1).hover()
    assert page.get_by_role("tooltip").locator("table").count() == 2


def test_an_error_in_mid_stream_is_told(visit: Visits) -> None:
    page = visit()
    answer_with(page, token_event("a", "a"), {"error": "the engine failed"})
    generate(page, wait="the engine failed")
    assert "unfinished" in page.locator(".fact").last.inner_text()
    page.unroute_all()
    answer_with(page, token_event("a", "a"))
    generate(page, wait="The answer ended too early.")
    page.unroute_all()
    page.route("**/*:predict", lambda route: route.abort())
    generate(page, wait="The server cannot be reached.")


def test_a_server_that_wants_a_key_gets_it(visit: Visits) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "an API key is needed"})

    page = visit()
    assert page.get_by_label("API key").is_hidden()
    page.route("**/v1/models*/**", guard)
    generate(page, wait="an API key is needed", max_new_tokens="2")
    assert page.evaluate("document.activeElement.id") == "api_key"
    page.get_by_label("API key").fill("wrong")
    generate(page, wait="an API key is needed")
    assert page.locator("#api_key-error").inner_text() == "the server refuses this key"
    page.get_by_label("API key").fill("right")
    generate(page)
    assert "right" not in page.url
    page.reload()
    assert page.get_by_label("API key").input_value() == "right"
    assert visit().get_by_label("API key").input_value() == ""


def test_the_model_is_chosen_where_there_are_several(visit: Visits, server: ServerProcess) -> None:
    page = visit()
    page.get_by_label("model").select_option(OTHER)
    generate(page, max_new_tokens="2")
    assert f"POST {server.url}/v1/models/{OTHER}:predict" in visit.requests
    page.route("**/v1/models", lambda route: route.fulfill(json={"models": ["only"]}))
    page.reload()
    page.get_by_text("only").first.wait_for()
    assert page.get_by_label("model").is_hidden()


@pytest.mark.parametrize("clipboard", [True, False], ids=["by its API", "over plain HTTP"])
def test_a_text_is_copied(visit: Visits, clipboard: bool) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    if not clipboard:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    generate(page, prompt="KING", max_new_tokens="12")
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("status").get_by_text("The text is copied.").wait_for()
    copied = page.locator(".card .text").text_content()
    page.get_by_label("prompt").fill("")
    page.get_by_label("prompt").press("Control+V")
    assert page.get_by_label("prompt").input_value() == copied


def picture(page: Page, to: Path) -> tuple[int, int]:
    """Save the first card as an image: its width and height."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as image").first.click()
    assert download.value.suggested_filename == f"{MODEL}.png"
    download.value.save_as(to)
    content = to.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_an_image_holds_prompt_and_text_in_wrapped_lines(visit: Visits, tmp_path: Path) -> None:
    page = visit()
    answer_with(page, token_event("word " * 20, **LAST))
    generate(page, prompt="a")
    width, low = picture(page, tmp_path / "low.png")
    generate(page, prompt="a" * 500)  # no space to break it at
    assert picture(page, tmp_path / "high.png")[0] == width
    assert picture(page, tmp_path / "high.png")[1] > low + 300
    assert (tmp_path / "high.png").stat().st_size > (tmp_path / "low.png").stat().st_size
    page.context.set_offline(True)
    picture(page, tmp_path / "offline.png")
    page.context.set_offline(False)
    page.unroute_all()
    answer_with(page, token_event("line\n" * 9000, **LAST))
    generate(page)
    page.get_by_role("button", name="Save as image").click()
    page.get_by_role("status").get_by_text("too long for one image").wait_for()


def test_continue_and_clear(visit: Visits) -> None:
    page = visit()
    generate(page, prompt="KING", max_new_tokens="12", seed="1")
    whole = "KING" + (page.locator(".card .text").text_content() or "")
    page.get_by_role("button", name="Continue").click()
    assert page.get_by_label("prompt").input_value() == whole
    page.get_by_role("button", name="Clear").click()
    assert page.get_by_label("prompt").input_value() == ""
    assert page.locator(".card").count() == 0
    assert page.get_by_label("seed").input_value() == "1"
    assert "#" not in page.url
    page.get_by_text("More", exact=True).click()
    page.get_by_role("button", name="Defaults").click()
    assert page.get_by_label("seed").input_value() == ""


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_dark_mode_follows_the_system_and_the_button(visit: Visits) -> None:
    light, page = visit(color_scheme="light"), visit(color_scheme="dark")
    button = page.get_by_role("button", name="Dark mode")
    dark = background(page)
    assert dark != background(light)
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert background(page) == background(light)
    page.reload()
    assert background(page) == background(light)
    assert button.get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("width", [360, 320])
def test_nothing_is_wider_than_a_phone(visit: Visits, width: int) -> None:
    page = visit(viewport={"width": width, "height": 740}, is_mobile=True, has_touch=True)
    page.get_by_text("More", exact=True).click()
    generate(page, prompt="x" * 200, samples="2", max_new_tokens="20")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in ("Generate", "Stop"):
        assert page.get_by_role("button", name=name).is_visible()
    page.locator(".token").last.tap()
    box = page.get_by_role("tooltip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_nothing_moves_where_less_motion_is_asked_for(visit: Visits) -> None:
    names = []
    for wish in ("no-preference", "reduce"):
        page = visit(reduced_motion=wish)
        endless(page)
        names.append(
            page.evaluate("getComputedStyle(document.querySelector('.running .text'), '::after').animationName")
        )
        page.keyboard.press("Escape")
    assert names == ["blink", "none"]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing_to_mend(visit: Visits, scheme: str, width: int) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        left_out("axe-playwright-python is not installed")
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.get_by_text("More", exact=True).click()
    generate(page, prompt="KING RICHARD:", samples="3", max_new_tokens="30", temperature="5", top_k="0")
    generate(page, wait="Not sent", temperature="300")
    page.locator(".token").first.hover()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
