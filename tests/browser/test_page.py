"""The playground's page in Chromium."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playground_server import Gate, Server, make_playground, serve, wait_until

from nanogpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with playwright.sync_playwright() as tools:
        yield tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Page:
    """The page in a browser, its errors, and its requests for texts."""

    def __init__(self, page: Any, server: Server):
        self.page = page
        self.server = server
        self.errors: list[str] = []
        self.requests: list[dict[str, Any]] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: request.method == "POST" and self.requests.append(request.post_data_json))
        page.goto(f"http://127.0.0.1:{server.port}/")
        self.generate("<b>", 12)

    def generate(self, prompt: str, max_new_tokens: int) -> None:
        self.page.fill("#prompt", prompt)
        for field in self.page.locator("[name=max_new_tokens]:visible").all():
            field.fill(str(max_new_tokens))
        self.page.keyboard.press("Control+Enter")

    def text(self, column: int = 0) -> str:
        return self.page.locator(".text").nth(column).text_content()

    def wait_for_status(self, pattern: str, column: int = 0) -> None:
        status = self.page.locator(".status").nth(column)
        wait_until(lambda: bool(re.fullmatch(pattern, status.text_content())))


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    """A model whose texts are full of HTML."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "loss": {4 - i / 50}}}\n' for i in range(50)))
    with serve(make_playground(Tokenizer.characters("<b>/&; \n\tx"), extra_ids=0), metrics) as server:
        tab = browser.new_page()
        page = Page(tab, server)
        yield page
        tab.close()
        assert page.errors == []


def test_page_shows_text_and_probabilities(page: Page):
    page.wait_for_status(r"12 tokens, [\d,.]+ tok/s")
    page.page.locator("[name=temperature]").first.fill("3")  # improbable tokens too
    page.generate("<b>", 30)
    page.wait_for_status(r"30 tokens.*")
    tokens = page.server.generate(prompt="<b>", max_new_tokens=30, temperature=3, seed=1337)
    assert page.text() == "<b>" + "".join(token["text"] for token in tokens)
    spans = page.page.locator(".token").all()
    assert [span.text_content() for span in spans] == [token["text"] for token in tokens]
    shades = [float(span.evaluate("node => node.style.getPropertyValue('--surprise')")) for span in spans]
    assert shades == [pytest.approx(min(1, -math.log2(token["p"]) / 7), abs=1e-3) for token in tokens]
    marks = [span.get_attribute("data-mark") for span in spans if "\n" in span.text_content()]
    assert marks == ["↵"] * len(marks) != []


def test_page_branches_by_pointer(page: Page):
    page.wait_for_status(r"12 tokens.*")
    text = page.text()
    card = page.page.locator("#alternatives")
    tokens = page.server.generate(prompt="<b>", max_new_tokens=12, temperature=0.8, seed=1337)
    page.page.locator(".token").nth(4).hover()
    assert card.is_visible()
    rows = card.locator("button:enabled").all_text_contents()
    assert len(rows) == 5
    assert all(re.search(r"\d%$", row) for row in rows)
    assert card.locator("button:disabled").count() == 1
    alternative = next(token for token in tokens[4]["alternatives"] if token["text"] not in " \n\t")
    card.get_by_text(alternative["text"], exact=True).click()
    page.wait_for_status(r"12 tokens.*")
    prefix = page.server.playground.tokenizer.encode("<b>") + [token["id"] for token in tokens[:4]]
    assert page.requests[-1]["ids"] == [*prefix, alternative["id"]]
    assert page.text()[:8] == text[:7] + alternative["text"]
    assert page.page.locator(".token").count() == 4 + 1 + 12  # those before the branch are still shaded
    page.page.get_by_role("button", name="Continue").first.click()
    wait_until(lambda: page.page.locator(".token").count() == 4 + 1 + 24)
    page.wait_for_status(r"12 tokens.*")
    for _ in range(2):
        page.page.get_by_role("button", name="Back").first.click()
    assert page.text() == text


def test_page_branches_by_keyboard(page: Page):
    page.wait_for_status(r"12 tokens.*")
    card = page.page.locator("#alternatives")
    tokens = page.server.generate(prompt="<b>", max_new_tokens=12, temperature=0.8, seed=1337)
    page.page.locator(".text [tabindex='0']").first.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.page.keyboard.press(key)
    assert card.locator("button:focus").count() == 1
    page.page.keyboard.press("Enter")
    page.wait_for_status(r"12 tokens.*")
    ids = [*page.server.playground.tokenizer.encode("<b>"), tokens[0]["id"], tokens[1]["alternatives"][0]["id"]]
    assert page.requests[-1]["ids"] == ids
    assert page.page.locator(".token:focus").get_attribute("data-index") == "4"
    page.page.keyboard.press("ArrowDown")
    assert card.is_visible()
    for _ in range(2):
        page.page.keyboard.press("Escape")
    assert card.is_hidden()


def test_page_compares_queues_and_stops(page: Page):
    page.wait_for_status(r"12 tokens.*")
    playground = page.server.playground
    gate = Gate(playground)
    page.page.check("#compare")
    page.page.locator("[name=temperature]").nth(1).fill("1.5")
    page.generate("<b>", 30)
    statuses = page.page.locator(".status")
    wait_until(lambda: sorted(statuses.all_text_contents()) == ["queued, 1 ahead", "reading the prompt"])
    gate.permits.release(30 + 30)
    for column in (0, 1):
        page.wait_for_status(r"30 tokens.*", column)
    assert sorted(request["temperature"] for request in page.requests[-2:]) == [0.8, 1.5]
    assert page.text(0) != page.text(1)

    page.generate("<b>", 5000)
    wait_until(lambda: len(playground.queue) == 2)
    page.page.keyboard.press("Escape")
    for column in (0, 1):
        page.wait_for_status(r"stopped", column)
    wait_until(lambda: playground.queue == [])
    gate.open()
    page.generate("<b>", 5000)
    wait_until(lambda: len(playground.queue) == 2)
    page.page.goto("about:blank")
    wait_until(lambda: playground.queue == [])


def test_page_follows_curves_and_shows_errors(page: Page):
    losses = page.page.locator("#losses")
    wait_until(lambda: losses.text_content() == "train loss 3.020")
    drawn = page.page.locator("#plot path.train").get_attribute("d")
    with page.server.metrics.open("a") as file:
        file.write('{"step": 50, "loss": 2.5}\n{"step": 50, "val_loss": 2.625}\n{"step"')
    wait_until(lambda: losses.text_content() == "train loss 2.500val loss 2.625")
    assert page.page.locator("#plot path.train").get_attribute("d") != drawn
    page.generate("Q", 5)
    page.wait_for_status(r".*'Q'.*")
    assert len(page.errors) == 1  # the browser's own, about status 400
    page.errors.clear()


def test_page_is_dark_and_narrow(page: Page):
    def background() -> str:
        return page.page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light = background()
    page.page.emulate_media(color_scheme="dark")
    assert background() != light
    page.page.check("#compare")
    page.page.set_viewport_size({"width": 360, "height": 700})
    page.generate("<b>", 300)
    page.wait_for_status(r"300 tokens.*", column=1)
    assert page.page.evaluate("() => document.documentElement.scrollWidth") == 360
