"""The sweep over sizes: its optima against known curves, and its command on tiny runs."""

import argparse
import json
import math

import pytest

from scripts import transfer
from scripts.transfer import (
    Shape,
    Sweep,
    describe_optimum,
    draw,
    excess,
    fields_of,
    find_optimum,
    main,
    optima,
    optimum_table,
    parse_shape,
    predict,
    series,
)
from training.config import parse_config


def bowl(best, values, floor=5.0):
    """A parabola in log2 of the value, with its minimum at `best`."""
    return {value: floor + 0.1 * math.log2(value / best) ** 2 for value in values}


def test_the_optimum_of_a_parabola_is_its_minimum():
    for best in (0.015, 0.02, 0.027):
        assert find_optimum(bowl(best, [0.005, 0.01, 0.02, 0.04, 0.08])) == pytest.approx(best)
        assert find_optimum(bowl(best, [0.01, 0.0141, 0.02, 0.0283, 0.04])) == pytest.approx(best)
        # far values, where the curve is no longer a parabola, do not count
        assert find_optimum(bowl(best, [0.01, 0.02, 0.04]) | {0.32: 5.1, 0.64: 5.2}) == pytest.approx(best)


def test_there_is_no_optimum_at_the_edge_of_the_values():
    assert find_optimum(bowl(0.01, [0.01, 0.02, 0.04])) is None
    assert find_optimum(bowl(0.05, [0.01, 0.02, 0.04])) is None
    assert find_optimum({}) is None
    # a run that diverged shows that the optimum is lower
    assert find_optimum(bowl(0.02, [0.01, 0.02]) | {0.04: math.inf}) == 0.02


def test_a_decay_of_zero_is_no_point_of_the_parabola():
    assert find_optimum(bowl(1.0, [0.5, 1.0, 2.0]) | {0.0: 5.2}) == pytest.approx(1.0)


def test_each_seed_has_its_own_optimum():
    losses = {value: {} for value in (0.01, 0.02, 0.04)}
    for seed, best in {1: 0.018, 2: 0.022, 3: 0.2}.items():
        for value, loss in bowl(best, losses).items():
            losses[value][seed] = loss
    assert optima(losses) == pytest.approx([0.018, 0.022])


def test_an_optimum_outside_the_values_is_said_to_be_there():
    def text(best, *seeds):
        return describe_optimum(
            {value: dict.fromkeys(seeds, loss) for value, loss in bowl(best, [0.01, 0.02, 0.04]).items()}
        )

    assert text(0.02, 1) == "0.02"
    assert text(0.018, 1, 2) == "0.018 (0.018 to 0.018)"
    assert text(0.005, 1) == "at most 0.01"
    assert text(0.1, 1) == "at least 0.04"


def test_the_excess_is_the_interpolated_loss_above_the_lowest():
    losses = {0.01: {1: 5.2, 2: 5.3}, 0.02: {1: 5.0, 2: 5.0}, 0.04: {1: 5.4}}
    assert excess(losses, 0.02) == pytest.approx(0.0)
    assert excess(losses, 0.02 / math.sqrt(2)) == pytest.approx((0.1 + 0.15) / 2)
    assert excess(losses, 0.03) == pytest.approx(0.4 * math.log2(1.5))  # seed 2 has no value above it
    assert excess(losses, 0.05) is None


