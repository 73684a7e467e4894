"""The pages as files: their contents, their size, and invalid input."""

import base64
import itertools
import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.tokenizer import load_tokenizer
from eval.reference import published_losses, save_reference
from model import GPT, GPTConfig
from report import page
from report.all_pages import PAGES, example_text
from report.charts import COLORS, POINTS, by_validation_set, make_charts, thin
from report.model_pages import packed_attentions, predict_tokens, similarity
from report.page import token_labels
from report.run_log import read_run_log
from report.runs_page import page_values, progress_tables
from report.tables import differences, evaluation_table, format_count, loss_thresholds, reached
from tests.conftest import VERSES

HOSTILE = "<script>alert(1)</script> & שלום 😀"


def write_run(directory, n=40, *, spike=None, config=None, samples=HOSTILE):
    """Write the directory of a run with `n` steps of 1,000 tokens and half a second, validated every tenth step."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(n)
    lines = []
    for step in range(n + 1):
        loss = 3 + 7 / (1 + step) + rng.normal(0, 0.01)
        if step:
            train = {"step": step, "tokens": step * 1000, "loss": loss + (5 if step == spike else 0), "lr": 1e-3 / step}
            train |= {"grad_norm": 1 + step % 3, "tokens_per_second": 2000.0, "mfu": None, "seconds": step / 2}
            lines.append({"split": "train", **train})
        if step % max(10, n // 80) == 0:
            lines.append({"split": "val", "step": step, "tokens": step * 1000, "loss": loss, "bits_per_byte": loss / 3})
            accuracy = {"acc": 0.26, "acc_norm": 0.25 + step / n / 20, "convention": "completion"}
            lines.append({"split": "hellaswag", "step": step, "tokens": step * 1000, **accuracy})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    incomplete = '{"split": "train", "step": 9'  # as after a crash
    (directory / "metrics.jsonl").write_text(text + incomplete, encoding="utf-8")
    config = config or {"data": {"dir": "data/gone", "sequence_length": 64}, "eval": {"tokens": 10}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (directory / "samples.txt").write_text(f"==== step 0, sample 1\n{samples}\n\n==== step 0, sample 2\nb\n\n")
    return directory


def report(*arguments, command="report"):
    """Run `python -m report ...` in this process; return its exit status, or None if it returns normally."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *map(str, arguments)])
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code
    return None


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_thinning_keeps_extremes_and_ends():
    values = np.random.default_rng(0).normal(size=20_000)
    values[12_345], values[4_321] = 50, -50
    kept = thin(values)
    assert len(kept) <= POINTS
    assert {0, 12_345, 4_321, 19_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    for i in range(0, 20_000, 7):  # close to each value, one at least as high and one at least as low remain
        shown = values[kept[abs(kept - i) <= 2 * 20_000 / POINTS + 1]]
        assert shown.min() <= values[i] <= shown.max()
    np.testing.assert_array_equal(thin(values[:POINTS]), np.arange(POINTS))


def test_a_page_shows_the_results_of_a_run_and_escapes_its_texts(tmp_path, capsys):
    run = write_run(tmp_path / "a <b>x", spike=30)
    row = {"task": "lambada", "convention": "harness", "metric": "acc", "value": 0.31, "stderr": 0.006, "count": 9}
    (run / "eval.json").write_text(json.dumps([row | {"published": {"gpt2": 0.3256, "gpt2-xl": 0.5}}]))
    assert report(run) is None
    page = run / "report.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; שלום 😀" in text
    assert "a &lt;b&gt;x" in text
    assert "<b>x" not in text.replace("\\u003cb\\u003ex", "")
    for value in ("0.3100 ± 0.0060", "0.3256", "0.5000", "0.2955"):
        assert value in text
    for key in ("loss-tokens", "loss-time", "hellaswag-completion", "lr", "grad-norm", "tokens-per-second"):
        assert (run / f"report-{key}.png").stat().st_size > 5000
    drawn = page_data(page)["charts"][0]["series"][0]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    expected = [record["loss"] for record in records if record["split"] == "train"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(drawn["y"]["bdata"])), expected)


