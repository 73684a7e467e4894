"""The loss plot: it is drawn from any records, and is a readable image."""

import numpy as np
import pytest
from matplotlib import image
from matplotlib.text import Text

from report.curves import SMOOTHING, draw_loss, late_range, smooth


def records(n):
    train = [{"split": "train", "step": i, "tokens": i * 100, "loss": 5.0 / i} for i in range(1, n + 1)]
    return [*train, {"split": "val", "step": n, "tokens": n * 100, "loss": 0.7, "bits_per_byte": 1.0}]


@pytest.mark.parametrize("metrics", [[], records(1)[1:], records(1), records(500)], ids=["none", "val", "one", "many"])
def test_any_number_of_points_gives_an_image(tmp_path, metrics):
    draw_loss(metrics, tmp_path / "loss.png", "a run")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 700
    assert pixels.std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_skipped_step_is_accepted_and_a_reference_is_drawn(tmp_path):
    metrics = [*records(20), {"split": "train", "step": 21, "tokens": 2100, "loss": None}]
    draw_loss(metrics, tmp_path / "without.png", "a run")
    draw_loss(metrics, tmp_path / "with.png", "a run", [("gpt2, released", 3.2924)])
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


@pytest.mark.parametrize("name", ["$LR_$SEED", "$\\\\frac{$", "_hidden", "x\\ny", "名前"])
def test_a_name_is_drawn_as_it_is(tmp_path, monkeypatch, name):
    """Neither the title nor the legend takes foreign text for mathematics, or for the mark of a hidden entry."""
    drawn = []
    real = Text.draw

    def draw(text, *arguments, **options):
        drawn.append((text.get_text(), text.get_parse_math()))
        return real(text, *arguments, **options)

    monkeypatch.setattr(Text, "draw", draw)
    draw_loss(records(20), tmp_path / "loss.png", name, [(name, 1.0)])
    assert (name, False) in drawn
    assert (f"{name} (1.0000)", False) in drawn


def test_validation_losses_that_are_null_are_ignored(tmp_path):
    broken = {"split": "val", "step": 21, "tokens": 2100, "loss": None, "bits_per_byte": None}
    draw_loss(records(20), tmp_path / "without.png", "a run")
    draw_loss([*records(20), broken], tmp_path / "with.png", "a run")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()
    draw_loss([broken], tmp_path / "alone.png", "a run")


def test_smoothing_is_a_centered_mean_that_does_not_lag_behind_a_falling_curve():
    values = np.random.default_rng(0).normal(size=300)
    half = round(SMOOTHING * 300 / 2)
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(300)]
    np.testing.assert_allclose(smooth(values), expected)
    line = np.linspace(9, 3, 500)
    np.testing.assert_allclose(smooth(line)[10:-10], line[10:-10])


def test_the_first_losses_do_not_determine_the_y_range():
    x = np.arange(1, 101)
    low, high = late_range([(x, np.where(x < 5, 50.0, 4 - x / 100)), (x[:0], x[:0])], [2.5])
    assert (low, high) == pytest.approx((2.5 - 0.04 * 1.45, 3.95 + 0.04 * 1.45))
    assert late_range([], [2.5]) is None
