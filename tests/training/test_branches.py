"""run.branch_from: a run that continues a checkpoint of another run with its own schedule."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import OPTIMIZER, STATE, read_state
from processes import start_processes
from report.diagnosis import diagnose
from train import train_step
from training.config import Flags
from training.dry_run import dry_run
from training.run_directory import read_metrics

STABLE = {"optim.schedule": "constant", "optim.steps": 16, "checkpoint.every": 7, "checkpoint.keep": 9}
DECAY = {"optim.schedule": "wsd", "optim.decay_fraction": 0.3, "optim.min_lr_ratio": 0.0}  # of 20 steps: from step 14


def records(run, first_step=0):
    """The records of metrics.jsonl from `first_step`, without the columns that depend on time."""
    names = ("split", "step", "tokens", "loss", "lr", "grad_norm")
    return [[r.get(name) for name in names] for r in read_metrics(run / "metrics.jsonl") if r["step"] >= first_step]


def tensors(run, step):
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / OPTIMIZER)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def stable(tiny_run, train):
    """`stable(**changes)`: a run of 16 steps with a constant learning rate and checkpoints after 7, 14 and 16."""
    return lambda **changes: train(tiny_run("stable", **STABLE | changes))


@pytest.mark.parametrize(
    "changes",
    [{"model.dropout": 0.2}, {"optim.name": "muon", "data.shift": True}, {"system.dtype": "float16"}],
    ids=["adamw-dropout", "muon", "float16"],
)
def test_a_branch_equals_a_run_that_decayed_in_place_bit_for_bit(stable, tiny_run, train, changes):
    changes = {"eval.every": 7, **changes}
    parent = stable(**changes)
    before = (parent / "metrics.jsonl").read_bytes()
    for steps, step in ((20, 14), (10, 7)):  # two budgets
        in_place = train(tiny_run(f"in-place-{steps}", **changes | DECAY | {"optim.steps": steps}))
        branch = tiny_run(f"{steps}", **changes | DECAY | {"optim.steps": steps, "run.branch_from": f"{parent}@{step}"})
        branch = train(branch)
        assert same_bits(tensors(branch, steps), tensors(in_place, steps))
        # Its own metrics begin with the validation at the branch point.
        assert records(branch)[0][:2] == ["val", step]
        assert records(branch) == [r for r in records(in_place, step) if r[:2] != ["train", step]]
        states = [read_state(run / "checkpoints" / f"step-{steps:06d}") for run in (branch, in_place)]
        assert states[0]["scaler"] == states[1]["scaler"]
        (start,) = json.loads((branch / "provenance.json").read_text())
        assert start["branched_from"] == str(parent / "checkpoints" / f"step-{step:06d}")
        assert start["resumed_at_step"] is None
    assert (parent / "metrics.jsonl").read_bytes() == before


def test_a_killed_branch_resumes_from_its_own_checkpoints(stable, tiny_run, train):
    parent = stable()
    options = DECAY | {"optim.steps": 20, "checkpoint.every": 4, "run.branch_from": f"{parent}@14"}
    whole = train(tiny_run("whole", **options))

    def killed_at_18(run, *requests):
        if run.state.step == 18:
            run.checkpoints.wait()  # another thread writes the checkpoint of step 16
            raise KeyboardInterrupt
        return train_step(run, *requests)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_run("killed", **options), train_step=killed_at_18)
    shutil.rmtree(parent)  # is not needed any more
    with pytest.raises(ValueError, match=r"run.branch_from was '.*stable@14', is '.*stable@7'. Restore these values"):
        train(tiny_run("killed", **options | {"run.branch_from": f"{parent}@7"}))
    with pytest.raises(ValueError, match=r"optim.steps was 20, is 24"):  # as in any resumed run
        train(tiny_run("killed", **options | {"optim.steps": 24}))
    killed = train(tiny_run("killed", **options | {"run.resume": "must"}))
    assert same_bits(tensors(killed, 20), tensors(whole, 20))
    assert records(killed) == records(whole)
    starts = json.loads((killed / "provenance.json").read_text())
    assert [(s["resumed_at_step"], s["branched_from"] is None) for s in starts] == [(None, False), (16, True)]


def test_a_branch_point_can_be_spelled_in_other_ways_when_the_branch_resumes(stable, tiny_run, train, monkeypatch):
    parent = stable()
    options = DECAY | {"optim.steps": 17}
    branch = train(tiny_run("branch", **options | {"run.branch_from": f"{parent}@14"}))
    shutil.rmtree(parent)
    monkeypatch.chdir(parent.parent)
    before = (branch / "metrics.jsonl").read_bytes()
    for name in ("stable@14", f"{parent}/@14", "../runs/stable@0014"):
        train(tiny_run("branch", **options | {"run.branch_from": name}))  # finished: nothing is trained
        assert (branch / "metrics.jsonl").read_bytes() == before
    for name in ("stables@14", "stable@7", "stable", None):
        with pytest.raises(ValueError, match=r"run.branch_from was '.*/stable@14', is .*\. Restore these values"):
            train(tiny_run("branch", **options | {"run.branch_from": name}))


def test_a_branch_resumes_in_another_directory_than_it_started_in(stable, tiny_run, train, monkeypatch, tmp_path):
    parent = stable()
    options = DECAY | {"optim.steps": 18, "checkpoint.every": 1, "checkpoint.keep": 9}
    monkeypatch.chdir(parent.parent.parent)
    branch = train(tiny_run("branch", **options | {"run.branch_from": "runs/stable@14"}))
    shutil.rmtree(branch / "checkpoints" / "step-000018")
    monkeypatch.chdir(tmp_path.parent)
    for name in (f"{parent}@7", f"{parent}s@14"):
        with pytest.raises(ValueError, match=r"run.branch_from was 'runs/stable@14', is "):
            train(tiny_run("branch", **options | {"run.branch_from": name}))
    train(tiny_run("branch", **options | {"run.branch_from": f"{parent}@14"}))
    assert [r["step"] for r in read_metrics(branch / "metrics.jsonl")] == [15, 16, 17, 18]
    state = read_state(branch / "checkpoints" / "step-000017")
    del state["branch_from_path"]  # as in a checkpoint of an older version
    (branch / "checkpoints" / "step-000017" / STATE).write_text(json.dumps(state))
    shutil.rmtree(branch / "checkpoints" / "step-000018")
    monkeypatch.setattr("checkpoints.verify", lambda path: None)
    train(tiny_run("branch", **options | {"run.branch_from": "runs/stable@14"}))


def test_a_dry_run_says_where_a_branch_would_start_or_why_it_cannot(stable, tiny_run, train):
    parent = stable()

    def report(hardware="8xH100", **changes):
        changes = {"run.branch_from": f"{parent}@14", "optim.steps": 20} | DECAY | changes
        return dry_run(tiny_run("branch", **changes), start_processes("cpu", "float32"), Flags(dry_run=hardware))

    name = f"{parent}/checkpoints/step-000014"
    assert f"\nstart       branching from {name}: 6 of 20 steps remain\n" in report()[0]
    assert "was trained with a learning rate of 0.01 in its last step" in report(**{"optim.decay_fraction": 0.6})[0]
    for changes, message in (
        ({"optim.steps": 14}, "is after step 14, and optim.steps 14 includes these steps"),
        ({"run.seed": 1}, "run.seed was 1337, is 1"),
        ({"run.branch_from": f"{parent}@last"}, "expected RUN or RUN@STEP"),
    ):
        with pytest.raises(ValueError, match=message):
            report(**changes)
    elsewhere = {"run.branch_from": "elsewhere/stable@14"}  # an error only on the hardware that would train
    found = "run.branch_from elsewhere/stable@14: elsewhere/stable is not the directory of a run"
    text, missing = report(**elsewhere)
    assert (f"\nstart       {found}" in text, missing) == (True, "")
    assert report("", **elsewhere)[1].startswith(found)

    train(tiny_run("branch", **DECAY | {"run.branch_from": f"{parent}@14", "optim.steps": 20}))
    shutil.rmtree(parent)
    (parent.parent / "branch" / "status.json").unlink()
    own = parent.parent / "branch" / "checkpoints" / "step-000020"
    assert f"\nstart       resuming from {own}: 0 of 20 steps remain\n" in report()[0]
    with pytest.raises(ValueError, match=r"this run was started with another configuration: run.seed was 1337, is 1"):
        report(**{"run.seed": 1})
    assert not (parent.parent / "branch" / "status.json").exists()  # a dry run writes nothing


def test_a_run_alone_is_its_newest_checkpoint_and_a_branch_can_be_branched_from(stable, tiny_run, train):
    parent = stable()
    first = train(tiny_run("first", **STABLE | {"optim.steps": 18, "run.branch_from": str(parent)}))
    assert records(first)[0][1] == 17
    second = train(tiny_run("second", **STABLE | {"optim.steps": 20, "run.branch_from": f"{first}@18"}))
    whole = train(tiny_run("whole", **STABLE | {"optim.steps": 20}))
    assert same_bits(tensors(second, 20), tensors(whole, 20))


def test_patience_counts_from_the_branch_point(stable, tiny_run, train):
    """Otherwise a branch from the end of a run that eval.patience has ended would end at once."""
    options = {"eval.every": 1, "eval.patience": 2, "optim.lr": 1e-12}
    parent = stable(**options)
    last = read_metrics(parent / "metrics.jsonl")[-1]["step"]
    assert last < 16
    branch = train(tiny_run("branch", **STABLE | options | {"optim.lr": 1e-2, "run.branch_from": str(parent)}))
    assert read_metrics(branch / "metrics.jsonl")[-1]["step"] == 16


@pytest.mark.parametrize(
    ("step", "changes", "warned"),
    [
        (14, {}, []),
        (16, {}, ["0.01 in its last step, where this run has 0.00833 (optim.lr)"]),
        (14, {"optim.lr": 2e-2}, ["0.01 in its last step, where this run has 0.02 (optim.lr)"]),
        (14, {"optim.muon_lr": 0.03}, []),  # AdamW does not use it
        (14, {"optim.name": "muon"}, []),
        (14, {"optim.name": "muon", "optim.muon_lr": 0.03}, ["0.02 in its last step, where this run has 0.03 (opt"]),
        (16, {"optim.name": "muon"}, ["where this run has 0.00833 (optim.lr)", "this run has 0.0167 (optim.muon_lr)"]),
    ],
)
def test_other_learning_rates_at_the_branch_point_give_a_warning(
    stable, tiny_run, prepare, capsys, step, changes, warned
):
    parent = stable(**{"optim.name": changes.get("optim.name", "adamw")})
    capsys.readouterr()
    with prepare(tiny_run("branch", **DECAY | changes | {"run.branch_from": f"{parent}@{step}"})):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert f"branching from {parent}/checkpoints/step-0000{step}" in lines
    lines = [line for line in lines if "was trained with a learning rate of" in line]
    assert len(lines) == len(warned)
    assert all(message in line for message, line in zip(warned, lines, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.branch_from": "{stable}@15"}, r"stable has no checkpoint of step 15, only of 7, 14, 16"),
        ({"run.branch_from": "{stable}s@7"}, r"run.branch_from .*stables@7: .*stables is not the directory of a run"),
        ({"run.branch_from": "{stable}@last"}, r"run.branch_from .*@last: expected RUN or RUN@STEP"),
        ({"run.resume": "must"}, r"run.resume is must, but there is no checkpoint in .*branch"),
        ({"model.init_from": "{stable}"}, r"model.init_from was 'scratch', is '.*stable'. Restore these values: a b"),
        ({"model.n_layer": 1}, r"the run of run.branch_from has another configuration: model.n_layer was 2, is 1\. R"),
        ({"run.seed": 1, "data.batch_tokens": 512}, r"run.seed was 1337, is 1; data.batch_tokens was 256, is 512"),
        ({"optim.weight_decay": 0.0}, r"optim.weight_decay was 0.1, is 0.0"),
        ({"optim.steps": 14}, r"step-000014 is after step 14, and optim.steps 14 includes these steps: raise"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_be_is_refused_before_anything_is_created(stable, tiny_run, train, changes, message):
    parent = stable()
    changes = {"run.branch_from": "{stable}@14"} | changes
    changes = {name: v.format(stable=parent) if isinstance(v, str) else v for name, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tiny_run("branch", **changes))
    assert not (parent.parent / "branch").exists()


def test_the_doctor_does_not_expect_the_beginning_of_a_run_in_a_branch(stable, tiny_run, train):
    parent = stable(**{"optim.steps": 100, "checkpoint.every": 60})
    branch = train(tiny_run("branch", **DECAY | {"optim.steps": 110, "run.branch_from": f"{parent}@60"}))
    beginning = {"the first loss is too low for an untrained model", "the model does not learn"}
    assert not beginning & {finding.title for finding in diagnose(branch)}
