"""Rates of a larger model from those of a smaller one, and the configurations of the released sizes."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from model import GPT, PRESETS, GPTConfig
from processes import start_processes
from training.config import Config, Flags, Optim, parse_config
from training.dry_run import dry_run
from training.transfer import RULE, TUNED, Recipe, Size, describe_rates, scale, transfer

ROOT = Path(__file__).parents[2]
SMALL = Size(64, 4)


def test_a_model_of_the_same_size_keeps_its_settings():
    for tuned in TUNED.values():
        assert transfer(tuned.optim, tuned.size, tuned.size) == tuned.optim


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_rates_follow_their_powers_and_the_other_settings_stay(name):
    optim = Optim(name=name, lr=0.01, muon_lr=0.04, weight_decay=0.2, steps=77, schedule="wsd")
    large = transfer(optim, SMALL, Size(1024, 4))
    rates = ["muon_lr", "lr"] if name == "muon" else ["lr"]
    for field in rates:
        assert getattr(large, field) == pytest.approx(getattr(optim, field) * 16 ** RULE[name, field].width)
        deep = getattr(transfer(optim, SMALL, Size(64, 36)), field)
        assert deep == pytest.approx(getattr(optim, field) * 9 ** RULE[name, field].layers)
    # the fraction of a weight in a block that decays in a step is constant
    assert large.weight_decay * getattr(large, rates[0]) == pytest.approx(0.2 * getattr(optim, rates[0]))
    assert dataclasses.replace(large, lr=optim.lr, muon_lr=optim.muon_lr, weight_decay=0.2) == optim


def test_two_transfers_are_one():
    optim, sizes = TUNED["muon"].optim, (SMALL, Size(256, 8), Size(1600, 48))
    twice = transfer(transfer(optim, *sizes[:2]), *sizes[1:])
    once = transfer(optim, sizes[0], sizes[2])
    assert [twice.lr, twice.muon_lr, twice.weight_decay] == pytest.approx([once.lr, once.muon_lr, once.weight_decay])


def test_there_is_no_rule_for_other_fields():
    with pytest.raises(KeyError):
        scale("adamw", "muon_lr", SMALL, SMALL)


def test_the_tuned_rates_of_muon_are_those_of_the_earlier_demo():
    """Muon's own rate is the mean of two rates with nearly equal losses; the earlier demo has one of them."""
    config = parse_config(["--config", str(ROOT / "docs/earlier-demo.yaml")])
    size = Size(config.model.n_embd, config.model.n_layer)
    rates = {field: getattr(config.optim, field) for field in ("lr", "weight_decay")}
    assert TUNED["muon"] == Recipe(size, Optim(name="muon", muon_lr=0.025, **rates))
    assert config.optim.muon_lr == 0.02


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("gpt2-*m-muon.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_released_sizes_with_muon_follow_the_rule(name):
    """Within a factor of the square root of 2, which is a step of the grid that the rule was measured on."""
    config = parse_config(["--config", str(ROOT / f"configs/{name}.yaml")])
    assert config.model.preset in PRESETS
    model = GPTConfig.preset(config.model.preset)
    tuned = TUNED["muon"]
    predicted = transfer(tuned.optim, tuned.size, Size(model.n_embd, model.n_layer))
    for field in ("muon_lr", "lr", "weight_decay"):
        ratio = getattr(config.optim, field) / getattr(predicted, field)
        assert abs(math.log2(ratio)) <= 0.5, f"{field}: {getattr(predicted, field):.2g} is predicted"


def rates_of_dry_run(config):
    """Return the lines about rates that a dry run prints."""
    text = dry_run(config, start_processes("cpu", "float32"), Flags(dry_run="8xH100"))[0]
    return re.findall(r"^rates +(.*)", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "fields"), [("muon", ["muon_lr", "lr", "weight_decay"]), ("adamw", ["lr", "weight_decay"])]
)
def test_a_dry_run_prints_what_follows_and_what_the_configuration_has(tmp_path, name, fields):
    config = Config()
    config.data.dir = str(tmp_path / "nothing")
    config.optim = Optim(name=name, lr=1.25e-3, muon_lr=0.015, weight_decay=0.35)
    (line,) = rates_of_dry_run(config)
    assert line == describe_rates(config.optim, GPTConfig())
    predicted = transfer(TUNED[name].optim, TUNED[name].size, Size(768, 12))
    assert ", ".join(f"optim.{field} {getattr(predicted, field):.2g}" for field in fields) in line
    present = {"muon_lr": "0.015", "lr": "0.00125", "weight_decay": "0.35"}
    assert line.endswith(" has " + ", ".join(present[field] for field in fields))


def test_a_dry_run_of_fine_tuning_predicts_no_rates(tiny_run, save_model, verses):
    tokenizer = load_tokenizer(str(verses))
    start = save_model(GPT(GPTConfig(tokenizer.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=32)), tokenizer)
    assert len(rates_of_dry_run(tiny_run("new"))) == 1
    assert rates_of_dry_run(tiny_run("fine", **{"model.init_from": str(start)})) == []
