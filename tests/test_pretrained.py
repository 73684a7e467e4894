"""Test that a run, a directory or a name selects the right model, and that a damaged checkpoint is never selected."""

import json

import pytest
import torch

from checkpoints import MANIFEST, OPTIMIZER, STATE, choose_checkpoint, find_newest, list_checkpoints, read_state, verify
from data.tokenizer import CharacterTokenizer
from files import file_sha256
from model import GPT, GPTConfig
from pretrained import extend_positions, load_model, resolve_model


def write_checkpoint(run, step):
    """Write a checkpoint of a model that nothing has trained, with a manifest."""
    directory = run / "checkpoints" / f"step-{step:06d}"
    tokenizer = CharacterTokenizer("abc")
    torch.manual_seed(step)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(directory, eos_token_id=tokenizer.eot)
    tokenizer.save(directory)
    for name in (STATE, OPTIMIZER):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    write_manifest(directory)
    return directory


def write_manifest(directory, leave_out=MANIFEST):
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST]
    names = {path.relative_to(directory).as_posix(): path for path in files}
    listed = {
        name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in names.items()
        if name != leave_out
    }
    (directory / MANIFEST).write_text(json.dumps(listed))


@pytest.fixture
def run(tmp_path):
    """Return the directory of a run with three checkpoints."""
    for step in (900, 4, 1_000_000):
        write_checkpoint(tmp_path / "runs" / "one", step)
    (tmp_path / "runs" / "one" / "checkpoints" / "step-2000000.partial").mkdir()
    return tmp_path / "runs" / "one"


def test_checkpoints_are_listed_in_the_order_of_their_steps(run, tmp_path):
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-000004", "step-000900", "step-1000000"]
    assert list_checkpoints(tmp_path / "missing") == []


def test_a_run_stands_for_its_newest_checkpoint(run, tmp_path):
    newest = run / "checkpoints" / "step-1000000"
    assert resolve_model(str(run)) == str(newest)
    assert resolve_model(None, str(run.parent)) == str(newest)
    assert resolve_model(str(newest)) == str(newest)
    assert resolve_model("gpt2") == "gpt2"
    with pytest.raises(FileNotFoundError, match=r"no run with a checkpoint in .*: train a model, or name one"):
        resolve_model(None, str(tmp_path / "nowhere"))
    (tmp_path / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="empty has no checkpoint yet"):
        resolve_model(str(tmp_path / "runs" / "empty"))


