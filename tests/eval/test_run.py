"""The command line of `eval.run`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import TokenWindows
from data.shards import ShardWriter, open_split
from data.tokenizer import load_tokenizer, train_tokenizer
from eval.evaluate import format_table
from eval.evaluator import ScoreCache, model_fingerprint
from eval.likelihood import Request, Scores, log_likelihoods
from eval.loss import ArrayWindows
from eval.perplexity import CORPORA as PERPLEXITY_CORPORA
from eval.reference import losses_to_beat, published, read_references, save_reference
from eval.run import CORPORA, main
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random model with GPT-2's vocabulary, and its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16)).save_pretrained(directory)
    load_tokenizer("gpt2").save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 12, "utf-8")
    return path


def results(path):
    """Read a JSON file of results, by task, convention and metric."""
    return {(row["task"], row["convention"], row["metric"]): row for row in json.loads(path.read_text("utf-8"))}


def error_of(capsys, *arguments):
    """Run a command that must fail, and return its error message."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['eval.run', '--help']\ntry:\n    from eval.run import main; main()\n"
    code += "except SystemExit:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m eval.run ")
    assert "hellaswag" in done.stdout


@pytest.mark.parametrize("options", [[], ["--transformers"]], ids=str)
def test_a_padded_vocabulary_does_not_change_a_score(tiny, tmp_path, options):
    """The rows of the padding get large logits, which would take probability and be the most probable tokens."""
    model = GPT.from_pretrained(tiny)
    model.resize_token_embeddings(50304)
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 30 * model.transformer.wte.weight[:47]
    model.save_pretrained(tmp_path / "padded")
    load_tokenizer("gpt2").save(tmp_path / "padded")
    examples = []
    for name, directory in (("plain", tiny), ("other", tmp_path / "padded")):
        arguments = ["--model", str(directory), "--tasks", "piqa,lambada", "--limit", "4", "--device", "cpu"]
        main([*arguments, "--dtype", "float32", "--examples", str(tmp_path / f"{name}.jsonl"), *options])
        lines = (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()
        examples.append([json.loads(line) for line in lines])
    assert len(examples[0]) == len(examples[1]) == 8
    for one, other in zip(*examples, strict=True):
        assert {name: pytest.approx(value, abs=1e-3) for name, value in one.items()} == other


def test_table_json_and_examples(tiny, tmp_path, capsys):
    written = ["--json", str(tmp_path / "f.json"), "--examples", str(tmp_path / "e.jsonl")]
    main(["--model", tiny, "--tasks", "hellaswag,piqa,lambada", "--limit", "4", *written])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == [
        *["task", "convention", "metric", "value", "±", "stderr", "count"],
        *["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
    ]
    row = results(tmp_path / "f.json")[("hellaswag", "completion", "acc_norm")]
    assert set(row) == {"task", "convention", "metric", "value", "stderr", "count", "checkpoint", "published"}
    assert row["checkpoint"] == tiny
    assert row["count"] == 4
    assert row["published"] == {"gpt2": 0.2955, "gpt2-medium": 0.3752, "gpt2-large": 0.432, "gpt2-xl": 0.4893}
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text("utf-8").splitlines()]
    assert [line["task"] for line in lines] == ["hellaswag"] * 4 + ["piqa"] * 4 + ["lambada"] * 4
    assert [line["index"] for line in lines] == [0, 1, 2, 3] * 3
    assert set(lines[0]) == {"task", "convention", "index", "gold", "choice", "choice_norm", "scores"}
    assert row["value"] == np.mean([line["choice_norm"] == line["gold"] for line in lines[:4]])
    assert lines[0]["choice"] == int(np.argmax(lines[0]["scores"]))
    assert not (tmp_path / "f.json.partial").exists()


def test_all_processes_evaluate_the_model_that_the_main_process_found(tiny, text, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr("processes.Processes.broadcast", lambda self, value: tiny)
    other = shutil.copytree(tiny, tmp_path / "other")  # as if this process had found a newer checkpoint
    main(["--model", str(other), "--tasks", "perplexity", "--text", str(text), "--device", "cpu", "--json", str(out)])
    assert {row["checkpoint"] for row in results(out).values()} == {tiny}


def test_a_table_has_no_column_without_an_entry():
    row = {"task": "perplexity", "convention": "stride 64", "metric": "perplexity", "value": 20.7, "stderr": None}
    row |= {"count": 1200, "published": {}}
    known = row | {"value": 9.0, "published": {"gpt2-xl": 8.5}}
    assert format_table([row]).splitlines() == [
        "task        convention  metric        value  count",
        "perplexity  stride 64   perplexity  20.7000  1,200",
    ]
    assert [line.split()[-2:] for line in format_table([known, row]).splitlines()] == [
        ["count", "gpt2-xl"],
        ["1,200", "8.5"],
        ["20.7000", "1,200"],
    ]


def test_an_interrupted_evaluation_continues_where_it_stopped(tiny, tmp_path, monkeypatch):
    """Also if its files are in the model's directory, whose other files tell whether the model has changed."""
    model = shutil.copytree(tiny, tmp_path / "model")
    arguments = ["--model", str(model), "--tasks", "piqa,copa", "--limit", "6", "--json"]
    main([*arguments, str(tmp_path / "whole.json")])
    monkeypatch.setattr("eval.evaluator.GROUP_SIZE", 4)
    groups = []

    def counted(model, requests, **options):
        if len(groups) == 4 and not resumed:
            raise KeyboardInterrupt
        groups.append(len(requests))
        return log_likelihoods(model, requests, **options)

    monkeypatch.setattr("eval.evaluator.log_likelihoods", counted)
    resumed = False
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, str(model / "f.json")])
    assert stopped.value.code == 130
    partial = model / "f.json.partial"
    assert len(partial.read_text("utf-8").strip().splitlines()) == 4
    with open(partial, "a", encoding="utf-8") as file:
        file.write('\n{"key": "cut sh')
    resumed = True
    main([*arguments, str(model / "f.json")])
    assert groups == [4] * 6  # 3 groups per task: 4 before the interruption, 2 after it
    assert not partial.exists()
    uninterrupted, resumed_results = results(tmp_path / "whole.json"), results(model / "f.json")
    assert uninterrupted.keys() == resumed_results.keys()
    for name in uninterrupted:
        assert resumed_results[name]["value"] == pytest.approx(uninterrupted[name]["value"], rel=1e-5)


