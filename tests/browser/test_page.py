"""The playground's page in Chromium."""

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playground_server import Gate, Server, chat_tokenizer, make_playground, serve, wait_until

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

    def generate(self, prompt: str, max_new_tokens: int) -> None:
        self.page.fill("#prompt", prompt)
        for field in self.page.locator("[name=max_new_tokens]:visible").all():
            field.fill(str(max_new_tokens))
        self.page.keyboard.press("Control+Enter")

    def text(self, column: int = 0) -> str:
        return self.page.locator(".column .text").nth(column).text_content()

    def wait_for_status(self, pattern: str, column: int = 0) -> None:
        status = self.page.locator(".column .status").nth(column)
        wait_until(lambda: bool(re.fullmatch(pattern, status.text_content())))


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    """A model whose texts are full of HTML."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "loss": {4 - i / 50}}}\n' for i in range(50)))
    with serve(make_playground(Tokenizer.characters("<b>/&; \n\tx"), extra_ids=0), metrics) as server:
        tab = browser.new_page()
        page = Page(tab, server)
        page.generate("<b>", 12)
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
    statuses = page.page.locator(".column .status")
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


def test_page_draws_long_and_diverged_curves(page: Page):
    with page.server.metrics.open("a") as file:
        file.writelines(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(50, 150_000))
        file.write('{"step": 150000, "loss": 1e18}\n')
    wait_until(lambda: "step 150,000" in page.page.locator("#plot").text_content(), seconds=60)
    assert 1 <= page.page.locator("#plot line").count() <= 5


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


# --- Conversations


class ChatPage(Page):
    """The page of a model with a chat template."""

    def __init__(self, page: Any, server: Server):
        super().__init__(page, server)
        self.page.locator("#chat-view [name=max_new_tokens]").fill("12")
        self.page.locator("#chat-view [name=temperature]").fill("2")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.keyboard.press("Enter")
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self.page.locator("#stop-answer:disabled").wait_for()

    def stream(self, gate: Gate, message: int, count: int) -> None:
        """Let the model generate `count` tokens of a message, and wait for them."""
        for n in range(1, count + 1):
            wait_until(lambda: self.page.locator("#chat-status").text_content().startswith(("reading", "generating")))
            self.page.wait_for_timeout(50)  # longer than a frame: the token is sent at once
            gate.permits.release()
            wait_until(lambda n=n: self.message(message).locator(".token").count() == n)

    def press(self, message: int, button: str) -> None:
        self.message(message).get_by_role("button", name=button, exact=True).click()

    def message(self, number: int) -> Any:
        return self.page.locator(".message").nth(number)

    @property
    def texts(self) -> list[str]:
        return self.page.locator(".message .text").all_text_contents()

    def version(self, message: int) -> str:
        label = self.message(message).get_attribute("aria-label")
        return ", ".join(label.split(", ")[1:])

    def answer(self, *contents: str, seed: int = 1337, **settings: Any) -> str:
        """The answer of the server itself to messages of a user and the assistant by turns."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        request = {"messages": messages, "seed": seed, "max_new_tokens": 12, "temperature": 2} | settings
        return "".join(token["text"] for token in self.server.generate(**request))


@pytest.fixture
def chat(browser: Any, tmp_path: Path) -> Iterator[ChatPage]:
    """A model that never ends an answer, unless a test deletes `decoder.generate`."""
    playground = make_playground(chat_tokenizer(), extra_ids=0, block_size=256)
    generate = playground.decoder.generate
    num_letters = min(playground.tokenizer.special_tokens.values())

    def generate_letters(texts: Any, count: int, sampling: Any, **options: Any) -> Iterator[Any]:
        return generate(texts, count, dataclasses.replace(sampling, vocab_size=num_letters), **options)

    playground.decoder.generate = generate_letters  # type: ignore[method-assign]
    with serve(playground, tmp_path / "metrics.jsonl") as server:
        tab = browser.new_page()
        page = ChatPage(tab, server)
        yield page
        tab.close()
        assert page.errors == []


