"""The expected loss in `train.py --dry-run`: for runs with the recipe and the dataset of the fitted runs only."""

import re

import pytest

from files import write_json
from processes import start_processes
from training import prediction
from training.config import Flags
from training.dry_run import dry_run
from training.inputs import open_inputs
from training.prediction import find_study, fit_study, observations, read_studies, recipe_of, size_of
from training.scaling_law import FORMS, Law, fit

LAW = Law(1.5, 3.0, 0.4, 3.4, 0.3)


@pytest.fixture
def configure(tiny_run):
    """`configure(**changes)`: a run with a validation, whose model has heads of 16 channels."""

    def run(**changes):
        return tiny_run("predicted", **{"eval.every": 20, "eval.tokens": 500, "optim.warmup_steps": 1} | changes)

    return run


def described(config):
    """The recipe of a configuration, and the size of its run."""
    inputs = open_inputs(config, None, verify=False)
    model = config.model_config(inputs.tokenizer.vocab_size)
    return recipe_of(config, model, inputs), size_of(config, model)


@pytest.fixture
def study(configure, tmp_path, monkeypatch):
    """A study whose runs follow LAW exactly, in the file that a dry run reads; and a held-out run, far from LAW."""
    runs = []
    for width in (16, 32, 64):
        for steps in (10, 20, 40, 80):
            changes = {"model.n_embd": width, "model.n_head": width // 16, "optim.steps": steps}
            size = described(configure(**changes))[1]
            loss = float(LAW.loss(size["parameters"], size["tokens"]))
            runs.append(size | {"layers": 2, "steps": steps, "held_out": False, "loss": loss})
    runs.append(size | {"layers": 2, "steps": steps, "held_out": True, "loss": loss})
    runs.append(size | {"layers": 2, "steps": 9, "held_out": False, "loss": 9.0})  # the warm-up takes more than a tenth
    runs.append(size | {"layers": 1, "steps": 80, "held_out": False, "loss": 9.0})  # too few layers
    monkeypatch.setattr(prediction, "RESULTS", tmp_path / "scaling.json")
    study = {"config": "tiny.yaml", "recipe": described(configure())[0], "runs": runs}
    write_json(prediction.RESULTS, [{"config": "other.yaml", "recipe": {}, "runs": []}, study])
    return study


def test_a_check_fits_the_runs_that_are_not_held_out(study):
    assert not any(run["held_out"] for run in prediction.fit_study(study).runs)
    assert len(prediction.fit_study(study).runs) == len(prediction.fit_study(study, with_held_out=True).runs) - 1 == 12


@pytest.fixture
def lines(study):
    """`lines(config)`: the lines of a dry run about the loss."""

    def run(config):
        text = dry_run(config, start_processes("cpu", "float32"), Flags(dry_run="1xA100"))[0]
        return re.findall(r"^loss  .*\n.*", text, re.M)

    return run


def test_a_dry_run_prints_the_expected_loss_with_its_interval(lines, configure):
    config = configure(**{"optim.steps": 30})
    (text,) = lines(config)
    size = described(config)[1]
    found = re.search(r"expected validation loss (\S+) \(95% interval (\S+) to (\S+)\)", text)
    loss, low, high = map(float, found.groups())
    assert loss == pytest.approx(float(LAW.loss(size["parameters"], size["tokens"])), abs=0.002)
    assert low <= loss <= high
    assert "on 500 tokens" in text
    assert "from 13 runs (docs/scaling.md)" in text  # and not 15: one is too short, and one has too few layers
    assert "extrapolated" not in text


def test_nothing_is_expected_of_a_model_with_one_layer(lines, configure):
    assert lines(configure(**{"optim.steps": 30, "model.n_layer": 1})) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim.steps": 240}, ["3.0 times the most tokens"]),
        ({"optim.steps": 5}, ["2.0 times fewer than the fewest tokens"]),
        ({"model.n_layer": 4, "model.n_embd": 64, "model.n_head": 4}, ["1.9 times the most parameters"]),
        (
            {"model.n_layer": 4, "model.n_embd": 64, "model.n_head": 4, "optim.steps": 160},
            ["1.9 times the most parameters", "2.0 times the most tokens", "times the most FLOPs"],
        ),
    ],
)
def test_it_says_by_what_factor_it_extrapolates(lines, configure, changes, expected):
    (text,) = lines(configure(**{"optim.steps": 40} | changes))
    assert "extrapolated: " in text
    assert all(words in text for words in expected), text


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.name": "muon"},
        {"optim.schedule": "wsd"},
        {"optim.lr": 2e-2},
        {"optim.warmup_steps": 3},
        {"data.batch_tokens": 512},
        {"data.shuffle": False},
        {"model.dropout": 0.1},
        {"model.n_head": 4},  # heads of another width
        {"eval.tokens": 400},
    ],
    ids=str,
)
def test_it_prints_nothing_for_another_recipe_or_other_validation_tokens(lines, configure, changes):
    assert lines(configure(**changes)) == []


def test_it_prints_nothing_for_another_dataset(lines, configure, python, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th line of a short text.\n\n" for i in range(200)), encoding="utf-8")
    python("-m", "data.prepare", "text", text, "--out", tmp_path / "other", "--tokenizer", "char")
    assert lines(configure(**{"data.dir": str(tmp_path / "other")})) == []
    assert len(lines(configure())) == 1


def test_what_does_not_change_the_recipe_does_not_matter(lines, configure):
    changes = {"run.seed": 7, "system.dtype": "bfloat16", "data.micro_batch": 2, "checkpoint.every": 5, "eval.every": 5}
    assert lines(configure(**changes)) == lines(configure())


def test_without_the_file_nothing_is_printed_and_a_damaged_one_is_named(lines, configure):
    prediction.RESULTS.write_text("[{}]")
    with pytest.raises(ValueError, match=r"scaling\.json is not a file of scripts/scaling\.py"):
        lines(configure())
    prediction.RESULTS.unlink()
    assert lines(configure()) == []


def test_a_study_without_a_newer_setting_was_made_with_its_default(study, configure):
    (other, found) = read_studies(prediction.RESULTS)
    recipe = described(configure())[0]
    del found["recipe"]["optim"]["muon_momentum"], found["recipe"]["model"]["causal"]
    assert find_study([other, found], recipe) is found
    assert find_study([other, found], described(configure(**{"optim.muon_momentum": 0.9}))[0]) is None
    found["recipe"]["optim"]["removed"] = 1
    assert find_study([other, found], recipe) is None


def test_too_few_sizes_give_no_fit_and_all_numbers_are_fitted(study):
    few = study | {"runs": [run for run in study["runs"] if run["tokens"] == study["runs"][0]["tokens"]]}
    assert fit_study(few) is None
    found = fit_study(study)
    assert found.law == fit(observations(found.runs), FORMS["general"])
    size = found.runs[0]
    assert found.predict(size)[0] == pytest.approx(float(LAW.loss(size["parameters"], size["tokens"])), abs=0.002)