def test_outputs_in_the_directory_of_a_model_do_not_change_its_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    outputs = [tmp_path / "f.json", tmp_path / "none" / ".." / "e.jsonl"]
    before = model_fingerprint(tmp_path, outputs)
    for name in ("f.json", "f.json.partial", "e.jsonl", "another.json.partial"):
        (tmp_path / name).write_text(name)
    assert model_fingerprint(tmp_path, outputs) == before
    (tmp_path / "vocab.json").write_text("{}")
    assert model_fingerprint(tmp_path, outputs) != before


def test_scores_of_another_model_are_not_reused(tmp_path):
    path = tmp_path / "x.partial"
    requests = [Request((1,), (2,))]
    cache = ScoreCache(path, "one")
    cache.add(cache.key(requests), Scores(np.array([-1.5]), np.array([True])))
    again = ScoreCache(path, "one")
    assert again.entries[again.key(requests)]["log_probs"] == [-1.5]
    other = ScoreCache(path, "two")
    assert other.key(requests) not in other.entries


def test_scores_that_are_stored_after_a_kill_inside_a_write_are_kept(tmp_path):
    path = tmp_path / "x.partial"
    groups = [[Request((1,), (token,))] for token in range(4)]
    for group in groups:
        cache = ScoreCache(path, "one")
        cache.add(cache.key(group), Scores(np.array([-1.5]), np.array([True])))
        if group is groups[1]:
            path.write_bytes(path.read_bytes()[:-5])
    again = ScoreCache(path, "one")
    assert [again.key(group) in again.entries for group in groups] == [True, False, True, True]


