"""Validation during training: when HellaSwag is scored."""

import pytest

from training.config import Config
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
