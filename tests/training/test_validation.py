"""Validation during training: when HellaSwag is scored, and the score of more tokens after the last step."""

import json
import shutil

import pytest

from checkpoints import STATE, read_state
from report.run_log import read_run_log
from training.config import Config, MixturePart
from training.run_directory import read_metrics
from training.validation import hellaswag_is_due


@pytest.mark.parametrize(
    ("every", "hellaswag_every", "expected"),
    [
        (250, 1000, [0, 1000, 2000, 2100]),
        (250, 250, [0, 250, 500, 750, 1000, 1250, 1500, 1750, 2000, 2100]),
        (300, 1000, [0, 1200, 2100]),  # the first validation after each multiple; 2,100 is also the last step
        (500, 100, [0, 500, 1000, 1500, 2000, 2100]),  # at most at each validation
    ],
)
def test_hellaswag_has_an_interval_of_its_own(every, hellaswag_every, expected):
    config = Config()
    config.eval.every, config.eval.hellaswag_every, config.optim.steps = every, hellaswag_every, 2100
    validations = sorted({*range(0, 2101, every), 2100})
    assert [step for step in validations if hellaswag_is_due(step, config)] == expected


def validations(run):
    return [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"]


def test_the_last_validation_also_scores_final_tokens_and_changes_nothing_else(tiny_run, prepare, train, capsys):
    options = {"optim.steps": 6, "eval.every": 2, "eval.tokens": 70, "checkpoint.every": 2}
    part = validations(train(tiny_run("part", **options)))
    whole = validations(train(tiny_run("whole", **options | {"eval.tokens": 10**6})))
    capsys.readouterr()
    config = tiny_run("both", **options | {"eval.final_tokens": 10**6})
    run = train(config)
    *earlier, last = validations(run)
    with prepare(config) as prepared:
        (windows,) = prepared.inputs.val.values()
        (final,) = prepared.inputs.final_val.values()
        n = final.n_targets
        assert windows.n_targets == 70 < n
        assert tuple(prepared.state.best) == min((record["loss"], record["step"]) for record in part)
    assert earlier == part[:-1]
    # To the bit: the figure of a run whose validations read everything.
    expected = {"final_loss": whole[-1]["loss"], "final_bits_per_byte": whole[-1]["bits_per_byte"], "final_tokens": n}
    assert last == part[-1] | expected
    assert (
        f"on {n:,} tokens: {last['final_loss']:.4f}, {last['final_bits_per_byte']:.4f} bits" in capsys.readouterr().out
    )
    train(tiny_run("short", **options | {"eval.tokens": n, "eval.final_tokens": n + 1}))  # the split has no more tokens
    assert "tokens: " not in capsys.readouterr().out
    rows = [row for row in read_run_log(run, "both").evaluations if row["task"] == "validation"]
    assert [row["value"] for row in rows] == [last["loss"], last["final_loss"]]
    assert [f" {count:,} tokens" in row["convention"] for count, row in zip((70, n), rows, strict=True)] == [True] * 2
    shutil.rmtree(run / "checkpoints" / "step-000006")
    train(config)
    assert validations(run) == [*earlier, last]


def test_a_finished_run_repeats_its_last_validation_if_final_tokens_change(tiny_run, train, monkeypatch):
    options = {"optim.steps": 4, "eval.every": 2, "eval.samples": 1, "eval.tokens": 70, "optim.lr": 1e-20}
    run = train(tiny_run("run", **options))
    for tokens in (100, 10**6):
        changed = options | {"eval.final_tokens": tokens}
        assert validations(train(tiny_run("run", **changed))) == validations(train(tiny_run(f"{tokens}", **changed)))
        assert (run / "samples.txt").read_bytes() == (run.parent / f"{tokens}" / "samples.txt").read_bytes()

    def written():
        return (run / "metrics.jsonl").read_bytes(), (run / "checkpoints" / "step-000004" / STATE).stat().st_mtime_ns

    before = written()
    for tokens in (10**6, 10**7, None):  # the first two are the whole split
        train(tiny_run("run", **options | {"eval.final_tokens": tokens}))
        assert written() == before
    # In a checkpoint of an earlier version, it is not known what was scored.
    state = read_state(run / "checkpoints" / "step-000004")
    older = {name: value for name, value in state.items() if name != "final_tokens"}
    (run / "checkpoints" / "step-000004" / STATE).write_text(json.dumps(older))
    monkeypatch.setattr("checkpoints.verify", lambda path: None)
    train(tiny_run("run", **changed))
    assert written()[0] == before[0]
    assert read_state(run / "checkpoints" / "step-000004") == state
    assert state["validations_since_best"] == 2  # those after steps 2 and 4: a repeated one counts once


def test_final_tokens_of_a_mixture_are_those_of_all_its_parts(tiny_run, train, verses, tmp_path):
    shutil.copytree(verses, tmp_path / "copy")
    mixture = [MixturePart(str(verses), 1), MixturePart(str(tmp_path / "copy"), 1)]
    options = {"data.mixture": mixture, "optim.steps": 3, "eval.every": 3, "eval.at_start": False}
    (whole,) = validations(train(tiny_run("whole", **options)))
    (both,) = validations(train(tiny_run("both", **options | {"eval.tokens": 70, "eval.final_tokens": 10**6})))
    assert both["final_loss"] == whole["loss"] != both["loss"]
