"""The copy task of docs/long-context.md: what a sequence holds, and that the command trains each kind of attention."""

import pytest
import torch

from kernels.loss import IGNORE_INDEX
from scripts.long_context import COPIES, SYMBOLS, main, make_sequence


def test_each_answer_is_the_symbol_that_the_table_has_at_the_place():
    places, symbols, targets = (t.tolist() for t in make_sequence(64, torch.Generator().manual_seed(1)))
    table = dict(zip(places[:32], symbols[:32], strict=True))
    assert len(table) == 32 // COPIES
    assert [table[place] for place in places[32:]] == targets[32:]
    assert set(symbols[32:]) == {SYMBOLS}
    assert set(targets[:32]) == {IGNORE_INDEX}
    assert len(set(symbols[:32])) > 1


def test_the_command_reports_loss_and_accuracy_of_each_kind(capsys):
    main(["full", "window", "lsh", "--length", "32", "--steps", "1"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["full", "window", "lsh"]


def test_a_length_that_does_not_fit(capsys):
    with pytest.raises(SystemExit):
        main(["full", "--length", "30"])
    assert "--length 30 must be divisible by 8" in capsys.readouterr().err