def test_perplexity_of_a_text_matches_that_of_transformers(tiny, text, tmp_path):
    for name, more in (("ours", []), ("transformers", ["--transformers"])):
        written = ["--json", str(tmp_path / name)]
        main(["--model", tiny, "--tasks", "perplexity", "--text", str(text), "--stride", "50", *more, *written])
    ours, theirs = results(tmp_path / "ours"), results(tmp_path / "transformers")
    assert {metric for _, _, metric in ours} == {"perplexity", "bits_per_byte", "word_perplexity"}
    content = text.read_text("utf-8")
    count = len(load_tokenizer("gpt2").encode(content))
    nats = np.log(ours["perplexity", "stride 50", "perplexity"]["value"]) * count
    assert ours["perplexity", "stride 50", "perplexity"]["count"] == count
    assert ours["perplexity", "stride 50", "bits_per_byte"]["value"] == pytest.approx(
        nats / np.log(2) / len(content.encode())
    )
    for name in ours:
        assert theirs[name]["value"] == pytest.approx(ours[name]["value"], rel=1e-4)


def test_a_corpus_of_the_paper_is_read_from_a_local_file(tiny, tmp_path):
    raw = " = A Title = \n \n It was , he said , a well @-@ known day .\n" * 5
    (tmp_path / "wiki.txt").write_text(raw, encoding="utf-8")
    files = ["--text", str(tmp_path / "wiki.txt"), "--json", str(tmp_path / "f.json")]
    main(["--model", tiny, "--tasks", "wikitext-2", *files])
    row = results(tmp_path / "f.json")["wikitext-2", "paper, stride 64", "word_perplexity"]
    clean = "= A Title =\n\nIt was, he said, a well-known day.\n" * 5
    assert row["count"] == len(load_tokenizer("gpt2").encode(clean))
    assert row["published"]["gpt2"] == 29.41
    by_token = results(tmp_path / "f.json")["wikitext-2", "paper, stride 64", "perplexity"]["value"]
    assert np.log(row["value"]) * len(raw.split()) == pytest.approx(np.log(by_token) * row["count"])


def test_solved_examples_for_the_table_of_a_user(tiny, tmp_path):
    rows = "text,label\n" + "".join(f"example {i},{i % 2}\n" for i in range(6))
    (tmp_path / "t.csv").write_text(rows, encoding="utf-8")
    common = ["--model", tiny, "--tasks", "classify", "--file", str(tmp_path / "t.csv"), "--labels", "0=bad,1=good"]
    common += ["--template", r"{text}\nIt was", "--json", str(tmp_path / "f.json")]
    main([*common, "--shots", "2", "--train-file", str(tmp_path / "t.csv")])
    assert ("classify", "harness, 2 shots from train, seed 0", "acc") in results(tmp_path / "f.json")
    main([*common, "--shots", "2", "--shots-from", "evaluated", "--seed", "3"])
    assert ("classify", "harness, 2 shots from evaluated, seed 3", "acc") in results(tmp_path / "f.json")


# ---------------------------------------------------------------------------------------------------------------------
# References stored in a dataset


def make_dataset(directory, tokenizer, documents):
    directory.mkdir()
    tokenizer.save(directory)
    writer = ShardWriter(directory, "val", 1000, tokenizer.eot)
    for document in documents:
        writer.write(np.array([tokenizer.eot, *tokenizer.encode(document)], np.uint16))
    writer.finish()
    return directory


def test_the_loss_of_a_model_is_stored_in_the_dataset(tiny, text, tmp_path):
    documents = [text.read_text("utf-8"), "Call me Ishmael. Some years ago."]
    tokenizer = load_tokenizer("gpt2")
    same = make_dataset(tmp_path / "same", tokenizer, documents)
    json_file = tmp_path / "results.json"
    main(["--model", tiny, "--tasks", "loss", "--data", str(same), "--save-reference", "--json", str(json_file)])
    assert {row["stderr"] for row in results(json_file).values()} == {None}  # not computed, which is not the same as 0
    stored = read_references(same)[tiny]
    ids = [i for document in documents for i in (tokenizer.eot, *tokenizer.encode(document))]
    assert stored["tokens"] == len(ids) - 1
    assert stored["tokenizer"] == "gpt2"
    model = GPT.from_pretrained(tiny)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 128):
            window = torch.tensor([ids[start : start + 129]])
            nats += float(model(window[:, :-1], targets=window[:, 1:]).loss) * (window.size(1) - 1)
    assert stored["loss"] == pytest.approx(nats / stored["tokens"], rel=1e-5)
    n_bytes = sum(len(document.encode()) for document in documents)
    assert stored["bits_per_byte"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)
    main(["--model", tiny, "--tasks", "loss", "--data", str(same), "--limit", "2", "--json", str(json_file)])
    assert {row["count"] for row in results(json_file).values()} == {256}  # two windows
    # The other dataset has the same text with another tokenizer, so bits per byte are equal.
    other = make_dataset(tmp_path / "other", train_tokenizer("bpe:300", documents), documents)
    main(["--model", tiny, "--tasks", "loss", "--data", str(other), "--save-reference"])
    assert read_references(other)[tiny]["bits_per_byte"] == pytest.approx(stored["bits_per_byte"], rel=1e-5)
    assert losses_to_beat(same, "mine", "gpt2") == [(tiny, stored["loss"])]
    assert losses_to_beat(other, "mine", "bpe:300") == []


