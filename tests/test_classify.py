"""Test that classify.py learns to classify texts, and that transformers loads the classifier that it writes."""

import csv
import json
import re
import shutil

import pytest
import torch
from transformers import GPT2ForSequenceClassification, pipeline

from checkpoints import MANIFEST, OPTIMIZER, STATE
from classification import save
from classify import main
from data.tokenizer import load_tokenizer, train_tokenizer
from files import file_sha256
from heads import SequenceClassifier
from model import GPT, GPTConfig

TEXTS = [
    (f"{number}. {start} {thing}", kind)
    for number in range(12)
    for start in ("The", "A great, green")
    for thing, kind in [("forest", "wood"), ("lake", "water"), ("river", "water"), ("oak", "wood")]
]


@pytest.fixture(scope="module")
def untrained(save_model):
    tokenizer = train_tokenizer("char", [text for text, _ in TEXTS])
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=32))
    return save_model(model, tokenizer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a directory with training texts in a .csv and validation texts in a .jsonl, with other column names."""
    directory = tmp_path_factory.mktemp("texts")
    with open(directory / "train.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["words", "kind"])
        rows.writerows(TEXTS[:64])
    lines = [json.dumps({"words": text, "kind": kind}) + "\n" for text, kind in TEXTS[64:]]
    (directory / "val.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


COLUMNS = ["--text-key", "words", "--device", "cpu", "--dtype", "float32"]


def learn(untrained, files, out, *flags):
    given = f"--model {untrained} --train {files}/train.csv --val {files}/val.jsonl --out {out} --label-key kind"
    main(["train", *given.split(), "--lr", "3e-3", "--batch-size", "8", *COLUMNS, *flags])


@pytest.fixture(scope="module")
def trained(untrained, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "kinds"
    learn(untrained, files, out, "--epochs", "15", "--patience", "15")
    return out


def test_a_trained_classifier_predicts_every_row_in_order(trained, files, capsys):
    main(["predict", "--model", str(trained), "--file", str(files / "val.jsonl"), "--batch-size", "5", *COLUMNS])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [text for text, _ in TEXTS[64:]]
    right = [row["label"] == kind for row, (_, kind) in zip(rows, TEXTS[64:], strict=True)]
    assert sum(right) >= 0.95 * len(right)
    assert all(0.5 <= row["probability"] <= 1 for row in rows)


def test_transformers_loads_the_classifier_and_predicts_the_same(trained, files, capsys):
    theirs = pipeline("text-classification", model=str(trained), device="cpu")
    main(["predict", "--model", str(trained), "--file", str(files / "val.jsonl"), *COLUMNS])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ours, answer in zip(rows, theirs([row["text"] for row in rows], batch_size=5), strict=True):
        assert answer["label"] == ours["label"]
        assert answer["score"] == pytest.approx(ours["probability"], abs=1e-5)
    assert GPT2ForSequenceClassification.from_pretrained(trained).config.id2label == {0: "water", 1: "wood"}


def test_the_best_epoch_is_kept_and_training_stops_after_patience_epochs(untrained, files, tmp_path, capsys):
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "train.csv").write_bytes((files / "train.csv").read_bytes())
    lines = (files / "val.jsonl").read_text().replace("water", "?").replace("wood", "water").replace("?", "wood")
    (turned / "val.jsonl").write_text(lines)  # the classes are swapped: training makes the loss worse
    learn(untrained, turned, tmp_path / "out", "--epochs", "12", "--patience", "2")
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", output)[1:]]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 12
    assert "stopping: no lower loss in 2 epochs" in output
    assert output.count("the best so far") == sum(loss == min(losses[: i + 1]) for i, loss in enumerate(losses))


def test_the_same_seed_gives_the_same_classifier_and_frozen_blocks_do_not_change(untrained, files, tmp_path):
    for name in ("one", "two"):
        learn(untrained, files, tmp_path / name, "--epochs", "1", "--freeze-layers", "1")
    one, two = (SequenceClassifier.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    before = GPT.from_pretrained(untrained).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    moved = {name for name in before if not torch.equal(before[name], one[f"gpt.{name}"])}
    assert len(moved) == 14
    assert all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in moved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label-key", "sort"], r"train\.csv, row 1 has no column 'sort', only words, kind"),
        (["--text-key", "text"], r"train\.csv, row 1 has no column 'text'"),
        (["--max-length", "99"], "--max-length 99 is above the 32 tokens"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--train", "missing.csv"], r"missing\.csv"),
        (["--val", "VAL_WITH_ANOTHER"], "classes that .* lacks: stone"),
        (["--train", "ONE_CLASS"], "only one class, 'wood'"),
    ],
)
def test_bad_input_gives_a_message_and_creates_nothing(untrained, files, tmp_path, capsys, flags, message):
    another, one = tmp_path / "another.jsonl", tmp_path / "one.jsonl"
    another.write_text('{"words": "A lake", "kind": "stone"}\n')
    one.write_text('{"words": "A lake", "kind": "wood"}\n')
    flags = [{"VAL_WITH_ANOTHER": str(another), "ONE_CLASS": str(one)}.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as exit:
        learn(untrained, files, tmp_path / "out", *flags)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_row_with_too_many_fields_is_refused(trained, untrained, files, tmp_path, capsys):
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("words,kind\na calm, pleasant trip,wood\nA lake,water\n")
    for command in (
        lambda: learn(untrained, files, tmp_path / "out", "--train", str(ragged)),
        lambda: main(["predict", "--model", str(trained), "--file", str(ragged), *COLUMNS]),
    ):
        with pytest.raises(SystemExit) as exit:
            command()
        assert exit.value.code == 2
        assert "ragged.csv, row 1 has 3 fields, the header has 2: quote the text" in capsys.readouterr().err


def test_predict_resolves_a_run_to_its_newest_checkpoint(trained, files, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    shutil.copytree(trained, checkpoint)
    for name in (STATE, OPTIMIZER):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    listed = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in checkpoint.rglob("*")
        if path.is_file()
    }
    (checkpoint / MANIFEST).write_text(json.dumps(listed))
    main(["predict", "--model", str(tmp_path / "run"), "--file", str(files / "val.jsonl"), *COLUMNS])
    assert len(capsys.readouterr().out.splitlines()) == len(TEXTS[64:])


def test_a_padded_vocabulary_is_removed(untrained, files, tmp_path):
    tokenizer, model = load_tokenizer(untrained), GPT.from_pretrained(untrained)
    model.resize_token_embeddings(tokenizer.vocab_size + 20)
    model.save_pretrained(tmp_path / "padded", eos_token_id=tokenizer.eot)
    tokenizer.save(tmp_path / "padded")
    learn(tmp_path / "padded", files, tmp_path / "out", "--epochs", "1")
    classifier = SequenceClassifier.from_pretrained(tmp_path / "out")
    assert classifier.gpt.config.vocab_size == tokenizer.vocab_size


def test_an_existing_output_directory_is_not_overwritten(untrained, files, trained, capsys):
    with pytest.raises(SystemExit):
        learn(untrained, files, trained)
    assert "exists: choose another directory" in capsys.readouterr().err


def test_help_does_not_import_torch(python):
    done = python("-X", "importtime", "classify.py", "--help")
    assert "predict" in done.stdout
    assert "| torch\n" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["--max-length", "5"]], ids=["block_size", "max_length"])
def test_transformers_truncates_to_the_length_of_the_classifier(untrained, files, tmp_path, flags):
    learn(untrained, files, tmp_path, "--epochs", "1", *flags)
    long = TEXTS[0][0] * 20
    length = 5 if flags else 32
    classify = pipeline("text-classification", model=str(tmp_path))
    assert classify(long, truncation=True) == classify(long[:length])


def test_predictions_use_the_length_of_training(untrained, files, tmp_path, capsys):
    learn(untrained, files, tmp_path / "short", "--epochs", "1", "--max-length", "5")
    capsys.readouterr()
    main(["predict", "--model", str(tmp_path / "short"), "--file", str(files / "val.jsonl"), *COLUMNS])
    assert "texts are longer than 5 tokens and were cut" in capsys.readouterr().err


def test_a_kill_during_saving_keeps_the_previous_classifier(trained, files, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "kept"
    shutil.copytree(trained, directory)
    classifier = SequenceClassifier.from_pretrained(directory)
    before = (directory / "model.safetensors").read_bytes()

    def die(self, path, **options):
        (path / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(SequenceClassifier, "save_pretrained", die)
    with pytest.raises(KeyboardInterrupt):
        save(classifier, load_tokenizer(directory), directory)
    assert (directory / "model.safetensors").read_bytes() == before
    main(["predict", "--model", str(directory), "--file", str(files / "val.jsonl"), *COLUMNS])


def test_an_empty_cell_is_refused_by_its_row_and_column(untrained, files, tmp_path, capsys):
    (tmp_path / "holes.csv").write_text("words,kind\na,wood\n,water\n")
    with pytest.raises(SystemExit):
        learn(untrained, files, tmp_path / "out", "--train", str(tmp_path / "holes.csv"))
    assert "holes.csv, row 2: column 'words' is empty" in capsys.readouterr().err
