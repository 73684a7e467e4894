"""Test that a published checkpoint is complete for others, and that its card says what the run's files say."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import GPT
from pretrained import resolve_model
from scripts import publish
from training.run_directory import read_metrics

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def run(tiny_run, train):
    changes = {"optim.steps": 4, "eval.every": 2, "eval.final_tokens": 10**8}  # more than the validation split has
    directory = train(tiny_run("mine|<b>", **changes))
    row = {"task": "hellaswag", "convention": "harness", "metric": "acc", "value": 0.28921, "stderr": 0.0045}
    (directory / "eval.json").write_text(json.dumps([row]))
    return directory


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """Replace the hub by a directory, which holds what was uploaded; `calls` are the other arguments."""
    hub = SimpleNamespace(path=tmp_path / "hub", calls=[])

    class FakeApi:
        def create_repo(self, repo, **options):
            hub.calls.append((repo, options))
            hub.path.mkdir()

        def create_commit(self, repo, operations, commit_message):
            hub.calls.append((repo, commit_message))
            for operation in operations:
                with operation.as_file() as file:
                    (hub.path / operation.path_in_repo).write_bytes(file.read())
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(publish, "HfApi", FakeApi)
    return hub


def test_what_is_uploaded_loads_in_transformers_and_has_a_card(run, uploads, capsys):
    publish.main([str(run), "--repo", "me/mine", "--license", "mit", "--private"])
    assert "uploaded 6 files: https://hub/commit/1" in capsys.readouterr().out
    assert sorted(path.name for path in uploads.path.iterdir()) == ["README.md", *FILES]
    assert uploads.calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    ids = torch.tensor([[1, 2, 3]])
    expected = GPT.from_pretrained(resolve_model(str(run)))(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(uploads.path).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(uploads.path).decode([1, 2]) != ""

    card = (uploads.path / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["license"] == "mit"
    assert yaml.safe_load(metadata)["library_name"] == "transformers"
    last = [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"][-1]
    assert last["final_loss"] == last["loss"]
    scored = f"{last['final_tokens']:,} tokens in windows of 32"
    n_parameters = sum(parameter.numel() for parameter in theirs.parameters())
    for row in (
        f"| parameters | {n_parameters:,} |",
        "| steps | 4 of 4 |",
        "| tokens | 1,024, in batches of 256 |",
        f"| validation loss | {last['loss']:.4f} nats per token after step 4, on {scored} |",
        f", {scored} | loss | {last['loss']:.4f} |",
        "| hellaswag | harness | acc | 0.2892 ± 0.0045 |",
        "```\npython ",
        "## License\n\nmit\n",
    ):
        assert row in text, row
    assert text.count("| validation | ") == 1  # the loss on eval.final_tokens is the same


def test_a_dry_run_shows_files_and_card_and_needs_no_network(run, monkeypatch, capsys):
    monkeypatch.setattr(publish, "HfApi", None)
    publish.main([str(run), "--repo", "me/mine", "--dry-run"])
    output = capsys.readouterr()
    shown = [line.split()[1] for line in output.err.splitlines() if line.startswith(" ")]
    assert shown == [*FILES, "README.md,"]
    assert "license:" not in output.out
    assert "The author has not chosen a license yet." in output.out
    assert output.out.startswith("---\nlibrary_name")


def test_the_card_has_no_evaluation_of_another_checkpoint(run, capsys):
    row = {"task": "lambada", "convention": "harness", "metric": "acc"}
    rows = [row | {"value": step / 10, "checkpoint": str(run / "checkpoints" / f"step-{step:06d}")} for step in (2, 4)]
    rows.append(row | {"value": 0.6, "checkpoint": str(run.parent / "another" / "checkpoints" / "step-000004")})
    rows.append(row | {"value": 0.5, "checkpoint": f"/before/it/was/moved/{run.name}/checkpoints/step-000004"})
    (run / "lambada.json").write_text(json.dumps(rows))
    with open(run / "metrics.jsonl", "a") as file:  # as if the best checkpoint were published, not the newest
        file.write(json.dumps({"split": "val", "step": 6, "tokens": 1536, "loss": 99.0, "bits_per_byte": 9.0}) + "\n")
    publish.main([str(run), "--repo", "me/mine", "--dry-run"])
    card = capsys.readouterr().out
    assert "| lambada | harness | acc | 0.4000 |" in card
    assert "| lambada | harness | acc | 0.5000 |" in card
    assert "0.2000" not in card
    assert "0.6000" not in card
    assert "99.0" not in card


def test_the_card_of_a_run_with_muon_has_both_learning_rates(tiny_run, train, capsys):
    fields = {"optim.name": "muon", "optim.muon_lr": 0.02, "optim.lr": 0.01, "optim.steps": 2, "optim.warmup_steps": 0}
    publish.main([str(train(tiny_run("muon", **fields))), "--repo", "me/mine", "--dry-run"])
    assert "| optimizer | muon, learning rate 0.02 (AdamW: 0.01), cosine |" in capsys.readouterr().out


def test_an_edited_card_is_uploaded_as_it_is(run, uploads, tmp_path):
    (tmp_path / "card.md").write_text("# Mine\n")
    publish.main([str(run), "--repo", "me/mine", "--card", str(tmp_path / "card.md")])
    assert (uploads.path / "README.md").read_text() == "# Mine\n"


def test_foreign_text_is_not_markup():
    assert publish.table(("a", "b"), [("x|y", "<b>\n`z`")]).splitlines()[2] == r"| x\|y | \<b\> \`z\` |"


def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        publish.main([str(tmp_path), "--repo", "me/mine", "--dry-run"])
    assert "is not a run: it has no metrics.jsonl" in capsys.readouterr().err
