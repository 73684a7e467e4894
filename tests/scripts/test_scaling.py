"""The study of small runs: its command on tiny runs, and what docs/scaling.md states about the kept ones."""

import json
import re
from pathlib import Path

import pytest

from scripts import scaling
from scripts.scaling import Shape, arguments_of, describe, main
from training.config import parse_config
from training.prediction import fit_study, read_studies
from training.run_directory import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tiny_run, write_config):
    changes = {"model.n_layer": 4, "optim.steps": 16, "eval.every": 4, "eval.tokens": 300, "optim.warmup_steps": 0}
    return str(write_config(tiny_run("tiny", **changes)))


@pytest.fixture
def options(config, tmp_path):
    grid = ["--shapes", "1x16", "2x16", "3x16", "2x32", "--fractions", "0.2", "0.3", "0.5", "1", "--seeds", "1"]
    return ["--config", config, "--results", str(tmp_path / "scaling.json"), *grid]


def test_shapes_keep_the_width_of_a_head(config):
    run = parse_config(arguments_of(config, Shape(3, 48), 8, 5))
    assert (run.model.n_layer, run.model.n_embd, run.model.n_head) == (3, 48, 3)
    assert (run.optim.steps, run.eval.every, run.run.seed) == (8, 8, 5)
    assert describe(run)[0] == describe(parse_config(["--config", config]))[0]
    with pytest.raises(ValueError, match="--shapes 2x40: the channels must be a multiple of 16"):
        arguments_of(config, Shape(2, 40), 8, 5)


@pytest.mark.parametrize("text", ["3", "3x", "x64", "0x64", "3x64x2"])
def test_a_wrong_shape_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--shapes", text])
    assert f"{text}: expected LAYERSxCHANNELS" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_what_the_file_lacks_and_checks_the_held_out_run(options, python, tmp_path, capsys):
    main([*options, "--train", "--held-out", "1", "2", "--figure", str(tmp_path / "figure.png")])
    output = capsys.readouterr().out
    (study,) = read_studies(tmp_path / "scaling.json")
    small, large = ([run for run in study["runs"] if run["held_out"] is held_out] for held_out in (False, True))
    assert [(run["layers"], run["channels"], run["steps"], run["seed"]) for run in large] == [
        (4, 32, 16, 1),
        (4, 32, 16, 2),
    ]
    assert all(run["flops"] * 4 <= large[0]["flops"] for run in small)
    assert {run["steps"] for run in small} == {3, 5, 8, 16}  # 1x16 is small enough for all steps
    assert re.search(
        r"Held out, [4-9]\.\d times the FLOPs .* 4x32, 16 steps\. Predicted .* \(2 seeds\): error [+-]", output
    )
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    kept = small[-1]
    arguments = arguments_of(options[1], Shape(kept["layers"], kept["channels"]), kept["steps"], 1)
    python("train.py", *arguments, "--run.dir", tmp_path / "runs")
    assert read_metrics(tmp_path / "runs/scaling/metrics.jsonl")[-1]["loss"] == kept["loss"]


def test_a_second_start_continues(options, tmp_path, monkeypatch, capsys):
    trained = []

    def train_run(arguments):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(arguments)
        return 3.0 + 1 / len(trained)

    monkeypatch.setattr(scaling, "train_run", train_run)
    with pytest.raises(SystemExit, match="130"):
        main([*options, "--train"])
    assert "the same command continues" in capsys.readouterr().err
    before = read_studies(tmp_path / "scaling.json")[0]["runs"]
    assert len(before) == 5
    monkeypatch.setattr(scaling, "train_run", lambda arguments: trained.append(arguments) or 3.0 + 1 / len(trained))
    main([*options, "--train"])
    after = read_studies(tmp_path / "scaling.json")[0]["runs"]
    assert after[:5] == before
    assert len(after) == len(trained) > 5
    assert len({json.dumps(arguments) for arguments in trained}) == len(trained)


def test_too_few_runs_are_an_error_that_names_the_remedy(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert "has too few runs with the recipe and the dataset of" in capsys.readouterr().err


def test_a_run_that_diverges_is_not_kept(config, monkeypatch):
    monkeypatch.setattr(scaling, "train_apart", lambda arguments: float("inf"))
    with pytest.raises(FloatingPointError, match="has diverged"):
        scaling.train_run(["--config", config])


@pytest.mark.slow
def test_the_page_states_what_the_kept_runs_give():
    page = " ".join((ROOT / "docs/scaling.md").read_text(encoding="utf-8").split())
    for study in read_studies(ROOT / "docs/scaling.json"):
        found = fit_study(study)
        held_out = [run for run in study["runs"] if run["held_out"]]
        assert all(run["flops"] * scaling.HELD_OUT <= large["flops"] for run in found.runs for large in held_out)
        text = [*scaling.check(study, found), scaling.form_table(study, found), scaling.run_table(study, found)]
        assert all(" ".join(part.split()) in page for part in text)
