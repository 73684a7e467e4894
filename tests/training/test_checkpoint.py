"""Checkpoints: complete or absent, loadable as a GPT-2 by other tools, and never a pickle."""

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import training.checkpoint
from checkpoints import list_checkpoints, verify
from data.tokenizer import load_tokenizer
from eval.loss import SplitLoss
from files import file_sha256
from generation import generate
from model import GPT
from pretrained import resolve_model
from train import train_step, validate
from training.checkpoint import Checkpoints
from training.launch import StopSignal
from training.run_directory import RunDirectory, read_metrics
from training.validation import Validation


@pytest.fixture
def run(tiny_run, train):
    """A finished run with checkpoints after 4, 8 and 10 steps."""
    return train(tiny_run("run", **{"optim.steps": 10, "checkpoint.every": 4}))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def steps(run):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("kind", ["char", "bpe:300", "gpt2"])
def test_a_checkpoint_is_a_gpt2_for_transformers(tiny_run, train, python, verses, tmp_path, kind):
    """Its ids, logits and generated text equal ours."""
    data = verses
    if kind != "char":
        data = tmp_path / "data"
        source = verses.parent / "verses.jsonl"
        python("-m", "data.prepare", "text", source, "--out", data, "--tokenizer", kind, "--val-fraction", "0.1")
    run = train(tiny_run("run", **{"data.dir": str(data), "optim.steps": 30}))
    checkpoint = resolve_model(str(run))
    ours, tokenizer = GPT.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    theirs, their_tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )

    text = "ROSALIND:\nThe ox of Kent is 7 leagues"
    ids = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.eot
    window = torch.tensor([ids[:20]])
    torch.testing.assert_close(ours(window).logits, theirs(window).logits, rtol=1e-4, atol=1e-5)

    prompt = "The"
    expected = generate(ours, [tokenizer.encode(prompt)], max_new_tokens=12, eos_token_id=tokenizer.eot)[0].tolist()
    generated = pipeline("text-generation", model=checkpoint)(prompt, max_new_tokens=12, do_sample=False)
    assert generated[0]["generated_text"] == tokenizer.decode([i for i in expected if i != tokenizer.eot])


def test_a_checkpoint_has_these_files(run):
    checkpoint = run / "checkpoints" / "step-000010"
    files = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    assert files == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer/optimizer.safetensors",
        "trainer/state.json",
    ]
    verify(checkpoint)
    assert set(json.loads((checkpoint / "manifest.json").read_text())) == set(files) - {"manifest.json"}
    assert len({(checkpoint / file).stat().st_mode for file in files}) == 1, "a file has another mode than the umask's"


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "trainer/optimizer.safetensors", "trainer/state.json"],
)
def test_a_flipped_byte_in_any_file_is_found_and_the_previous_checkpoint_is_used(run, tiny_run, train, capsys, name):
    damaged = run / "checkpoints" / "step-000010"
    flip_a_byte(damaged / name)
    train(tiny_run("run", **{"optim.steps": 10, "checkpoint.every": 4}))
    output = capsys.readouterr()
    assert f"skipping a damaged checkpoint: {damaged / name} has another sha256" in output.err
    assert "resuming from" in output.out
    assert "step-000008" in output.out
    assert (run / "checkpoints" / "step-000010.damaged").is_dir()  # kept under another name
    verify(damaged)


def test_a_second_damaged_checkpoint_of_the_same_step_is_kept_too(run, tiny_run, train):
    for _ in range(2):
        flip_a_byte(run / "checkpoints" / "step-000010" / "config.json")
        train(tiny_run("run", **{"optim.steps": 10, "checkpoint.every": 4}))
    assert sorted(path.name for path in (run / "checkpoints").glob("*.damaged*")) == [
        "step-000010.damaged",
        "step-000010.damaged1",
    ]
    verify(run / "checkpoints" / "step-000010")


