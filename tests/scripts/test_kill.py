"""SIGKILL at random moments, and the run ends as if nothing had happened."""

import json

import pytest


@pytest.fixture
def kill(tiny_run, write_config, python, tmp_path):
    """`kill(kills, processes)`: what scripts/kill_test.py counted on a run of enough small steps."""

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


@pytest.mark.parametrize(("kills", "processes"), [(4, 1), (1, 2)])
def test_five_kills(kill, kills, processes):
    counts = kill(kills, processes)
    assert counts["differences"] == []
    assert (counts["kills"], counts["hung"]) == (kills, 0)


@pytest.mark.slow
def test_five_kills_of_a_float16_run_with_dropout(kill):
    changes = {"system.dtype": "float16", "model.dropout": 0.1, "model.n_embd": 32}
    assert kill(5, 1, **changes)["differences"] == []


def test_more_kills_than_steps_are_refused_before_anything_runs(tiny_run, write_config, python, tmp_path):
    config, out = write_config(tiny_run(**{"optim.steps": 3})), tmp_path / "out"
    result = python("-m", "scripts.kill_test", "--config", config, "--dir", out, "--kills", 4, check=False)
    assert result.returncode == 2
    assert "--kills 4 in a run of optim.steps 3: raise it, or kill less often" in result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_one_hundred_kills(kill):
    alone, two = kill(80, 1), kill(20, 2)
    assert alone["differences"] == two["differences"] == []
    assert (alone["kills"], two["kills"], alone["hung"], two["hung"]) == (80, 20, 0, 0)
    assert alone["after_first_step"] + two["after_first_step"] >= 60
    assert alone["half_written"] + two["half_written"] >= 15
