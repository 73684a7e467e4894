"""The pages in Chromium, offline: they draw, react to pointer and keyboard, and load nothing from the network."""

import json
import re
import runpy
import shutil
import sys

import pytest
import torch
import yaml

from data.tokenizer import load_tokenizer
from model import GPT
from tests.conftest import BROWSER_TIMEOUT as TIMEOUT

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")]
TEXT = "ROSALIND:\nThe forest of Arden is 7 leagues away"


@pytest.fixture
def open_page(browser):
    """`open_page(path)` opens a page offline. It must not log messages, raise errors or request other URLs."""
    contexts, messages, requests = [], [], []

    def open_(path, **options):
        context = browser.new_context(**{"offline": True, "viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri(), timeout=TIMEOUT)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def run(verses, tmp_path_factory, python):
    """The directory of a short run with a checkpoint."""
    directory = tmp_path_factory.mktemp("browser")
    config = {
        "run": {"name": "tiny", "dir": str(directory)},
        "model": {"preset": None, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64},
        "data": {"dir": str(verses), "batch_tokens": 256, "sequence_length": 64, "micro_batch": 4},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "steps": 30},
        "eval": {"every": 10, "samples": 1, "hellaswag": False},
        "checkpoint": {"every": 0},
        "system": {"device": "cpu", "dtype": "float32"},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    python("train.py", "--config", path)
    return directory / "tiny"


def write(command, *arguments):
    """Run `python -m command ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *map(str, arguments)])
        runpy.run_module(command, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    """A directory with the page of each command."""
    directory = tmp_path_factory.mktemp("pages")
    write("report", run, "--out", directory / "report.html")
    for name in ("attention", "tokens"):
        write(f"report.{name}", "--model", run, "--text", TEXT, "--out", directory / f"{name}.html")
    write("report.embeddings", "--model", run, "--out", directory / "embeddings.html")
    return directory


@pytest.fixture(scope="module")
def model(run):
    checkpoint = next((run / "checkpoints").iterdir())
    return GPT.from_pretrained(checkpoint), load_tokenizer(checkpoint)


def visible_lines(page, chart):
    return page.evaluate(f"document.getElementById('{chart}').data.map(trace => trace.visible !== false)")


def place(page, x, y):
    """Return the screen position of a point of the first chart."""
    page.locator("#chart-0").scroll_into_view_if_needed()
    return page.evaluate(
        """([x, y]) => {
            const chart = document.getElementById("chart-0"), box = chart.getBoundingClientRect();
            const {xaxis, yaxis} = chart._fullLayout;
            return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
        }""",
        [x, y],
    )


def test_a_tooltip_shows_the_values_of_metrics_jsonl(run, tmp_path, open_page):
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    out = tmp_path / "two.html"
    write("report", run, other, "--out", out)
    page = open_page(out)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    val = next(record for record in records if record["split"] == "val" and record["step"] == 20)

    # The two runs are identical. Hide the second in all charts.
    assert visible_lines(page, "chart-0") == [False, True, True, False, True, True]
    page.get_by_label("other").uncheck()
    assert visible_lines(page, "chart-0") == [False, True, True, False, False, False]
    page.get_by_label("running mean").uncheck()
    assert visible_lines(page, "chart-0") == [False, False, True, False, False, False]
    assert visible_lines(page, "chart-2") == [True, False]  # the learning rate has no running mean and no validation

    x, y = place(page, val["tokens"], val["loss"])
    page.mouse.move(x - 40, y - 30)
    page.mouse.move(x, y)
    tooltip = page.locator("#chart-0 .hoverlayer .hovertext")
    tooltip.wait_for()
    shown = tooltip.text_content()
    assert "tiny, validation" in shown
    assert "step 20" in shown
    assert f"{val['loss']:.4f}" in shown
    assert page.get_by_text("Share chart").count() == 0
    assert page.locator("[data-title^='Share']").count() == 0  # the Share button of plotly uploads the data


def test_a_tap_shows_a_tooltip_and_keeps_the_zoom(run, pages, open_page):
    page = open_page(
        pages / "report.html",
        viewport={"width": 390, "height": 800},
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    val = [record for record in records if record["split"] == "val"]
    zoom = [val[1]["tokens"], 2 * val[2]["tokens"] - val[1]["tokens"]]  # the third validation is in the middle
    page.evaluate("zoom => Plotly.relayout('chart-0', {'xaxis.range': zoom})", zoom)
    page.touchscreen.tap(*place(page, val[2]["tokens"], val[2]["loss"]))
    page.wait_for_timeout(500)  # plotly waits 300 ms for a second tap
    assert f"{val[2]['loss']:.4f}" in page.locator("#chart-0 .hoverlayer .hovertext").text_content()
    assert page.evaluate("document.getElementById('chart-0')._fullLayout.xaxis.range") == zoom


def test_hovering_over_a_token_shows_its_attention(pages, model, open_page):
    gpt, tokenizer = model
    page = open_page(pages / "attention.html")
    ids = tokenizer.encode(TEXT)
    attentions = gpt(torch.tensor([ids]), output_attentions=True).attentions

    page.get_by_role("button", name="layer 1, head 0").click()
    assert page.locator("#layer").input_value() == "1"
    page.locator("#flow span").nth(20).hover()
    weights = attentions[1][0, 0, 20, :21].tolist()
    shown = page.locator("#flow span").evaluate_all("spans => spans.map(span => span.style.background)")
    alphas = [float(re.search(r"([\d.]+)\)$", background)[1]) if background else 0.0 for background in shown]
    assert alphas[21:] == [0.0] * (len(ids) - 21)  # attention is causal
    for alpha, weight in zip(alphas, weights, strict=False):
        assert (alpha / 0.6) ** 2 * max(weights) == pytest.approx(weight, abs=1 / 255)
    rows = page.locator("#panel tbody tr").all_inner_texts()
    for row in rows:
        _, token, shown_weight = row.split("\t")
        assert float(shown_weight.removesuffix(" %")) / 100 == pytest.approx(weights[int(token)], abs=1 / 255)
    assert int(rows[0].split("\t")[1]) == max(range(21), key=weights.__getitem__)

    page.locator("#heads button", has_text="all").click()
    page.locator("#flow").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#flow [aria-current]").evaluate("span => [...span.parentNode.children].indexOf(span)") == 19
    mean = attentions[1][0, :, 19].mean(dim=0).tolist()
    for row in page.locator("#panel tbody tr").all_inner_texts():
        _, token, shown_weight = row.split("\t")
        assert float(shown_weight.removesuffix(" %")) / 100 == pytest.approx(mean[int(token)], abs=1 / 255)


def test_the_tokens_page_shows_losses_and_predictions(pages, model, open_page):
    gpt, tokenizer = model
    page = open_page(pages / "tokens.html")
    ids = tokenizer.encode(TEXT)
    log_p = gpt(torch.tensor([[tokenizer.eot, *ids[:-1]]])).logits[0].log_softmax(dim=-1)
    page.locator("#flow span").nth(12).hover()
    panel = page.locator("#panel").inner_text()
    assert f"loss {-log_p[12, ids[12]].item():.4f} nats" in panel
    first = page.locator("#panel table").first.locator("tbody tr").first.inner_text().split("\t")
    assert float(first[1].removesuffix(" %")) / 100 == pytest.approx(log_p[12].max().exp().item(), abs=6e-4)
    assert page.locator("#lens tbody tr").count() == gpt.config.n_layer + 1
    # Bytes are shown as they are, invisible characters by their code.
    quoted = page.evaluate(r"['⟨20 F0⟩', '\0 a\n\u202e'].map(token => quoted(token).textContent)")
    assert quoted == ["⟨20 F0⟩", "⟨U+0000⟩␣a⏎⟨U+202E⟩"]


def test_position_embeddings_of_a_dimension(pages, model, open_page):
    page = open_page(pages / "embeddings.html")
    page.get_by_label("dimensions", exact=True).fill("3, 99")
    page.keyboard.press("Enter")
    assert "from 0 to 31" in page.locator("#message").inner_text()
    drawn = page.evaluate("document.getElementById('curves').data.map(trace => [...trace.y])")
    assert drawn == [pytest.approx(model[0].transformer.wpe.weight[:, 3].tolist())]
    image_size = page.evaluate(
        "[document.getElementById('image')].map(e => [e.calcdata[0][0].z.length, e.calcdata[0][0].z[0].length])"
    )
    assert image_size == [[64, 32]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_on_a_phone_screen(pages, open_page, scheme):
    for path in sorted(pages.glob("*.html")):
        page = open_page(path, color_scheme=scheme, viewport={"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for text in page.locator("pre").all():  # nothing is below a border that shows no scroll bar
            assert text.evaluate("pre => pre.scrollHeight <= pre.clientHeight + 1")
        background, color = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (background, color) == {
            "light": ("rgb(255, 255, 255)", "rgb(27, 29, 34)"),
            "dark": ("rgb(20, 23, 28)", "rgb(232, 234, 238)"),
        }[scheme]