def test_runs_with_different_validation_sets_have_separate_charts(tmp_path):
    other = {"data": {"dir": "data/other", "sequence_length": 64}, "eval": {"tokens": 10}}
    directories = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", 50, config=other),
        write_run(tmp_path / "c", 60),
    ]
    logs = [read_run_log(directory, directory.name) for directory in directories]
    assert by_validation_set(logs) == [[0, 2], [1]]
    losses = [chart for chart in make_charts(logs) if chart.key.startswith("loss")]
    assert [{series.run for series in chart.series} for chart in losses] == [{0, 2}, {0, 2}, {1}, {1}]
    assert differences(logs) == [("data.dir", ["data/gone", "data/other", "data/gone"])]
    out = tmp_path / "page.html"
    report(*directories, "--out", out)
    assert "validated on 2 different sets" in out.read_text(encoding="utf-8")
    report(directories[0], directories[2], "--out", out)
    assert "different sets" not in out.read_text(encoding="utf-8")


def test_the_validation_set_of_a_mixture_is_that_of_its_parts(tmp_path, verses):
    """data.dir is not used then, and may be missing or another dataset."""
    alone, other = (shutil.copytree(verses, tmp_path / name) for name in ("alone", "other"))
    save_reference(alone, "gpt2", {"loss": 1.0, "tokenizer": "char"})
    meta = json.loads((other / "meta.json").read_text())
    shards = [{**shard, "sha256": "0"} for shard in meta["shards"]["val"]]
    (other / "meta.json").write_text(
        json.dumps(meta | {"source": "letters", "shards": meta["shards"] | {"val": shards}})
    )

    def log(name, directory, *parts):
        mixture = [{"dir": str(part), "weight": 1.0} for part in parts]
        data = {"dir": str(directory), "mixture": mixture, "sequence_length": 64}
        return read_run_log(write_run(tmp_path / name, config={"data": data, "eval": {"tokens": 70}}), name)

    mixed, turned = log("a", alone, alone, other), log("b", tmp_path / "gone", other, alone)
    assert by_validation_set([mixed, turned, log("c", alone), log("d", other)]) == [[0, 1], [2], [3]]
    assert (mixed.validation.tokens, mixed.validation.tokenizer) == (140, "char")
    assert mixed.source == f"{meta['source']}; letters"
    assert (mixed.reference_losses, log("e", alone).reference_losses) == ([], [("gpt2", 1.0)])
    assert example_text(turned.config) == example_text(log("f", verses).config)


def test_tokens_and_time_to_a_loss(tmp_path):
    log = read_run_log(write_run(tmp_path / "a"), "a")
    val = log.splits["val"]  # steps 0, 10, 20, 30, 40
    assert reached(log, val["loss"][2]) == "20K · 10 s"
    assert reached(log, val["loss"][2] - 1e-9) == "30K · 15 s"
    assert reached(log, 1.0) == "not reached"
    thresholds = loss_thresholds([log])
    assert ("best of a", val["loss"].min()) in thresholds
    assert [loss for _, loss in thresholds] == sorted((loss for _, loss in thresholds), reverse=True)
    assert [format_count(n) for n in (999, 1_064_960, 10_267_000_000)] == ["999", "1.06M", "10.3B"]


def test_the_table_of_losses_shows_only_what_differs(tmp_path):
    def log(losses):
        directory = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), 20)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()[:-1]]
        val = [{"split": "val", "step": step, "tokens": step * 1000, "loss": loss} for step, loss in losses.items()]
        lines = [line for line in lines if line["split"] == "train"] + val
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_run_log(directory, "a")

    assert progress_tables([log({20: 3.0})], [[0]]) == []
    assert progress_tables([log({10: 3.0, 20: 3.0})], [[0]]) == []
    (table,) = progress_tables([log({5: 6.0, 10: 4.1, 20: 3.0})], [[0]])
    cells = [cells for _, _, cells in table["rows"]]
    assert len(cells) == len({tuple(row) for row in cells}) > 1