def test_with_a_document_mask_each_document_of_a_window_is_scored_by_itself(tiny, tmp_path, capsys):
    documents = ["It was the best of times.", "Call me Ishmael. Some years ago.", "It was the worst of times."]
    tokenizer = load_tokenizer("gpt2")
    dataset = make_dataset(tmp_path / "data", tokenizer, documents)
    json_file = tmp_path / "results.json"
    command = ["--model", tiny, "--tasks", "loss", "--data", str(dataset), "--document-mask"]
    main([*command, "--json", str(json_file)])
    encoded = [[tokenizer.eot, *tokenizer.encode(document)] for document in documents]
    model, nats = GPT.from_pretrained(tiny), 0.0
    with torch.no_grad():
        for ids, following in zip(encoded, [tokenizer.eot, tokenizer.eot, None], strict=True):
            # The token after a document is a target of its last token, except at the end of the split.
            targets = torch.tensor([[*ids[1:], *([following] if following is not None else [])]])
            nats += float(model(torch.tensor([ids])[:, : targets.size(1)], targets=targets).loss) * targets.size(1)
    found = {metric: row["value"] for (_, _, metric), row in results(json_file).items()}
    assert found["loss"] == pytest.approx(nats / (sum(map(len, encoded)) - 1), rel=1e-5)
    with pytest.raises(SystemExit):
        main([*command, "--save-reference"])
    assert "--save-reference stores a loss in windows of several documents" in capsys.readouterr().err


def test_windows_of_an_array_are_those_of_the_shards(tmp_path):
    tokenizer = load_tokenizer("gpt2")
    dataset = make_dataset(tmp_path / "data", tokenizer, ["It was the best of times.", "It was the worst of times."])
    split = open_split(dataset, "val")
    tokens = np.empty(split.n_tokens, np.uint16)
    split.read(0, tokens)
    shards, array = TokenWindows(split, 4, 50257, tokens=10485760), ArrayWindows(tokens, 4, "a text")
    assert len(array) == len(shards) > 2
    for window in range(len(array)):
        expected, found = np.empty((2, 4), np.int64), np.empty((2, 4), np.int64)
        shards.read(window, *expected)
        array.read(window, *found)
        assert found.tolist() == expected.tolist()
    assert array.count(np.arange(len(array))) == shards.count(np.arange(len(array))) == split.n_tokens - 1
    with pytest.raises(ValueError, match="a text has 1 tokens, expected at least 2"):
        ArrayWindows(tokens[:1], 4, "a text")


def test_references_are_stored_by_model_and_completed_by_published_losses(tmp_path):
    assert losses_to_beat(tmp_path, "fineweb-10b", "gpt2") == [("gpt2, published", 3.424958)]
    assert losses_to_beat(tmp_path, "fineweb-edu-10b", "gpt2") == [("gpt2, published", 3.2924)]
    # The sources that data.prepare writes to meta.json.
    assert losses_to_beat(tmp_path, "hf HuggingFaceFW/fineweb-edu, sample-10BT", "gpt2")[0][1] == 3.2924
    assert losses_to_beat(tmp_path, "hf kjj0/fineweb10B-gpt2, already tokenized", "gpt2")[0][1] == 3.424958
    assert losses_to_beat(tmp_path, "fineweb-10b", "char") == []
    save_reference(tmp_path, "gpt2", {"loss": 3.3, "bits_per_byte": 1.0, "tokens": 5, "tokenizer": "gpt2"})
    save_reference(tmp_path, "mine", {"loss": 3.1, "bits_per_byte": 0.9, "tokens": 5, "tokenizer": "gpt2"})
    assert losses_to_beat(tmp_path, "fineweb-10b", "gpt2") == [("gpt2", 3.3), ("mine", 3.1)]
    (tmp_path / "reference.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reference\.json cannot be read"):
        read_references(tmp_path)


