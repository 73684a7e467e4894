"""A sweep trains each combination once, and its table agrees with the logs of the runs."""

import os
import signal
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from scripts.sweep import finish, main, train_to_end
from training.run_directory import read_metrics


@pytest.fixture
def sweep(tiny_run, write_config, python, tmp_path):
    """`sweep(*arguments, **changes)`: run the script on a tiny configuration, with runs in tmp_path / "swept"."""

    def run(*arguments, check=True, **changes):
        config = write_config(tiny_run("x", **{"optim.steps": 6, "eval.every": 3} | changes))
        return python("-m", "scripts.sweep", "--config", config, "--dir", tmp_path / "swept", *arguments, check=check)

    return run


def test_each_combination_is_a_row_with_the_results_of_its_runs(sweep, tmp_path):
    arguments = ("--seeds", 1, 2, "--vary", "optim.lr=1e-4,1e-2", "--losses", 9.0, 0.1)
    table = [line for line in sweep(*arguments).stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    for line, lr in zip(table[2:], ("1e-4", "1e-2"), strict=True):
        runs = [read_metrics(tmp_path / "swept" / f"x-lr_{lr}-seed_{seed}" / "metrics.jsonl") for seed in (1, 2)]
        finals = [next(r["loss"] for r in reversed(run) if r["split"] == "val") for run in runs]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == f"{statistics.median(finals):.4f}"
        assert cells[1] == " ".join(f"{loss:.4f}" for loss in finals)
        assert cells[2:4] == ["0", "never"]  # the loss is below 9 before the first step, and never below 0.1
        assert cells[-1] == f"`optim.lr={lr}`"
    before = (tmp_path / "swept" / "x-lr_1e-4-seed_1" / "metrics.jsonl").read_bytes()
    assert [line for line in sweep(*arguments).stdout.splitlines() if line.startswith("|")] == table
    assert (tmp_path / "swept" / "x-lr_1e-4-seed_1" / "metrics.jsonl").read_bytes() == before


def test_the_best_loss_can_be_compared_instead_of_the_last(sweep, tmp_path):
    # The rate is so high that the loss rises, so the lowest loss is not the last one.
    arguments = ("--best", "--seeds", 1, 2, "--vary", "optim.lr=0.3")
    changes = {"optim.steps": 6, "eval.every": 1, "optim.warmup_steps": 0}
    row = [line for line in sweep(*arguments, **changes).stdout.splitlines() if line.startswith("|")][-1]
    runs = [read_metrics(tmp_path / "swept" / f"x-lr_0.3-seed_{seed}" / "metrics.jsonl") for seed in (1, 2)]
    curves = [{r["step"]: r["loss"] for r in run if r["split"] == "val"} for run in runs]
    steps = [min(curve, key=curve.get) for curve in curves]
    assert any(curve[step] < curve[6] for curve, step in zip(curves, steps, strict=True))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == ", ".join(f"{curve[s]:.4f} at {s}" for curve, s in zip(curves, steps, strict=True))
    assert cells[0] == f"{statistics.median(curve[s] for curve, s in zip(curves, steps, strict=True)):.4f}"


def test_values_can_contain_slashes_and_lists(sweep, verses, tmp_path):
    arguments = ("--seeds", 1, "--vary", f"data.dir={verses}", "optim.betas=[0.9,0.95],[0.8,0.99]")
    changes = {"optim.steps": 3, "eval.tokens": 70, "eval.final_tokens": 10**6}
    rows = [line for line in sweep(*arguments, **changes).stdout.splitlines() if "data.dir" in line]
    assert [row.rpartition("optim.betas=")[2] for row in rows] == ["[0.9,0.95]` |", "[0.8,0.99]` |"]
    runs = [read_metrics(path) for path in (tmp_path / "swept").glob("*/metrics.jsonl")]
    finals = {f"{next(r['final_loss'] for r in reversed(run) if r['split'] == 'val'):.4f}" for run in runs}
    assert {row.split(" | ")[1] for row in rows} == finals  # of all tokens, if eval.final_tokens is set
    assert len(runs) == 2


def test_a_finished_run_is_scored_on_final_tokens_that_were_added_later(tiny_run, write_config):
    options = {"optim.steps": 3, "eval.every": 3, "eval.tokens": 70}

    def score(name, **changes):
        config = write_config(tiny_run(name, **options | changes))
        loss, records = train_to_end(["--config", str(config)], None)
        assert [record["step"] for record in records if record["split"] == "train"] == [1, 2, 3]
        return loss

    before = score("x")
    for tokens in (100, 200):
        later = score("x", **{"eval.final_tokens": tokens})
        assert later == score(f"fresh-{tokens}", **{"eval.final_tokens": tokens}) != before
    assert score("x") == before


def test_a_run_of_a_sweep_is_deterministic_if_configured(tiny_run, write_config, monkeypatch):
    found = []
    monkeypatch.setattr("scripts.sweep.start_processes", lambda *names, deterministic: found.append(deterministic))
    monkeypatch.setattr("scripts.sweep.setup", lambda config, processes: nullcontext(SimpleNamespace()))
    monkeypatch.setattr("scripts.sweep.train", lambda run, **functions: "finished")
    for wanted in (True, False):
        finish(["--config", str(write_config(tiny_run(**{"system.deterministic": wanted, "eval.every": 1})))], None)
    assert found == [True, False]


def test_control_c_at_the_end_of_a_run_or_before_the_next_ends_a_sweep(tiny_run, write_config, monkeypatch):
    def train_one(name):
        config = write_config(tiny_run(name, **{"optim.steps": 2, "eval.every": 2, "optim.warmup_steps": 1}))
        train_to_end(["--config", str(config)], None)

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    train_one("first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scripts.sweep.setup", interrupt)
        train_one("second")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.draw_loss", interrupt)  # the last checkpoint has been written
        train_one("third")


def test_a_run_that_patience_ended_is_read_and_not_repeated(sweep, tmp_path):
    changes = {"optim.steps": 30, "optim.lr": 1e-12, "eval.patience": 2}
    changes |= {"eval.tokens": 70, "eval.final_tokens": 10**6}  # the latter are scored after the last step only
    arguments = ("--seeds", 1, "--idea", "undecayed-embeddings")
    table = sweep(*arguments, **changes).stdout.splitlines()[-1]
    path = tmp_path / "swept" / "x-undecayed-embeddings-seed_1" / "metrics.jsonl"
    last = read_metrics(path)[-1]
    assert (last["split"], last["step"] < 30) == ("val", True)
    assert table.startswith(f"| {last['loss']:.4f} |")
    before = path.read_bytes()
    assert sweep(*arguments, **changes).stdout.splitlines()[-1] == table
    assert path.read_bytes() == before
    # The same run without eval.patience would be continued, which is impossible.
    result = sweep(*arguments, check=False, **changes | {"eval.patience": 0})
    assert result.returncode == 2
    assert f"was stopped at step {last['step']} before the last validation of this configuration" in result.stderr


def test_one_loss_is_in_a_column_if_patience_ends_only_some_runs(sweep, tmp_path):
    changes = {"optim.steps": 9, "eval.patience": 2, "eval.tokens": 70, "eval.final_tokens": 10**6}
    table = sweep("--seeds", 1, "--vary", "optim.lr=1e-12,1e-2", **changes).stdout.splitlines()
    for line, lr in zip([line for line in table if "optim.lr=" in line], ("1e-12", "1e-2"), strict=True):
        last = read_metrics(tmp_path / "swept" / f"x-lr_{lr}-seed_1" / "metrics.jsonl")[-1]
        assert ("final_loss" in last) == (lr == "1e-2")
        assert line.startswith(f"| {last['loss']:.4f} |")


def test_impossible_sweeps_are_refused(sweep, monkeypatch, capsys):
    for fields, message in (
        (["optim.lr"], "--vary optim.lr: expected FIELD=VALUE"),
        (["optim.lr=1", "run.seed=1,2"], "--vary run.seed=1,2: the sweep sets run.seed itself; use --seeds"),
        (["run.dir=a,b"], "the sweep sets run.dir itself; use --dir"),
        (["run.name=a,b"], "the sweep sets run.name itself; each run is named by the varied values"),
        (["optim.lr=1,2", "optim.eps=1", "optim.lr=3"], "--vary has optim.lr twice: give all its values at once"),
    ):
        monkeypatch.setattr("sys.argv", ["sweep", "--config", "none.yaml", "--vary", *fields])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
    result = sweep(check=False, **{"eval.every": 0})
    assert result.returncode == 2
    assert "eval.every is 0" in result.stderr


def test_a_value_that_diverges_has_a_row(sweep):
    arguments = ("--seeds", 1, "--vary", "optim.lr=1e38", "--losses", 1.0)
    rows = [line for line in sweep(*arguments, **{"optim.steps": 20}).stdout.splitlines() if "optim.lr=" in line]
    assert len(rows) == 1
    assert rows[0].startswith("| inf | inf | never |")