def test_shapes_are_read_as_they_are_printed():
    for text in ("64x4", "512x8", "64x4x400"):
        assert str(parse_shape(text)) == text
    for text in ("64", "64x", "64x4x1x1", "ax4", "0x4", "48x4"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            parse_shape(text)


def test_a_series_differs_in_one_thing():
    shapes = [Shape(512, 4), Shape(64, 4), Shape(128, 4), Shape(64, 2), Shape(64, 4, 400), Shape(256, 4, 400)]
    assert series(shapes) == {
        "width": [Shape(64, 4), Shape(128, 4), Shape(512, 4)],
        "layers": [Shape(64, 2), Shape(64, 4)],
        "steps": [Shape(64, 4), Shape(64, 4, 400)],
        "width, 400 steps": [Shape(64, 4, 400), Shape(256, 4, 400)],
    }
    assert series(shapes[:1]) == {}


@pytest.mark.parametrize("name", transfer.SWEEPS)
def test_each_sweep_varies_its_field_only(name):
    sweep, shape = transfer.SWEEPS[name], Shape(64, 2, 50)

    def optim(value):
        fields = fields_of(sweep, shape, value, 7)
        flags = [part for field in fields for part in (f"--{field.partition('=')[0]}", field.partition("=")[2])]
        config = parse_config(["--config", transfer.BASE, *flags])
        assert (config.run.seed, config.model.n_head, config.eval.every) == (7, 2, 50)
        return vars(config.optim)

    one, other = optim(0.25), optim(0.5)
    assert {field for field in one if one[field] != other[field]} == {sweep.field}
    assert (one["name"], one[sweep.field], one["steps"]) == (sweep.optimizer, 0.25, 50)
    assert predict(name, Shape(64, 4), Shape(64, 4), 0.25) == 0.25


def test_the_command_trains_what_the_results_lack(tiny_run, write_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(transfer, "BASE", str(write_config(tiny_run("tiny"))))
    monkeypatch.setattr(transfer, "COMMON", "eval.at_start=false")
    sweeps = {"muon": Sweep("muon", "muon_lr", "optim.lr=0.01"), "muon-lr": Sweep("muon", "lr", "optim.muon_lr=0.02")}
    monkeypatch.setattr(transfer, "SWEEPS", sweeps)
    options = ["--results", str(tmp_path / "losses.json"), "--shapes", "32x1x4", "32x2x4", "--seeds", "1"]
    main([*options, "--sweep", "muon", "--values", "0.01", "0.02"])
    main([*options, "--sweep", "muon-lr", "--values", "0.02"])
    found = json.loads((tmp_path / "losses.json").read_text())
    assert {name: sorted(shapes) for name, shapes in found.items()} == {n: ["32x1x4", "32x2x4"] for n in sweeps}
    losses = [
        loss for shapes in found.values() for seeds in shapes.values() for v in seeds.values() for loss in v.values()
    ]
    assert len(set(losses)) == len(losses) == 6

    before = (tmp_path / "losses.json").read_text()
    monkeypatch.setattr(transfer, "train_one", lambda fields: pytest.fail("trained again"))
    capsys.readouterr()
    main([*options, "--sweep", "muon", "--values", "0.02", "0.01"])
    assert (tmp_path / "losses.json").read_text() == before
    assert f"| 32x2x4 | {found['muon']['32x2x4']['0.01']['1']:.4f} |" in capsys.readouterr().out
    # the other sweep contains a run of this one
    main([*options, "--sweep", "muon-lr", "--values", "0.01"])
    after = json.loads((tmp_path / "losses.json").read_text())
    assert after["muon-lr"]["32x2x4"]["0.01"] == found["muon"]["32x2x4"]["0.02"]


def test_the_figure_has_a_panel_for_each_series(tmp_path):
    curves = {width: {v: {1: loss} for v, loss in bowl(0.02, [0.01, 0.02, 0.04]).items()} for width in (64, 128)}
    results = {"muon": {Shape(width, 4): losses for width, losses in curves.items()}}
    draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there is nothing to draw: no two shapes"):
        draw({"muon": {Shape(64, 4): curves[64]}}, tmp_path / "none.png")
    rows = optimum_table(results).splitlines()[2:]
    # The rule predicts 0.02 * 2^-0.25 = 0.0168, half a grid step below the optimum.
    assert [[cell.strip() for cell in row.split("|")[3:7]] for row in rows] == [
        ["64x4", "0.02", "", ""],
        ["128x4", "0.02", "0.0168", "+0.5"],
    ]
