"""The page in Chromium: it generates, shows alternatives and next tokens, and names what is impossible."""

import pytest
import torch

from generation import generate_text
from tests.conftest import BROWSER_TIMEOUT

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(BROWSER_TIMEOUT)
    messages, requests = [], []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    yield page
    context.close()
    assert messages == []
    assert [url for url in requests if not url.startswith((server.url, "data:"))] == []


def test_text_streams_in_and_a_token_shows_its_alternatives(server, page):
    expected = generate_text(server.model, server.tokenizer, ["Hello"], max_new_tokens=20)[0].text
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_label("temperature").fill("0")
    page.get_by_label("new tokens").fill("20")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("20 tokens in").wait_for()
    spans = page.locator("#flow span[data-token]")
    shown = "".join(spans.all_text_contents()).replace("⏎\n", "\n")
    assert shown == expected
    logits = server.model(torch.tensor([server.tokenizer.encode("Hello" + expected)])).logits[0]
    spans.nth(7).hover()
    rows = [row.split("\t") for row in page.locator("#panel tbody tr").all_inner_texts()]
    values, best = logits[5 + 7 - 1].softmax(dim=-1).topk(8)
    for (token, probability), value, one in zip(rows, values.tolist(), best.tolist(), strict=True):
        assert token == server.tokenizer.decode([one]).replace(" ", "␣").replace("\n", "⏎")
        assert float(probability.removesuffix(" %")) / 100 == pytest.approx(value, abs=6e-4)
    page.keyboard.press("Tab")
    page.locator("#flow").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#panel h3").inner_text().startswith("Token 6 ")


def test_next_tokens_can_be_added_to_the_prompt(server, page):
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Next token").click()
    page.locator("#panel tbody tr").nth(19).wait_for()
    best = server.model(torch.tensor([server.tokenizer.encode("Hello")])).logits[0, -1].argmax().item()
    page.locator("#panel tbody button").first.click()
    text = "Hello" + server.tokenizer.decode([best])
    page.wait_for_function("text => document.getElementById('prompt').value === text", arg=text)


def test_beam_search_is_sent_without_the_settings_of_sampling(server, page):
    expected = generate_text(server.model, server.tokenizer, ["Hello"], max_new_tokens=9, num_beams=3)[0].text
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_label("seed").fill("1")
    page.get_by_label("beams").fill("3")
    page.get_by_label("new tokens").fill("9")
    for label in ("temperature", "top-k", "top-p", "seed"):
        assert page.get_by_label(label).is_disabled()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("9 tokens in").wait_for()
    shown = "".join(page.locator("#flow span[data-token]").all_text_contents())
    assert shown.replace("⏎\n", "\n") == expected
    page.get_by_label("beams").fill("1")
    assert page.get_by_label("temperature").is_enabled()


def test_stop_ends_a_text_and_an_impossible_prompt_shows_the_reason(server, page):
    page.get_by_label("new tokens").fill("4096")
    page.get_by_role("button", name="Generate").click()
    page.locator("#flow span[data-token]").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    server.wait_until_idle()
    page.get_by_label("Prompt").fill("Ω")
    page.get_by_role("button", name="Generate").click()
    page.locator("#message.error").wait_for()
    assert "Ω" in page.locator("#message").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_on_a_phone_screen(browser, server, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(server.url, timeout=BROWSER_TIMEOUT)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.close()
