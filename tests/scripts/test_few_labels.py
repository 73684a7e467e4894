"""The comparison of methods on few labeled texts: its split, and its command on a small random model."""

import pytest
import torch

from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from scripts.few_labels import main, read_sst2, split_rows


def test_the_three_parts_are_disjoint_and_a_larger_size_adds_texts():
    rows = read_sst2()
    test, labeled, unlabeled = split_rows(rows, 1, 100)
    assert [len(part) for part in (test, labeled, unlabeled)] == [400, 100, 372]
    assert sorted(test + labeled + unlabeled) == sorted(rows)
    assert split_rows(rows, 1, 32) == (test, labeled[:32], unlabeled)
    assert split_rows(rows, 2, 32)[1] != labeled[:32]


@pytest.mark.slow
def test_the_command_prints_a_mean_for_each_method(tmp_path, capsys):
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=96, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    load_tokenizer("gpt2").save(tmp_path)
    main(["--model", str(tmp_path), "--sizes", "4", "--seeds", "1", "--epochs", "1", "--final-epochs", "1"])
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == [
        f"{method}, 4 labeled texts" for method in ("zero-shot", "classifier", "PET")
    ]
