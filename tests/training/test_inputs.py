"""The windows that a run's configuration chooses, in runs that stop and resume; and datasets that are refused."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from data.loader import validation_batches
from data.prepare.__main__ import main as prepare_data
from data.tokenizer import CharacterTokenizer
from eval.loss import SplitLoss, joined
from processes import start_processes
from training.config import Flags, MixturePart
from training.inputs import open_inputs
from training.launch import StopSignal
from training.run_directory import read_metrics
from training.setup import dry_run
from training.validation import measure


def losses(run, split="train"):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == split]


@pytest.mark.parametrize(
    "changes",
    [
        {"data.shift": True},
        {"data.windows": "aligned"},
        {"data.document_mask": True},
        {"data.windows": "aligned", "data.document_mask": True},
    ],
    ids=["shift", "aligned", "masked", "aligned and masked"],
)
def test_a_run_with_other_windows_learns_and_resumes_bit_for_bit(tiny_run, train, changes, capsys):
    config = tiny_run("whole", **{"checkpoint.every": 8, "optim.steps": 40, "eval.every": 40}, **changes)
    run = train(config)
    last = run / "checkpoints" / "step-000040"
    whole, records = load_file(last / "model.safetensors"), losses(run)
    assert records[-1] < records[0] - 0.5
    assert losses(run, "val")
    assert ("aligned windows, " in capsys.readouterr().out) == ("data.windows" in changes)
    shutil.rmtree(last)
    train(config)
    assert losses(run) == records
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    (field, value) = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{field} was {value!r}"):
        train(tiny_run("whole", **{"optim.steps": 40}))


def test_the_loss_of_a_masked_run_is_that_of_each_document_alone(tiny_run, prepare):
    """Training's first batch and the validation of the untrained model, computed document by document."""
    with prepare(tiny_run("masked", **{"data.document_mask": True, "eval.every": 1})) as run:
        eot, model = run.inputs.tokenizer.eot, run.model

        def nats_alone(inputs, targets):
            total = torch.zeros(())
            for row, wanted in zip(inputs, targets, strict=True):
                begins = [0, *(i for i in (row == eot).nonzero().flatten().tolist() if i), len(row)]
                for begin, end in itertools.pairwise(begins):
                    logits = model(row[None, begin:end]).logits[0]
                    total += F.cross_entropy(logits, wanted[begin:end], reduction="sum")
            return total

        batch = next(run.loader)
        with torch.no_grad():
            expected = sum(nats_alone(m.inputs, m.targets) for m in batch) / sum(m.targets.numel() for m in batch)
            found = sum(run.loss_function(m.inputs, m.targets, m.documents) * m.weight for m in batch)
            unmasked = sum(run.loss_function(m.inputs, m.targets) * m.weight for m in batch)
            (windows,) = run.inputs.val.values()
            parts = list(validation_batches(windows, micro_batch=len(windows)))
            nats = nats_alone(parts[0].inputs, parts[0].targets)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (unmasked - expected).abs() > 1e-4
        assert measure(run, StopSignal(announce=False)).loss.loss == pytest.approx(
            nats.item() / windows.n_targets, abs=1e-5
        )