def test_evaluations_have_no_column_without_a_result_and_name_their_checkpoint(tmp_path):
    run = write_run(tmp_path / "a")
    row = {"task": "lambada", "convention": "harness", "metric": "acc", "value": 0.31, "stderr": 0.006, "count": 5153}
    row |= {"checkpoint": str(run / "checkpoints" / "step-000040"), "published": {"gpt2": 0.3256}}
    (run / "eval.json").write_text(json.dumps([row]))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = [record for record in records if record["split"] != "hellaswag"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    logs = [read_run_log(run, "a")]
    values = page_values(logs, make_charts(logs))
    assert values["sizes"] == [(0, "124M")]
    details = {row["key"][0]: row["details"] for row in values["evaluations"]}
    assert details == {"validation": ["step 40"], "lambada": ["step 40, 5,153 examples"]}


def test_all_writes_pages_that_link_to_each_other(finished_run):
    assert report("--all", finished_run) is None
    for name in PAGES:
        text = (finished_run / f"{name}.html").read_text(encoding="utf-8")
        assert [other for other in PAGES if f'href="{other}.html"' in text] == list(PAGES)
        assert f'href="{name}.html" aria-current="page"' in text
    shown = page_data(finished_run / "tokens.html")["tokens"]
    assert VERSES[0].startswith("ROSALIND")
    assert "".join(shown)[:20] in "".join(VERSES)


def test_all_needs_one_run_and_a_text(finished_run, tmp_path, capsys):
    assert report("--all", finished_run, finished_run) == 2
    assert "--all cannot be combined with --watch" in capsys.readouterr().err
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["dir"] = str(tmp_path / "gone")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert report("--all", copy) == 2
    assert "give one with --text" in capsys.readouterr().err
    assert report("--all", tmp_path / "missing") == 2
    assert "is not a run" in capsys.readouterr().err
    assert report("--all", copy, "--text", "ox of Kent", "--checkpoint", "10") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "ox"], "--text and --checkpoint choose what the pages of --all show: add --all, or omit them"),
        (["--checkpoint", "best"], "--text and --checkpoint choose what the pages of --all show: add --all"),
        (["--watch", "--text", "ox"], "--text and --checkpoint choose what the pages of --all show: add --all"),
        (["--port", "8765"], "--port is the port of --watch: add --watch, or omit it"),
        (["--all", "--port", "0"], "--port is the port of --watch: add --watch, or omit it"),
    ],
    ids=str,
)
def test_an_option_that_would_be_ignored_is_refused(tmp_path, capsys, options, message):
    run = write_run(tmp_path / "run", 4)
    assert report(run, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(run.glob("*.html"))


@pytest.fixture(scope="module")
def finished_run(verses, tmp_path_factory, python):
    """The directory of a short run."""
    directory = tmp_path_factory.mktemp("finished")
    sizes = ["--model.preset", "null", "--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16"]
    data = ["--data.dir", verses, "--data.batch_tokens", "64", "--data.sequence_length", "32"]
    run = ["--run.dir", directory, "--run.name", "tiny", "--optim.steps", "10", "--optim.warmup_steps", "2"]
    evaluation = ["--eval.every", "5", "--eval.hellaswag", "false", "--eval.samples", "1", "--model.block_size", "64"]
    python("train.py", *sizes, *data, *run, *evaluation, "--system.device", "cpu")
    return directory / "tiny"


def test_published_losses_are_found_by_the_source_of_the_dataset():
    assert published_losses("fineweb-edu-10b: sample-10BT") == {"gpt2": 3.2924}
    assert published_losses("fineweb-10b")["gpt2-xl"] == 2.831273
    assert published_losses("hf HuggingFaceFW/fineweb, sample-10BT")["gpt2"] == 3.424958
    assert published_losses("hf kjj0/fineweb10B-gpt2, already tokenized")["gpt2"] == 3.424958
    assert published_losses("hf Skylion007/openwebtext")["gpt2-xl"] == 2.54
    others = [
        "hf HuggingFaceFW/fineweb-2, fra_Latn",
        "hf HuggingFaceFW/fineweb-edu-score-2",
        "text, 1 file: fineweb.txt",
    ]
    for source in ("shakespeare, 38 plays", *others):
        assert published_losses(source) == {}


def test_an_evaluation_file_replaces_the_result_of_training(tmp_path):
    directory = write_run(tmp_path / "a")
    row = {"task": "hellaswag", "convention": "completion", "metric": "acc_norm", "value": 0.3333, "published": {}}
    (directory / "status.json").write_text('{"status": "finished", "step": 40}')
    (directory / "eval.json").write_text(json.dumps([row]))
    table = {row["key"]: row for row in evaluation_table([read_run_log(directory, "a")])}
    assert table["hellaswag", "completion", "acc_norm"]["cells"] == ["0.3333"]
    assert table["hellaswag", "completion", "acc"]["published"][0] == "0.2859"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no metrics.jsonl"), ("", "no complete record"), ('{"split": "tr', "no complete record")],
)
def test_a_run_without_metrics_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert report(tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command", ["report", "report.attention", "report.embeddings", "report.tokens"])
def test_help_does_not_import_torch(python, command):
    result = python("-X", "importtime", "-m", command, "--help")
    assert "usage" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "matplotlib", "plotly"} & imported