def test_chat_answers_and_keeps_versions(chat: ChatPage):
    assert chat.page.locator("#views [aria-current]").text_content() == "Chat"
    chat.ask("Who <b>?")
    first = chat.answer("Who <b>?")
    assert chat.texts == ["Who <b>?", first]
    chat.ask("And?")
    second = chat.answer("Who <b>?", first, "And?")
    assert chat.texts == ["Who <b>?", first, "And?", second]
    assert "12 tokens, the limit" in chat.message(3).text_content()

    # Another answer, then another question after it.
    chat.press(1, "Regenerate")
    chat.wait_for_end()
    other = chat.answer("Who <b>?", seed=1338)
    assert chat.texts == ["Who <b>?", other]
    assert other != first
    assert chat.version(1) == "version 2 of 2"
    chat.ask("Why?")
    third = chat.answer("Who <b>?", other, "Why?")
    assert chat.texts == ["Who <b>?", other, "Why?", third]
    chat.press(1, "Previous version")
    assert chat.texts == ["Who <b>?", first, "And?", second]
    assert chat.page.locator("button:focus").text_content() == "‹"
    chat.page.keyboard.press("Enter")  # from the first version to the last
    assert chat.texts == ["Who <b>?", other, "Why?", third]

    # Another first question.
    chat.press(0, "Edit")
    field = chat.message(0).locator("textarea")
    assert field.input_value() == "Who <b>?"
    field.fill("Where?")
    field.press("Shift+Enter")
    field.press("Enter")
    chat.wait_for_end()
    where = chat.answer("Where?\n")
    assert chat.texts == ["Where?\n", where]
    chat.press(0, "Next version")
    assert chat.texts == ["Who <b>?", other, "Why?", third]

    # Another conversation, and back.
    chat.page.click("#new")
    assert chat.texts == []
    chat.page.click("#back")
    assert chat.texts == ["Where?\n", where]
    assert chat.version(0) == "version 2 of 2"
    chat.page.click("#new")
    chat.ask("Who?")
    assert chat.version(0) == "version 3 of 3"


def test_chat_edits_answers(chat: ChatPage):
    chat.ask("Who?")
    first = chat.texts[1]
    chat.press(1, "Edit")
    chat.page.keyboard.press("Escape")
    assert chat.texts == ["Who?", first]
    chat.press(1, "Edit")
    chat.message(1).locator("textarea").fill("It is <|im_end|>")
    chat.press(1, "Save")
    assert chat.texts == ["Who?", "It is <|im_end|>"]
    assert chat.page.locator("button:focus").text_content() == "Edit"
    chat.ask("And?")
    assert chat.texts[3] == chat.answer("Who?", "It is <|im_end|>", "And?")

    chat.press(1, "Edit")
    chat.message(1).locator("textarea").fill("It was")
    chat.press(1, "Save and continue")
    chat.wait_for_end()
    continued = "It was" + chat.answer("Who?", "It was", seed=1339)
    assert chat.texts == ["Who?", continued]
    assert chat.version(1) == "version 3 of 3"
    assert chat.message(1).locator(".token").count() == 12
    chat.press(1, "Continue")
    chat.wait_for_end()
    assert chat.requests[-1]["messages"] == [{"role": "user", "content": "Who?"}]
    ids = chat.server.playground.tokenizer.encode("It was")
    assert chat.requests[-1]["ids"][: len(ids)] == ids
    assert chat.texts[1].startswith(continued)
    assert chat.message(1).locator(".token").count() == 24