def test_the_results_of_the_paper_are_shown_for_the_childrens_book_test(tiny, tmp_path, monkeypatch):
    row = {"sentences": ["The King sat ."], "question": "The XXXXX ate .", "options": ["dog", "King"], "answer": "King"}
    monkeypatch.setattr("eval.choice_tasks.load_hub_rows", lambda dataset, config, split: [row] * 3)
    arguments = ["--model", tiny, "--tasks", "cbt-ne", "--shots-from", "evaluated", "--json", str(tmp_path / "f.json")]
    main(arguments)
    assert results(tmp_path / "f.json")["cbt-ne", "paper, harness", "acc"]["published"]["gpt2-xl"] == 0.8905
    assert results(tmp_path / "f.json")["cbt-ne", "paper, harness", "acc_norm"]["published"] == {}
    main([*arguments, "--shots", "1"])  # the paper used none
    row = results(tmp_path / "f.json")["cbt-ne", "harness, 1 shots from evaluated, seed 0", "acc"]
    assert row["published"] == {}


def test_conventions_are_never_mixed():
    assert published("hellaswag", "harness", "acc_norm") == {"gpt2": 0.3114, "gpt2-xl": 0.5089}
    assert published("hellaswag", "harness, 5 shots from train, seed 0", "acc_norm") == {}
    assert published("lambada", "harness", "acc") == {}  # the published result is for OpenAI's file
    assert published("lambada_openai", "harness", "acc") == {"gpt2": 0.3256}


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_explain_what_is_wrong(tiny, text, tmp_path, capsys):
    assert "unknown task nope: expected some of hellaswag, arc_easy" in error_of(
        capsys, "--model", tiny, "--tasks", "nope,piqa"
    )
    assert "no such model directory: /nonexistent" in error_of(capsys, "--model", "/nonexistent", "--tasks", "copa")
    assert "--tasks perplexity needs --text or --data" in error_of(capsys, "--tasks", "perplexity")
    assert "--tasks classify needs --template" in error_of(capsys, "--tasks", "classify", "--file", "x.csv")
    assert "add loss to --tasks" in error_of(capsys, "--tasks", "copa", "--save-reference")
    assert tuple(PERPLEXITY_CORPORA) == CORPORA
    readers = ("--data", "--text", "--stride", "--tokens", "--file", "--train-file", "--template", "--labels")
    for option in (*readers, "--document-mask"):
        given = [option] if option == "--document-mask" else [option, "7"]
        message = error_of(capsys, "--tasks", "copa", *given)
        assert f"{option} is read only by --tasks " in message
        assert f"add such a task, or omit {option}" in message
    assert "--shots applies to multiple-choice tasks only, not to lambada" in error_of(
        capsys, "--tasks", "copa,lambada", "--shots", "2"
    )
    both = ["--tasks", "perplexity", "--text", str(text), "--data", str(tmp_path)]
    assert "--tasks perplexity takes --text or --data, not both" in error_of(capsys, *both)
    tokens_of_text = ["--tasks", "perplexity", "--text", str(text), "--tokens", "9"]
    assert "--tokens counts tokens of --data: omit it, or use --limit" in error_of(capsys, *tokens_of_text)
    assert "--limit must be at least 1, got 0" in error_of(capsys, "--tasks", "copa", "--limit", "0")
    assert "cannot be used" in error_of(capsys, "--model", tiny, "--tasks", "copa", "--device", "nonsense")
    options = ["--model", tiny, "--tasks", "perplexity", "--text", str(text), "--stride", "129"]
    assert "eval.run: perplexity: stride 129: expected 1..128" in error_of(capsys, *options)  # it names the task


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    command = ["--model", "/nonexistent", "--tasks", "loss", "--data", str(tmp_path)]
    nowhere = str(tmp_path / "none" / "f.json")
    assert f"there is no directory {tmp_path}/none" in error_of(capsys, *command, "--json", nowhere)
    for option in ("--json", "--examples"):
        expected = f"cannot write {tmp_path}: it is a directory, expected the name of a file"
        assert expected in error_of(capsys, *command, option, str(tmp_path))
    for name, given in (("f.json", ["--json", str(tmp_path / "f.json")]), ("reference.json", ["--save-reference"])):
        (tmp_path / f"{name}.partial").mkdir()
        assert f"cannot write {tmp_path}/{name}.partial: it is a directory" in error_of(capsys, *command, *given)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_on_a_full_disk_does_not_lose_the_other_results(tiny, tmp_path, capsys):
    command = ["--model", tiny, "--tasks", "copa", "--limit", "2"]
    assert "No space left" in error_of(capsys, *command, "--json", str(tmp_path / "f"), "--examples", "/dev/full")
    assert results(tmp_path / "f")["copa", "harness", "acc"]["count"] == 2
    assert (tmp_path / "f.partial").exists()  # the same command gives the examples without scoring again


