"""The copy task of docs/long-context.md: what a sequence holds, and that the command trains each kind of attention."""

import pytest
import torch

from kernels.loss import IGNORE_INDEX
from scripts.long_context import COPIES, SYMBOLS, main, make_sequence


def test_each_answer_is_the_symbol_that_the_table_has_at_the_place():
    places, symbols, targets = (t.tolist() for t in make_sequence(256, torch.Generator().manual_seed(1)))
    table = dict(zip(places[:128], symbols[:128], strict=True))
    assert len(table) == 128 // COPIES
    assert [table[place] for place in places[128:]] == targets[128:]
    assert set(symbols[128:]) == {SYMBOLS}
    assert set(targets[:128]) == {IGNORE_INDEX}
    assert len(set(symbols[:128])) > 1


def test_the_command_reports_loss_and_accuracy_of_each_kind(capsys):
    main(["full", "window", "lsh", "--length", "32", "--steps", "1"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["full", "window", "lsh"]


def test_a_length_that_does_not_fit(capsys):
    with pytest.raises(SystemExit):
        main(["full", "--length", "48"])
    assert "--length 48 must be divisible by 32" in capsys.readouterr().err