@pytest.fixture(scope="session")
def letters(tmp_path_factory, verses):
    """A second dataset with the tokenizer of `verses`, and a third one with a tokenizer of its own."""
    directory = tmp_path_factory.mktemp("letters")
    lines = [f"The forest of France is {n} leagues away,\nand no ox shall stay in Kent.\n" for n in range(60)]
    (directory / "letters.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for name, tokenizer in (("same", verses), ("other", "char")):
        options = ("--out", directory / name, "--tokenizer", tokenizer, "--val-fraction", "0.2")
        prepare_data(["text", *map(str, (directory / "letters.jsonl", *options))])
    return directory


def test_a_mixture_trains_resumes_and_validates_each_part(tiny_run, train, verses, letters, capsys):
    mixture = [MixturePart(str(verses), 3), MixturePart(str(letters / "same"), 1)]
    config = tiny_run("mixed", **{"data.mixture": mixture, "checkpoint.every": 8, "eval.every": 20})
    run = train(config)
    shown = capsys.readouterr().out
    last = run / "checkpoints" / "step-000020"
    whole, records = load_file(last / "model.safetensors"), losses(run)
    validation = [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"][-1]
    assert list(validation["parts"]) == [str(verses), str(letters / "same")]
    for name, loss in validation["parts"].items():
        assert f"{name}: {loss:.4f}" in shown
    inputs = open_inputs(config, None, verify=True)
    targets = [windows.n_targets for windows in inputs.val.values()]
    weighted = sum(loss * n for loss, n in zip(validation["parts"].values(), targets, strict=True))
    assert validation["loss"] == pytest.approx(weighted / sum(targets), rel=1e-5)
    shutil.rmtree(last)
    train(config)
    again = load_file(last / "model.safetensors")
    assert losses(run) == records
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    mixture[1].weight = 2
    with pytest.raises(ValueError, match=r"data\.mixture was \[3, 1\], is \[3, 2\]"):
        train(config)


def test_a_dataset_that_does_not_state_the_size_of_its_text_is_trained_on(tiny_run, train, verses, tmp_path):
    """As `data.prepare download` makes it."""
    downloaded = shutil.copytree(verses, tmp_path / "downloaded")
    meta = json.loads((downloaded / "meta.json").read_text())
    (downloaded / "meta.json").write_text(json.dumps(meta | {"text_bytes": {}}))
    mixture = [MixturePart(str(verses), 1), MixturePart(str(downloaded), 1)]
    for name, changes in (("alone", {"data.dir": str(downloaded)}), ("mixed", {"data.mixture": mixture})):
        config = tiny_run(name, **{"optim.steps": 3, "eval.every": 3}, **changes)
        assert open_inputs(config, None, verify=True).bytes_per_token is None
        assert losses(train(config), "val")
    assert open_inputs(tiny_run(), None, verify=False).bytes_per_token == (
        meta["text_bytes"]["train"] / meta["tokens"]["train"]
    )


def test_a_dry_run_shows_the_epochs_of_each_part(tiny_run, verses, letters):
    mixture = [MixturePart(str(verses), 1), MixturePart(str(letters / "same"), 9)]
    config = tiny_run("dry", **{"data.mixture": mixture, "optim.steps": 200})
    parts = open_inputs(config, None, verify=False).train.parts
    report = dry_run(config, start_processes("cpu", "float32"), Flags(dry_run=""))[0]
    windows = 200 * 256 // 32
    assert f"{windows * 0.1 / len(parts[0]):.2f} epochs of {verses}, " in report
    assert f"{(epochs := windows * 0.9 / len(parts[1])):.2f} epochs of {letters / 'same'}, which is complete" in report
    assert f"200 steps repeat {letters / 'same'} {epochs:.1f} times" in report


def test_datasets_with_different_tokenizers_are_not_mixed(tiny_run, verses, letters):
    config = tiny_run("no", **{"data.mixture": [MixturePart(str(verses), 1), MixturePart(str(letters / "other"), 1)]})
    with pytest.raises(ValueError, match=r"data\.mixture: .*verses.* and .*other have different tokenizers: prepare"):
        open_inputs(config, None, verify=False)


def test_the_loss_of_several_splits_is_that_of_all_their_targets():
    first, second = SplitLoss(2.0, 2 * 100 / 400 / math.log(2), 100), SplitLoss(4.0, 4 * 50 / 90 / math.log(2), 50)
    both = joined([first, second])
    assert both.loss == pytest.approx((200 + 200) / 150)
    assert both.tokens == 150
    assert both.bits_per_byte == pytest.approx(400 / math.log(2) / (400 + 90))


def test_another_tokenizer_beside_the_shards_is_refused(tiny_run, verses, tmp_path):
    directory = tmp_path / "dataset"
    shutil.copytree(verses, directory)
    config = tiny_run(**{"data.dir": str(directory)})
    tokenizer = open_inputs(config, None, verify=True).tokenizer
    # Its vocabulary has the same size, and the tokens of the shards would have another text.
    CharacterTokenizer([*tokenizer.characters[:-1], "ÿ"]).save(directory)
    with pytest.raises(ValueError, match=r"the tokenizer in .* is not the one that its meta\.json states"):
        open_inputs(config, None, verify=False)
