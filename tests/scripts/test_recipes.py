"""The benchmark of recipes: its statistics against plain calculations, and its command on tiny runs."""

import json
import math

import pytest

from scripts import recipes
from scripts.ideas import find_idea
from scripts.recipes import (
    Recipe,
    Size,
    arguments_of,
    draw,
    main,
    p_value,
    read_results,
    steps_table,
    steps_to,
    steps_to_present,
)
from training.config import parse_config
from training.run_directory import read_metrics


def test_p_value_counts_the_signs_that_give_a_sum_as_low():
    assert p_value([-0.1, -0.3, -0.2]) == 1 / 8
    assert p_value([-0.3, 0.1]) == 2 / 4  # -0.4 and -0.2 of -0.4, -0.2, 0.2, 0.4
    assert p_value([-0.01 * i for i in range(1, 9)]) == 1 / 256
    assert p_value([0.1, 0.2]) == 1.0
    assert p_value([-0.3, -0.2, 0.0]) == 2 / 8


def test_steps_are_interpolated_in_their_logarithm():
    losses = {steps: {1: 5.0 - 0.3 * math.log(steps)} for steps in (400, 500, 600)}
    for steps in (400, 437, 500, 599):
        assert steps_to(5.0 - 0.3 * math.log(steps), losses, 1) == pytest.approx(steps)
    assert steps_to(5.0 - 0.3 * math.log(601), losses, 1) is None
    assert steps_to(5.0 - 0.3 * math.log(450), losses, 2) is None


def test_each_size_and_recipe_is_a_configuration():
    for size in recipes.SIZES.values():
        config = parse_config(arguments_of(size, recipes.RECIPES["present"], size.steps, 7))
        assert (config.optim.steps, config.eval.every, config.run.seed) == (size.steps, size.steps, 7)
        assert config.optim.muon_momentum == 0.95
    size = recipes.SIZES["characters"]
    present = parse_config(arguments_of(size, recipes.RECIPES["present"], 100, 7)).optim
    for name, recipe in recipes.RECIPES.items():
        config = parse_config(arguments_of(size, recipe, 100, 7))
        changed = config.optim != present
        assert changed == bool(recipe.fields), name
        assert not recipe.idea or find_idea(recipe.idea)


@pytest.fixture
def results(monkeypatch):
    """Losses of two recipes with two seeds, of which the second needs 0.8 of the steps."""
    monkeypatch.setattr(recipes, "SIZES", {"small": Size("x.yaml", 100)})
    monkeypatch.setattr(recipes, "RECIPES", {"present": Recipe(), "faster": Recipe("optim.lr=1", "averaged")})

    def losses(steps_of_present, *lengths):
        return {n: {seed: 5.0 - 0.3 * math.log(n / steps_of_present) + 0.01 * seed for seed in (1, 2)} for n in lengths}

    return {"small": {"present": losses(1.0, 100), "faster": losses(0.8, 70, 90, 100)}}


def test_a_recipe_is_compared_with_the_present_recipe(results, tmp_path):
    found = steps_to_present("small", results["small"])
    assert found["faster"] == pytest.approx([80 * math.exp(d / 0.3) for d in (-0.005, 0.005)])
    row = steps_table("small", results["small"]).splitlines()[-1]
    assert row.startswith("| faster | 80 ± 2 | 20% | 2 | 70 steps: ")
    assert f"90 steps: {0.3 * math.log(80 / 90):.4f} ± 0.0000, p = 0.2500, n = 2" in row
    draw(results, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_what_the_results_lack(tiny_run, write_config, monkeypatch, tmp_path, capsys, python):
    config = str(write_config(tiny_run("tiny", **{"optim.name": "muon", "eval.every": 6})))
    monkeypatch.setattr(recipes, "SIZES", {"small": Size(config, 8)})
    monkeypatch.setattr(recipes, "PRESENT", "optim.lr=1e-2")
    monkeypatch.setattr(recipes, "RECIPES", {"present": Recipe(), "other": Recipe("optim.lr=2e-2", "per-head+normuon")})
    options = ["--size", "small", "--results", str(tmp_path / "losses.json"), "--seeds", "1", "2"]
    main([*options, "--recipes", "present", "other", "--fractions", "1", "0.75"])
    found = read_results(tmp_path / "losses.json")["small"]
    assert {name: sorted(losses) for name, losses in found.items()} == {"present": [6, 8], "other": [6, 8]}
    options_of_sweep = ("--seeds", 2, "--idea", "per-head+normuon", "--vary", "optim.lr=2e-2", "optim.steps=6")
    fields = ("eval.every=6", "eval.tokens=65536")
    python("-m", "scripts.sweep", "--config", config, "--dir", tmp_path / "swept", *options_of_sweep, *fields)
    (run,) = (tmp_path / "swept").iterdir()
    assert read_metrics(run / "metrics.jsonl")[-1]["loss"] == found["other"][6][2]

    before = json.loads((tmp_path / "losses.json").read_text())
    monkeypatch.setattr(recipes, "train_recipe", lambda *arguments: pytest.fail("trained again"))
    capsys.readouterr()
    main([*options, "--recipes", "present", "other", "--fractions", "0.75", "1"])
    assert json.loads((tmp_path / "losses.json").read_text()) == before
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 6 |")]
    assert sum("`--size small --recipes other --fractions 0.75 --seeds 1 2`" in row for row in rows) == 1
