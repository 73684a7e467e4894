"""The fit of L(N, D) to synthetic runs: it finds known constants, and its interval contains new runs."""

import numpy as np
import pytest

from training.scaling_law import FORMS, Law, Observations, bootstrap, fit, interval, leave_one_size_out

TRUE = Law(2.0, np.log(30.0), 0.3, np.log(1000.0), 0.5)
GRID = [(n, d) for n in (1e5, 2e5, 4e5, 8e5) for d in (2e5, 4e5, 8e5, 1.6e6)]
NEW = 8e5, 6.4e6  # four times the FLOPs of the largest run


def observe(law=TRUE, noise=0.0, seeds=1, generator=None):
    """Runs of each size in GRID, whose losses have noise with this relative standard deviation."""
    parameters, tokens = np.tile(np.array(GRID), (seeds, 1)).T
    generator = generator or np.random.default_rng(0)
    return Observations(
        parameters, tokens, law.loss(parameters, tokens) * np.exp(noise * generator.standard_normal(len(tokens)))
    )


@pytest.mark.parametrize(
    ("form", "law"),
    [
        ("full", TRUE),
        ("full", Law(1.2, 1.1, 0.15, 7.6, 0.55)),
        ("one-exponent", Law(2.5, 4.5, 0.4, 5.7, 0.4)),
        ("published-exponents", Law(1.69, 3.7, 0.34, 4.1, 0.28)),
        ("joint", Law(0.0, 25.0, 0.8, 29.0, 1.0, 0.09)),
    ],
)
def test_the_constants_of_runs_without_noise_are_found(form, law):
    assert fit(observe(law), FORMS[form]) == pytest.approx(law, rel=1e-3, abs=1e-9)


def test_with_noise_the_loss_of_a_larger_run_is_predicted():
    found = fit(observe(noise=0.003, seeds=3), FORMS["full"])
    assert found != TRUE
    assert float(found.loss(*NEW)) == pytest.approx(TRUE.loss(*NEW), rel=0.01)
    for size in GRID:
        assert float(found.loss(*size)) == pytest.approx(TRUE.loss(*size), rel=0.004)


def test_one_wrong_run_does_not_move_the_law():
    runs = observe(noise=0.001, seeds=2)
    runs.losses[5] *= 1.2
    assert float(fit(runs, FORMS["full"]).loss(*NEW)) == pytest.approx(TRUE.loss(*NEW), rel=0.01)


@pytest.mark.slow
def test_the_interval_contains_most_new_runs_and_is_not_much_wider_than_needed():
    hits, widths = [], []
    for seed in range(25):
        generator = np.random.default_rng(seed)
        runs = observe(noise=0.003, seeds=2, generator=generator)
        law = fit(runs, FORMS["full"])
        low, high = interval(bootstrap(runs, FORMS["full"], law, 100), *NEW)
        new = TRUE.loss(*NEW) * np.exp(0.003 * generator.standard_normal())
        hits.append(low <= new <= high)
        widths.append(high / low - 1)
        assert low < float(law.loss(*NEW)) < high
    assert np.mean(hits) >= 0.85
    # A run alone, if the law were known, would need 2 * 1.96 * 0.003.
    assert 2 * 1.96 * 0.003 < np.mean(widths) < 0.05


def test_the_interval_is_wider_for_larger_runs_noise_and_levels():
    def width(noise, size, level=0.95):
        runs = observe(noise=noise, seeds=2)
        low, high = interval(bootstrap(runs, FORMS["full"], fit(runs, FORMS["full"]), 300), *size, level)
        return high / low

    assert width(0.003, (4e5, 4e5)) < width(0.003, (8e6, 6.4e7))
    assert width(0.001, NEW) < width(0.01, NEW)
    assert width(0.003, NEW, 0.5) < width(0.003, NEW)


def test_leaving_a_size_out_shows_a_form_that_does_not_fit():
    runs = observe(noise=0.002, seeds=2)
    errors = {name: np.abs(leave_one_size_out(runs, form)).mean() for name, form in FORMS.items()}
    assert errors["full"] < errors["published-exponents"]
    runs.losses[[3, 3 + len(GRID)]] *= 1.1  # all runs of one size: the others must not have been told
    assert leave_one_size_out(runs, FORMS["full"])[3] == pytest.approx(-np.log(1.1), abs=0.02)


def test_too_few_sizes_are_refused():
    runs = Observations(*(values[:4] for values in observe()))
    with pytest.raises(ValueError, match="5 free numbers needs runs of 5 sizes, but there are 4"):
        fit(runs, FORMS["full"])