def test_a_checkpoint_that_replaces_a_damaged_one_counts_again(run, tiny_run, train):
    flip_a_byte(run / "checkpoints" / "step-000010" / "config.json")
    changes = {"optim.steps": 14, "run.allow_changes": True, "checkpoint.every": 2, "checkpoint.keep": 2}
    train(tiny_run("run", **changes))
    assert steps(run) == [12, 14]


def test_a_loss_that_was_measured_after_its_checkpoint_counts(tmp_path):
    """A checkpoint that was saved on a stop request has no loss; later checkpoints store it as the best."""
    states = {4: (None, None), 6: (3.0, [2.5, 4]), 8: (2.8, [2.5, 4])}
    for step, (loss, best) in states.items():
        (trainer := tmp_path / f"step-{step:06d}" / "trainer").mkdir(parents=True)
        (trainer / "state.json").write_text(json.dumps({"val_loss": loss, "best": best}))
    checkpoints = Checkpoints(tmp_path, keep=1, on_error="stop")
    assert checkpoints.best() == (2.5, tmp_path / "step-000004")
    shutil.rmtree(tmp_path / "step-000004")
    assert checkpoints.best() == (2.8, tmp_path / "step-000008")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(run, tiny_run, train):
    for path in list_checkpoints(run / "checkpoints"):
        flip_a_byte(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        train(tiny_run("run", **{"optim.steps": 10}))


def test_the_newest_and_the_best_are_kept(tiny_run, train):
    config = tiny_run("kept", **{"optim.steps": 12, "checkpoint.every": 2, "checkpoint.keep": 2, "eval.every": 2})
    run = train(config)
    assert steps(run) == [10, 12]
    state = run / "checkpoints" / "step-000010" / "trainer" / "state.json"
    best = json.loads(state.read_text()) | {"val_loss": 0.0}  # as if it were the best
    state.write_text(json.dumps(best))
    shutil.rmtree(run / "checkpoints" / "step-000012")
    checkpoints = Checkpoints(run / "checkpoints", keep=1, on_error="stop")
    for step in (14, 16):
        shutil.copytree(run / "checkpoints" / "step-000010", run / "checkpoints" / f"step-{step:06d}")
        later = run / "checkpoints" / f"step-{step:06d}" / "trainer" / "state.json"
        later.write_text(json.dumps(best | {"step": step, "val_loss": 1.0}))
    checkpoints._prune()
    assert steps(run) == [10, 16]


def test_a_linked_checkpoint_is_unlinked_when_it_is_not_needed_any_more(run, tiny_run, train, tmp_path, capsys):
    """A user moved it to another disk, and what the link leads to is not ours."""
    moved = shutil.move(run / "checkpoints" / "step-000004", tmp_path / "elsewhere")
    (run / "checkpoints" / "step-000004").symlink_to(moved)
    (run / "checkpoints" / "step-000006").symlink_to(tmp_path / "nowhere")
    (run / "checkpoints" / "step-000003.partial").symlink_to(moved)
    train(tiny_run("run", **{"optim.steps": 12, "checkpoint.keep": 1, "run.allow_changes": True}))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000012"]
    verify(moved)
    assert "step-000006, because its trainer/state.json cannot be read" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(run, tiny_run, train, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("files.shutil.rmtree", refuse)
    config = tiny_run("run", **{"optim.steps": 12, "checkpoint.keep": 1, "run.allow_changes": True})
    train(config)
    assert (steps(run), status(run)) == ([12], "finished")
    assert "step-000004 could not be deleted ([Errno 13] Permission denied" in capsys.readouterr().err
    train(config)  # what is left of the others does not stop it either
    assert "step-000008.partial could not be deleted" in capsys.readouterr().err


def test_a_directory_that_cannot_be_flushed_stops_neither_saving_nor_pruning(tiny_run, train, monkeypatch, capsys):
    def refuse(directory):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("training.checkpoint.sync_directory", refuse)
    run = train(tiny_run("run", **{"optim.steps": 8, "checkpoint.every": 2, "checkpoint.keep": 1}))
    assert (steps(run), status(run)) == ([8], "finished")
    error = capsys.readouterr().err
    assert error.count("could not be flushed to the disk ([Errno 5] Input/output error): its checkpoints are") == 1
    assert "could not be written" not in error


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_weights_that_are_not_finite_are_never_saved(tiny_run, train, where, on_error):
    """The loss and gradient before them are finite. Earlier checkpoints stay."""

    def spoil(run, *requests):
        result = train_step(run, *requests)
        if run.state.step == 7:
            last = run.model.transformer.ln_f.bias
            tensor = last.data if where == "weights" else run.optimizers[0].state[last]["exp_avg"]
            tensor[3] = float("inf")
        return result

    config = tiny_run("run", **{"checkpoint.every": 1, "checkpoint.keep": 2, "checkpoint.on_error": on_error})
    with pytest.raises(FloatingPointError, match=r"ln_f.bias\S* has values .* after step 7. Last good .*step-000006"):
        train(config, train_step=spoil)
    run = Path(config.run.dir) / "run"
    assert (steps(run), status(run)) == ([5, 6], "failed")
    assert not list((run / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("best", [None, [float("nan"), 0]], ids=["new", "as-earlier-versions-stored-it"])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(prepare, tiny_run, monkeypatch, best):
    with prepare(tiny_run("nan", **{"eval.every": 1})) as run:
        run.state.best = best
        for step, loss in enumerate([float("nan"), 5.0, float("nan"), 4.0, float("inf"), 4.5]):
            run.state.step = step
            result = Validation(SplitLoss(loss, loss, 1), {}, None, None, [])
            monkeypatch.setattr("train.measure", lambda *arguments, result=result: result)
            validate(run, StopSignal(announce=False))
        assert run.state.best == (4.0, 3)


def test_the_best_checkpoint_has_a_finite_loss(tmp_path):
    nan = float("nan")
    for step, loss, best in ((2, nan, [nan, 2]), (4, 3.0, [nan, 2]), (6, nan, [3.0, 4]), (8, 3.5, [3.0, 4])):
        (trainer := tmp_path / f"step-{step:06d}" / "trainer").mkdir(parents=True)
        (trainer / "state.json").write_text(json.dumps({"val_loss": loss, "best": best}))
    assert Checkpoints(tmp_path, keep=1, on_error="stop").best() == (3.0, tmp_path / "step-000004")


def test_only_losses_on_the_same_tokens_are_compared(tmp_path):
    """The best on the earlier number of tokens stays the best until there is a loss on the present number."""
    states = {2: (10, 2.0, [2.0, 2]), 4: (10, 2.1, [2.0, 2]), 6: (20, None, None), 8: (20, 3.0, [3.0, 8])}
    expected = {2: (2.0, 2), 4: (2.0, 2), 6: (2.0, 2), 8: (3.0, 8)}
    checkpoints = Checkpoints(tmp_path, keep=1, on_error="stop")
    for step, (tokens, loss, best) in states.items():
        (trainer := tmp_path / f"step-{step:06d}" / "trainer").mkdir(parents=True)
        (trainer / "state.json").write_text(json.dumps({"val_loss": loss, "best": best, "val_tokens": tokens}))
        assert checkpoints.best() == (expected[step][0], tmp_path / f"step-{expected[step][1]:06d}")


def test_older_checkpoints_that_cannot_be_read_are_kept(run, tiny_run, train, capsys):
    shutil.rmtree(run / "checkpoints" / "step-000004" / "trainer")  # to save space
    (run / "checkpoints" / "step-000008" / "trainer" / "state.json").write_text("[]")
    train(tiny_run("run", **{"optim.steps": 12, "checkpoint.keep": 1, "run.allow_changes": True}))
    assert steps(run) == [4, 8, 12]
    assert capsys.readouterr().err.count("cannot be read") == 2  # each is named once


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_run_whose_checkpoints_are_on_a_missing_disk_does_not_start_again(run, tiny_run, train, tmp_path, resume):
    disk = tmp_path / "disk"
    shutil.move(run / "checkpoints", disk / "checkpoints")
    (run / "checkpoints").symlink_to(disk / "checkpoints")
    config = tiny_run("run", **{"optim.steps": 10, "run.resume": resume})
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    shutil.move(disk, tmp_path / "unmounted")
    with pytest.raises(NotADirectoryError, match=rf"{run}/checkpoints leads to {disk}/\w+, which is not a directory"):
        train(config)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    shutil.move(tmp_path / "unmounted", disk)
    if resume != "never":
        train(config)
        assert steps(run) == [4, 8, 10]


def test_resume_never_and_must(run, tiny_run, train):
    with pytest.raises(ValueError, match=r"run.resume is never, but .* has checkpoints"):
        train(tiny_run("run", **{"run.resume": "never"}))
    with pytest.raises(FileNotFoundError, match=r"run.resume is must, but there is no checkpoint"):
        train(tiny_run("fresh", **{"run.resume": "must"}))
    assert not (run.parent / "fresh").exists()


def test_a_changed_configuration_is_refused_with_old_and_new_values(run, tiny_run, train):
    changed = tiny_run("run", **{"optim.steps": 20, "optim.weight_decay": 0.5, "run.seed": 4})
    with pytest.raises(ValueError, match="this run was started with another configuration") as refused:
        train(changed)
    for part in ("run.seed was 1337, is 4", "optim.weight_decay was 0.1, is 0.5", "optim.steps was 10, is 20"):
        assert part in str(refused.value)


def test_a_changed_model_is_refused(run, tiny_run, train):
    with pytest.raises(ValueError, match=r"model.n_layer was 2, is 3"):
        train(tiny_run("run", **{"model.n_layer": 3, "optim.steps": 10}))


def test_another_initial_model_is_refused(run, tiny_run, train):
    other = train(tiny_run("other"))
    with pytest.raises(ValueError, match=r"model.init_from was 'scratch', is '.*other'"):
        train(tiny_run("run", **{"model.init_from": str(other)}))


def test_a_failed_save_stops_the_run_at_once(run, tiny_run, train, monkeypatch):
    fail_at(monkeypatch, 200)
    longer = {"optim.steps": 400, "checkpoint.every": 200, "run.allow_changes": True}
    with pytest.raises(OSError, match="No space left on device"):
        train(tiny_run("run", **longer))
    assert 200 <= len(read_metrics(run / "metrics.jsonl")) < 400


def test_a_run_can_become_longer_with_allow_changes(run, tiny_run, train):
    train(tiny_run("run", **{"optim.steps": 15, "run.allow_changes": True}))
    assert steps(run)[-1] == 15
    assert json.loads((run / "provenance.json").read_text())[-1]["allow_changes"] is True


def test_a_run_cannot_become_shorter_than_it_already_is(run, tiny_run, train):
    with pytest.raises(ValueError, match=r"step-000010 is after step 10, past optim.steps 9: raise optim.steps"):
        train(tiny_run("run", **{"optim.steps": 9, "run.allow_changes": True}))


def test_a_second_process_in_the_directory_is_refused_while_the_first_runs(tiny_run, train, write_config, python):
    directory = RunDirectory(train(tiny_run("run", **{"optim.steps": 3})))
    directory.lock()
    result = python("train.py", "--config", write_config(tiny_run("run")), check=False)
    directory.close()
    assert result.returncode == 2
    assert "is in use by a run that has not ended" in result.stderr


def test_a_full_disk_stops_the_run_and_keeps_the_earlier_checkpoints(run, tiny_run, train, monkeypatch):
    fail_at(monkeypatch, 12, 14)
    longer = {"optim.steps": 14, "checkpoint.every": 2, "run.allow_changes": True}
    with pytest.raises(OSError, match=r"could not be written .*No space left on device.*earlier ones are complete"):
        train(tiny_run("run", **longer))
    assert steps(run) == [4, 8, 10]
    assert not list(run.rglob("*.partial"))
    for path in list_checkpoints(run / "checkpoints"):
        verify(path)


def fail_at(monkeypatch, *steps):
    """Let writing the checkpoints after these steps fail, as on a full disk."""
    save_file = training.checkpoint.save_file

    def write(tensors, path):
        if any(f"step-{step:06d}" in str(path) for step in steps):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("training.checkpoint.save_file", write)


def status(run):
    return json.loads((run / "status.json").read_text())["status"]


def test_a_full_disk_does_not_stop_the_run_if_so_configured(tiny_run, train, monkeypatch, capsys):
    fail_at(monkeypatch, 2, 4)
    run = train(tiny_run("run", **{"optim.steps": 6, "checkpoint.every": 2, "checkpoint.on_error": "continue"}))
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert (status(run), steps(run)) == ("finished", [6])


def test_a_run_without_its_last_checkpoint_is_not_finished(tiny_run, train, monkeypatch):
    fail_at(monkeypatch, 6)
    options = {"optim.steps": 6, "checkpoint.every": 2, "checkpoint.on_error": "continue"}
    config = tiny_run("run", **options)
    with pytest.raises(OSError, match=r"could not be written .*Free some space, and run the same command"):
        train(config)
    run = Path(config.run.dir) / "run"
    assert (status(run), steps(run), len(read_metrics(run / "metrics.jsonl"))) == ("failed", [2, 4], 6)
    monkeypatch.undo()
    train(config)
    assert (status(run), steps(run)) == ("finished", [2, 4, 6])


# train.py under a limit on the size of the files it writes, which has the effect of a full disk
LIMITED = "import resource, train; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); train.main()"


@pytest.mark.parametrize("on_error", ["stop", pytest.param("continue", marks=pytest.mark.slow)])
def test_a_limit_on_file_sizes_stops_the_command_or_not_as_configured(tiny_run, train, write_config, python, on_error):
    """After step 4 no file may be larger than 60 KB, but a checkpoint's files are."""
    run = train(tiny_run("full", **{"optim.steps": 4}))
    longer = {"optim.steps": 12, "checkpoint.every": 4, "checkpoint.on_error": on_error, "run.allow_changes": True}
    config = write_config(tiny_run("full", **longer))
    result = python("-c", LIMITED, "--config", config, check=False)
    assert "a checkpoint could not be written" in result.stderr
    assert "earlier ones are complete" in result.stderr
    assert "Traceback" not in result.stderr
    assert (result.returncode, status(run)) == (2, "failed")
    trained = len(read_metrics(run / "metrics.jsonl"))  # a thread writes the checkpoint while training continues
    assert trained == 12 if on_error == "continue" else 8 <= trained <= 12
    assert steps(run) == [4]
    verify(run / "checkpoints" / "step-000004")
    assert not list(run.rglob("*.partial"))


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "manifest.json",
         "trainer/optimizer.safetensors", "trainer/state.json"]  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_a_pickle_in_any_file_of_a_checkpoint_is_never_executed(run, tiny_run, train, tmp_path, name, protocol):
    """When a run resumes, when it is fine-tuned, and when a model is loaded: the file is refused or not read."""
    checkpoint, sprung = run / "checkpoints" / "step-000010", tmp_path / "sprung"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    write = pickle.dump if protocol == "pickle" else torch.save
    with open(checkpoint / name, "wb") as file:
        write({"transformer.wte.weight": Trap(sprung)}, file)
    manifest = checkpoint / "manifest.json"
    if name != "manifest.json":  # with a manifest that matches the changed file
        listed = json.loads(manifest.read_text())
        listed = {
            other: {"bytes": (checkpoint / other).stat().st_size, "sha256": file_sha256(checkpoint / other)}
            for other in (*listed, name)
            if (checkpoint / other).exists()
        }
        manifest.write_text(json.dumps(listed))
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    for attempt in (
        lambda: train(tiny_run("run", **{"optim.steps": 11, "run.allow_changes": True})),
        lambda: train(tiny_run("fine", **{"model.init_from": str(copy), "optim.steps": 3})),
        lambda: GPT.from_pretrained(copy),
        lambda: load_tokenizer(copy),
    ):
        with contextlib.suppress(ValueError, OSError):
            attempt()
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # the trap itself works
    assert sprung.exists()