def test_chat_streams_and_stops(chat: ChatPage):
    gate = Gate(chat.server.playground)
    chat.page.fill("#question", "Who?")
    chat.page.click("#send")
    chat.stream(gate, 1, 5)
    assert chat.page.locator("#announcement").text_content() == "generating"
    chat.page.keyboard.press("Escape")
    assert chat.page.locator("#chat-status").text_content() == "stopped"
    wait_until(lambda: chat.server.playground.queue == [])
    stopped = chat.texts[1]

    # The rest is what the answer would have been.
    gate.open()
    chat.page.locator("#chat-view [name=max_new_tokens]").fill("7")
    chat.press(1, "Continue")
    chat.wait_for_end()
    assert chat.texts[1] == chat.answer("Who?")
    assert chat.texts[1].startswith(stopped)
    assert chat.page.locator("#announcement").text_content() == chat.texts[1]

    # Stopped before its first token, an answer is none; a question without answer can be asked again, or replaced.
    gate.permits = type(gate.permits)(0)
    chat.page.fill("#question", "And?")
    chat.page.keyboard.press("Enter")
    wait_until(lambda: len(gate.texts) >= 3)
    chat.page.click("#stop-answer")
    assert len(chat.texts) == 3
    gate.open()
    chat.press(2, "Answer")
    chat.wait_for_end()
    assert len(chat.texts) == 4
    chat.ask("x" * 250)
    assert "more than the context of 256" in chat.page.locator("#chat-status.error").text_content()
    assert len(chat.texts) == 5
    assert len(chat.errors) == 1  # the browser's own, about status 400
    chat.errors.clear()
    chat.ask("Shorter?")
    assert (len(chat.texts), chat.version(4)) == (6, "version 2 of 2")
    assert "without the oldest" not in chat.message(5).text_content()
    chat.ask("x" * 60)
    assert "without the oldest" in chat.message(7).text_content()


def test_chat_stopped_before_its_first_token_shows_the_answer_of_before(chat: ChatPage):
    chat.ask("Who?")
    for _ in range(2):
        chat.press(1, "Regenerate")
        chat.wait_for_end()
    chat.press(1, "Next version")  # from the last to the first
    assert chat.version(1) == "version 1 of 3"
    first = chat.texts
    gate = Gate(chat.server.playground)
    chat.press(1, "Regenerate")
    wait_until(lambda: len(gate.texts) == 1)
    chat.page.keyboard.press("Escape")
    wait_until(lambda: chat.texts == first)
    assert chat.version(1) == "version 1 of 3"
    gate.open()


def test_chat_question_stops_the_answer_before(chat: ChatPage):
    gate = Gate(chat.server.playground)
    chat.page.fill("#question", "Who?")
    chat.page.keyboard.press("Enter")
    chat.stream(gate, 1, 2)
    (first,) = chat.server.playground.queue
    chat.page.fill("#question", "And?")
    chat.page.keyboard.press("Enter")
    wait_until(lambda: first not in chat.server.playground.queue)
    gate.permits.release()  # for its step in progress
    wait_until(lambda: len(gate.texts) == 2)
    chat.stream(gate, 3, 2)
    assert [len(text) for text in chat.texts] == [4, 2, 4, 2]
    assert chat.page.locator("#stop-answer").is_enabled()
    assert "stopped" in chat.message(1).text_content()
    assert [message["content"] for message in chat.requests[-1]["messages"]] == ["Who?", chat.texts[1], "And?"]
    gate.open()
    chat.wait_for_end()
    assert len(chat.texts[3]) == 12