@pytest.mark.slow
def test_ten_runs_of_20000_steps(tmp_path, python):
    runs = [write_run(tmp_path / f"run-{i}", 20_000, spike=15_000 + i) for i in range(10)]
    page = tmp_path / "ten.html"
    began = time.perf_counter()
    python("-m", "report", *runs, "--out", page)
    seconds = time.perf_counter() - began
    assert page.stat().st_size < 10e6
    assert seconds < 30  # about 10 on an idle machine with two cores
    series = page_data(page)["charts"][0]["series"]
    for i, drawn in enumerate(series[0::3]):
        steps = np.frombuffer(base64.b64decode(drawn["steps"]["bdata"]), np.int32)
        assert 15_000 + i in steps  # the spike of a single step


def tiny_gpt(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 300, "block_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 32} | changes
    model = GPT(GPTConfig(**config)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # a new model would have nearly uniform attention
    return model


def test_packed_attention_is_that_of_the_model():
    model, ids = tiny_gpt(), list(range(7, 47))
    packed = np.frombuffer(packed_attentions(model, ids), np.uint8).reshape(3, 2, 40 * 41 // 2)
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    for layer in range(3):
        expected = attentions[layer][0].detach().numpy()[:, *np.tril_indices(40)]
        # The rounding error is (r + 1/510)² - r².
        np.testing.assert_allclose((packed[layer] / 255.0) ** 2, expected, atol=1 / 255)
        assert expected.max() > 0.2


def test_attention_of_24_layers_with_16_heads_fits_on_a_page():
    model, ids = tiny_gpt(n_layer=24, n_head=16, n_embd=64, block_size=512), [5] * 128
    assert len(base64.b64encode(packed_attentions(model, ids))) < 5e6
    with pytest.raises(ValueError, match="expected 1 to 265 for 24 layers of 16 heads"):
        packed_attentions(model, [5] * 400)
    with pytest.raises(ValueError, match="--text has 0 tokens"):
        packed_attentions(model, [])


def test_predictions_match_the_loss_and_the_last_row_of_the_lens_matches_the_logits():
    model, ids, eot = tiny_gpt(), [9, 8, 7, 250, 3], 299
    predictions = predict_tokens(model, ids, eot)
    logits = model(torch.tensor([[eot, *ids[:-1]]])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
    torch.testing.assert_close(predictions.losses, expected)
    order = logits.argsort(dim=-1, descending=True)
    torch.testing.assert_close(predictions.alternatives, order[:, : predictions.alternatives.size(1)])
    assert predictions.ranks.tolist() == [row.tolist().index(i) for row, i in zip(order, ids, strict=True)]
    torch.testing.assert_close(predictions.lens_tokens[-1], order[:, 0])
    torch.testing.assert_close(predictions.lens_actual[-1], (-expected).exp())
    embedded = model.transformer.wte.weight[[eot, *ids[:-1]]] + model.transformer.wpe.weight[:5]
    first = (model.transformer.ln_f(embedded) @ model.transformer.wte.weight.T).softmax(dim=-1)
    torch.testing.assert_close(predictions.lens_probabilities[0], first.max(dim=-1).values)
    assert predictions.lens_tokens.shape == (4, 5)
    with pytest.raises(ValueError, match="65 tokens: expected 1 to 64"):
        predict_tokens(model, [1] * 65, eot)


def test_similarity_is_the_cosine_similarity():
    embeddings = np.random.default_rng(0).normal(size=(1030, 8)).astype(np.float32)
    every, cosines = similarity(embeddings)
    assert every == 3
    a, b = embeddings[30], embeddings[300]
    assert cosines[10, 100] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


def test_part_of_a_character_is_shown_as_bytes():
    tokenizer = load_tokenizer("gpt2")
    assert token_labels(tokenizer, tokenizer.encode("hi 😀")) == ["hi", "⟨20 F0 9F 98⟩", "⟨80⟩"]


# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency"
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize(
    "colors", [COLORS, ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442")], ids=["light", "dark"]
)
def test_run_colors_are_distinguishable(colors, deficiency):
    def lab(color):
        rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(DEFICIENCIES[deficiency] @ linear, 0, 1)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
        f = np.cbrt(xyz / [0.9505, 1, 1.089])
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    distances = [np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(colors, 2)]
    assert min(distances) > 15  # CIE 1976 color difference; about 2 is the smallest visible one


def test_pages_and_pngs_have_the_same_colors():
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text()
    assert all(f"--run-{i}: {color}" in style for i, color in enumerate(COLORS))