def test_damaged_checkpoints_are_skipped_and_named(run, capsys):
    first, second, third = list_checkpoints(run / "checkpoints")
    (third / "model.safetensors").write_bytes(b"short")
    (second / STATE).write_text("[]")  # another hash, the same size
    assert find_newest(run / "checkpoints") == (first, [third, second])
    assert resolve_model(str(run)) == str(first)
    error = capsys.readouterr().err
    assert f"skipping a damaged checkpoint: {third / 'model.safetensors'} has 5 bytes" in error
    assert f"skipping a damaged checkpoint: {second / STATE} has another sha256" in error
    (first / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        resolve_model(str(run))


@pytest.mark.parametrize("name", ["config.json", STATE, OPTIMIZER])
def test_a_manifest_must_list_the_files_that_a_checkpoint_needs(run, name):
    checkpoint = run / "checkpoints" / "step-000004"
    verify(checkpoint)
    write_manifest(checkpoint, leave_out=name)
    with pytest.raises(ValueError, match=f"does not list {name}"):
        verify(checkpoint)
    for content in ("[]", "[" * 100_000, '{"config.json": {"bytes": "many", "sha256": ""}}'):
        (checkpoint / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match="is not a manifest"):
            verify(checkpoint)


@pytest.mark.parametrize("name", ["../step-000900/config.json", "/dev/zero", "trainer/../../step-000900/config.json"])
def test_a_manifest_may_list_only_files_of_its_checkpoint(run, name):
    checkpoint = run / "checkpoints" / "step-000004"
    (checkpoint / MANIFEST).write_text(json.dumps({name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(ValueError, match="expected only files of the checkpoint"):
        verify(checkpoint)


def test_a_model_is_loaded_with_its_tokenizer_and_its_name(run):
    model, tokenizer, name = load_model(str(run), dtype=torch.bfloat16)
    assert name == str(run / "checkpoints" / "step-1000000")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.decode(tokenizer.encode("cab")) == "cab"


def test_from_pretrained_accepts_a_run(run):
    newest = GPT.from_pretrained(run / "checkpoints" / "step-1000000")
    torch.testing.assert_close(GPT.from_pretrained(run).state_dict(), newest.state_dict(), rtol=0, atol=0)


@pytest.fixture
def worse_at_the_end(run):
    """Return the run, ended by eval.patience: the checkpoint of step 900 has the lowest validation loss."""
    for step, loss in ((4, 5.0), (900, 3.25), (1_000_000, 3.5)):
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        state = {"step": step, "val_loss": loss, "identity": {"optim": {"steps": 2_000_000}}}
        write_state(checkpoint, state | {"finished": step == 1_000_000})
    return run


def write_state(checkpoint, state):
    (checkpoint / STATE).write_text(json.dumps(state))
    write_manifest(checkpoint)


@pytest.mark.parametrize(
    ("finished", "which", "expected"),
    [
        (True, None, 900),
        (False, None, 1_000_000),
        (None, None, 1_000_000),  # as older versions wrote it
        (True, "newest", 1_000_000),
        (False, "best", 900),
        (True, "4", 4),
        (True, "000004", 4),
    ],
)
def test_the_best_checkpoint_is_the_default_after_patience_ended_the_run(
    worse_at_the_end, capsys, finished, which, expected
):
    newest = worse_at_the_end / "checkpoints" / "step-1000000"
    state = read_state(newest) | {"finished": finished}
    write_state(newest, {name: value for name, value in state.items() if value is not None})
    chosen = resolve_model(str(worse_at_the_end), checkpoint=which)
    assert chosen == str(worse_at_the_end / "checkpoints" / f"step-{expected:06d}")
    assert f"loaded {chosen}, the" in capsys.readouterr().err


def test_a_run_that_took_all_its_steps_stands_for_its_newest_checkpoint(worse_at_the_end):
    newest = worse_at_the_end / "checkpoints" / "step-1000000"
    write_state(newest, read_state(newest) | {"step": 2_000_000})
    assert choose_checkpoint(worse_at_the_end) == newest


def test_an_impossible_checkpoint_is_refused(worse_at_the_end):
    name = str(worse_at_the_end)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5, only of 4, 900, 1000000"):
        resolve_model(name, checkpoint="5")
    with pytest.raises(ValueError, match="--checkpoint latest: expected best, newest or a step"):
        resolve_model(name, checkpoint="latest")
    with pytest.raises(ValueError, match="gpt2 is not a run"):
        resolve_model("gpt2", checkpoint="best")
    (worse_at_the_end / "checkpoints" / "step-000900" / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"step-000900 is damaged .*: choose another checkpoint"):
        resolve_model(name, checkpoint="best")


def test_without_validation_there_is_no_best_checkpoint(run):
    with pytest.raises(FileNotFoundError, match="has a validation loss: use --checkpoint newest"):
        resolve_model(str(run), checkpoint="best")


def test_a_tokenizer_of_another_size_is_refused(run):
    checkpoint = run / "checkpoints" / "step-000004"
    CharacterTokenizer("abcdef").save(checkpoint)
    with pytest.raises(ValueError, match="has 7 tokens, but the model has 4: they do not belong together"):
        load_model(str(checkpoint))


def test_a_file_and_a_directory_without_a_model_are_refused_as_what_they_are(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("text")
    with pytest.raises(FileNotFoundError, match=r"notes\.txt is a file, expected a directory that holds config\.json"):
        load_model(str(file))
    with pytest.raises(FileNotFoundError, match=r"is not a model directory: it has no config\.json"):
        load_model(str(tmp_path))


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs/nope does not exist; there are no runs beside it"):
        resolve_model("runs/nope")
    for name in ("b", "a"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    for name in ("runs/nope", "runs/nope/", str(tmp_path / "runs" / "nope")):
        with pytest.raises(FileNotFoundError, match=r"nope/? does not exist; the runs in .*runs are a, b"):
            resolve_model(name)
    with pytest.raises(FileNotFoundError, match="runs is not a model, but holds runs: a, b; give one of them"):
        resolve_model("runs")
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000002").mkdir()
    with pytest.raises(FileNotFoundError, match="holds the checkpoints of runs/a; give one of them"):
        resolve_model("runs/a/checkpoints")
    for name in ("runs/notes", "gpt2", "openai-community/gpt2"):
        assert resolve_model(name) == name


def test_extended_positions_lie_between_the_learned_ones():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=9, block_size=5, n_layer=1, n_head=1, n_embd=8, attention="lsh", lsh_buckets=2))
    longer = extend_positions(model, 9)  # each second position is a learned one
    old, new = model.transformer.wpe.weight, longer.transformer.wpe.weight
    torch.testing.assert_close(new[::2], old)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert longer.config.block_size == 9
    assert longer.transformer.h[0].attn.pattern.chunk == 9  # twice the keys of a bucket
    ids = torch.arange(5)[None]
    expected = model(ids, position_ids=torch.arange(5)).logits
    torch.testing.assert_close(longer(ids, position_ids=2 * torch.arange(5)).logits, expected)