def test_a_model_with_the_tokenizer_of_another_is_refused(tmp_path, capsys):
    GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    load_tokenizer("gpt2").save(tmp_path)
    message = error_of(capsys, "--model", str(tmp_path), "--tasks", "copa")
    assert "has 50257 tokens, but the model has 300: they do not belong together" in message


def test_another_architecture_is_evaluated_with_transformers(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = train_tokenizer("bpe:300", ["the cat sat on the mat and said so"])
    tokenizer.save(tmp_path)
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--tasks", "copa", "--limit", "3", "--json", str(tmp_path / "f.json")])
    assert results(tmp_path / "f.json")["copa", "harness", "acc"]["count"] == 3


def test_bytes_that_another_tokenizer_drops_are_not_counted(tmp_path, capsys):
    """A byte-level BPE that was trained without the 256 bytes drops those it has not seen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["a", "b", "Ġ", "<s>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    config = GPTNeoXConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    found = {}
    for name, text in (("complete", "ab ba " * 10), ("dropped", "ab ba " * 10 + "xyz" * 100)):
        (tmp_path / name).write_text(text)
        options = ["--tasks", "perplexity", "--text", str(tmp_path / name), "--json", str(tmp_path / "f.json")]
        main(["--model", str(tmp_path), *options])
        found[name] = results(tmp_path / "f.json")
    assert "does not give the original text, so there is no figure per byte or per word" in capsys.readouterr().err
    key = ("perplexity", "stride 1024", "perplexity")
    assert found["complete"][key]["value"] == found["dropped"][key]["value"]
    assert {metric for _, _, metric in found["complete"]} == {"perplexity", "bits_per_byte", "word_perplexity"}
    assert {metric for _, _, metric in found["dropped"]} == {"perplexity"}
    main(["--model", str(tmp_path), "--tasks", "copa", "--limit", "3", "--json", str(tmp_path / "f.json")])
    assert {metric for _, _, metric in results(tmp_path / "f.json")} == {"acc", "acc_norm"}
    assert "does not give the original text" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_have_the_same_results_as_one(tiny, text, tmp_path, n):
    arguments = ["-m", "eval.run", "--model", tiny, "--tasks", "hellaswag,lambada,perplexity", "--text", str(text)]
    arguments += ["--limit", "12", "--batch-size", "4", "--device", "cpu", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command, name in (([sys.executable], "one"), (torchrun, "many")):
        done = subprocess.run(
            [*command, *arguments, str(tmp_path / name)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert results(tmp_path / "one") == results(tmp_path / "many")


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(
    ("convention", "acc", "acc_norm"), [("completion", 0.2859, 0.2955), ("harness", 0.2892, 0.3114)]
)
def test_the_released_model_has_the_published_results(tmp_path, convention, acc, acc_norm):
    """Needs one to two hours on a CPU, one minute on a GPU."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "eval.run", "--model", "gpt2", "--tasks", "hellaswag", "--dtype", "float32"]
    command += ["--convention", convention, "--json", str(tmp_path / "f.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "could not be fetched" in done.stderr:
        pytest.skip("the hub cannot be reached")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "f.json")
    # The published values have four digits, and rounding errors change a few of the 10,042 choices.
    assert found["hellaswag", convention, "acc"]["value"] == pytest.approx(acc, abs=5e-4)
    assert found["hellaswag", convention, "acc_norm"]["value"] == pytest.approx(acc_norm, abs=5e-4)
