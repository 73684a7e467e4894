"""A run that is killed at random moments ends with the same bits."""

import json

import pytest

from scripts.kill_test import main


@pytest.fixture
def kill(tiny_run, write_config, python, tmp_path):
    """`kill(kills, processes)`: the counts of scripts/kill_test.py for a run of enough small steps."""

    def run(kills, processes, **changes):
        changes = {
            "model.n_embd": 96,
            "optim.steps": 20 * kills,
            "optim.lr": 1e-3,
            "checkpoint.every": 8,
            "eval.every": 50,
        } | changes
        config = write_config(tiny_run("x", **changes))
        out = tmp_path / "made" / f"{processes}"
        arguments = ("--config", config, "--dir", out, "--kills", kills, "--processes", processes)
        return json.loads(python("-m", "scripts.kill_test", *arguments, timeout=1200).stdout)

    return run


@pytest.mark.parametrize(("kills", "processes"), [pytest.param(4, 1, marks=pytest.mark.slow), (1, 2)])
def test_five_kills(kill, kills, processes):
    counts = kill(kills, processes)
    assert counts["differences"] == []
    assert (counts["kills"], counts["hung"]) == (kills, 0)


@pytest.mark.slow
def test_five_kills_of_a_float16_run_with_dropout(kill):
    changes = {"system.dtype": "float16", "model.dropout": 0.1, "model.n_embd": 32}
    assert kill(5, 1, **changes)["differences"] == []


def test_impossible_tests_are_refused_before_anything_runs(tiny_run, write_config, tmp_path, monkeypatch, capsys):
    def error_of(out, *options, **changes):
        config = write_config(tiny_run(**{"optim.steps": 3} | changes))
        monkeypatch.setattr("sys.argv", ["kill_test", "--config", str(config), "--dir", str(out), *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert not (out / "alone").exists()
        return capsys.readouterr().err

    out = tmp_path / "out"
    few = "--kills 4 in a run of optim.steps 3: raise optim.steps, or kill less often"
    assert few in error_of(out, "--kills", "4")
    assert "--kills must be at least 1, got -1" in error_of(out, "--kills", "-1")
    assert "--processes must be at least 1, got 0" in error_of(out, "--kills", "1", "--processes", "0")
    early = "eval.patience 2 may end the run before optim.steps: set it to 0"
    assert early in error_of(out, "--kills", "1", **{"eval.patience": 2, "eval.every": 1})
    (out / "killed").mkdir(parents=True)
    assert f"{out}/killed is the run of an earlier test: give another --dir, or" in error_of(out, "--kills", "1")


@pytest.mark.slow
def test_one_hundred_kills(kill):
    alone, two = kill(80, 1), kill(20, 2)
    assert alone["differences"] == two["differences"] == []
    assert (alone["kills"], two["kills"], alone["hung"], two["hung"]) == (80, 20, 0, 0)
    assert alone["after_first_step"] + two["after_first_step"] >= 60
    assert alone["half_written"] + two["half_written"] >= 15
