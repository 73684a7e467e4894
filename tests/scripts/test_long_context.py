"""The copy task of docs/long-context.md: what a sequence holds, and that the command trains each kind of attention."""

import pytest
import torch

from kernels.loss import IGNORE_INDEX
from scripts.long_context import COPIES, SYMBOLS, main, make_model, make_sequence, train


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


def test_control_c_ends_the_training_with_status_130(monkeypatch, capsys):
    def interrupted(model, steps):
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.long_context.train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["full", "--length", "32"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\n"


def test_shared_keys_stay_equal_to_the_queries():
    torch.manual_seed(0)
    models = [make_model("full", 64, buckets=64, rounds=2, shared=shared) for shared in (False, True)]
    for model in models:
        train(model, steps=3)
    layers = [model.transformer.h[0].attn.c_attn for model in models]
    equal = [[torch.equal(*p.chunk(3)[:2]) for p in (layer.weight, layer.bias)] for layer in layers]
    assert equal == [[False, False], [True, True]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "48"], "--length 48 must be divisible by 32"),
        (["--buckets", "3"], "lsh_buckets must be 1 or even, got 3"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["full", *arguments])
    assert message in capsys.readouterr().err