def test_chat_has_system_prompt_and_alternatives(chat: ChatPage):
    chat.page.fill("#system", "Be brief.")
    chat.ask("Who?")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert chat.requests[-1]["messages"] == messages
    request = chat.requests[-1]
    tokens = chat.server.generate(**request)
    assert chat.texts[1] == "".join(token["text"] for token in tokens)

    # By the keyboard: another third token.
    chat.message(1).locator("[tabindex='0']").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter", "ArrowDown", "Enter"):
        chat.page.keyboard.press(key)
    chat.wait_for_end()
    rows = sorted([tokens[2], *tokens[2]["alternatives"]], key=lambda token: -token["p"])
    alternative = [row for row in rows if row["id"] != tokens[2]["id"]][1]
    assert chat.requests[-1]["messages"] == messages
    assert chat.requests[-1]["ids"] == [tokens[0]["id"], tokens[1]["id"], alternative["id"]]
    assert chat.version(1) == "version 2 of 2"
    assert chat.message(1).locator(".token").count() == 3 + 12
    assert chat.page.locator(".message:focus").get_attribute("aria-label") == "Answer, version 2 of 2"

    # An end as an alternative ends the answer without the model.
    end = chat.server.playground.tokenizer.encode("<|im_end|>")[0]
    chat.page.evaluate(
        """id => {
          const answer = conversation.path[1];
          answer.text.tokens[1].alternatives[0] = {id, text: "<|im_end|>", p: 0.25};
        }""",
        end,
    )
    count = len(chat.requests)
    chat.message(1).locator(".token").nth(1).hover()
    chat.page.locator("#alternatives").get_by_text("<|im_end|>").click()
    assert (len(chat.requests), chat.version(1)) == (count, "version 3 of 3")
    assert chat.texts[1] == tokens[0]["text"]
    assert chat.message(1).locator(".token").nth(1).get_attribute("data-mark") == "▪"
    chat.ask("And?")
    assert [message["content"] for message in chat.requests[-1]["messages"]] == [
        *("Be brief.", "Who?", tokens[0]["text"], "And?")
    ]


def test_chat_says_what_ended_an_answer(chat: ChatPage):
    del chat.server.playground.decoder.generate
    chat.page.locator("#chat-view [name=max_new_tokens]").fill("400")
    chat.page.locator("#chat-view [name=temperature]").fill("9")
    chat.ask("Who?")
    name = re.search(r"tokens, ended by (\S+), ", chat.message(1).text_content())
    assert name
    assert name[1] in ("<|im_end|>", "<|endoftext|>")
    assert chat.message(1).locator(".token").last.get_attribute("data-mark") == "▪"
    assert not chat.message(1).get_by_role("button", name="Continue").is_visible()
    chat.message(1).locator(".token").last.hover()
    assert chat.page.locator("#alternatives button:disabled code").text_content() == name[1]


def test_chat_survives_a_reload(chat: ChatPage):
    chat.page.fill("#system", "Be brief.")
    chat.ask("Who?")
    chat.press(1, "Regenerate")
    chat.wait_for_end()
    gate = Gate(chat.server.playground)
    chat.page.fill("#question", "And?")
    chat.page.keyboard.press("Enter")
    chat.stream(gate, 3, 3)
    texts = chat.texts
    chat.page.reload()
    wait_until(lambda: chat.texts == texts)
    gate.open()
    assert chat.page.input_value("#system") == "Be brief."
    assert chat.version(1) == "version 2 of 2"
    wait_until(lambda: chat.server.playground.queue == [])
    chat.press(3, "Continue")
    chat.wait_for_end()
    assert len(chat.requests[-1]["ids"]) == 3
    chat.message(1).locator(".token").nth(1).hover()
    assert chat.page.locator("#alternatives button").count() == 6
    chat.press(1, "Previous version")
    assert len(chat.texts) == 2

    # The other view, by its link and address.
    chat.page.get_by_role("link", name="Text").click()
    chat.page.reload()
    chat.generate("Who", 5)
    chat.wait_for_status(r"5 tokens.*")
    assert chat.page.locator("#chat-view").is_hidden()
    chat.page.get_by_role("link", name="Chat").click()
    assert len(chat.texts) == 2


def test_chat_is_dark_and_narrow(chat: ChatPage):
    chat.page.set_viewport_size({"width": 360, "height": 700})
    chat.page.emulate_media(color_scheme="dark")
    chat.page.locator("#chat-view [name=max_new_tokens]").fill("100")
    chat.ask("x" * 90)
    chat.press(1, "Edit")
    assert chat.page.evaluate("() => document.documentElement.scrollWidth") == 360
    assert (
        chat.page.evaluate("() => getComputedStyle(document.querySelector('.message .text')).color") != "rgb(0, 0, 0)"
    )
    chat.page.reload()
    chat.page.locator(".message").first.wait_for()
    assert not chat.page.locator("#system").is_visible()  # the settings are folded
