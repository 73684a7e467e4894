"""Test what each idea changes in training, and that the rest stays the same."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from scripts.ideas import IDEAS
from train import Trainer
from training.metrics import read_metrics
from training.parallel import start_processes

MUON = {
    "optim.name": "muon",
    "optim.steps": 6,
    "optim.warmup_steps": 1,
    "optim.schedule": "wsd",
    "optim.decay_fraction": 0.6,
    "eval.every": 6,
}


@pytest.fixture
def trained(tiny_run, monkeypatch):
    """`trained("z-loss")`: a Trainer with this idea at the end of its run; "plain" is the Trainer without a change."""
    monkeypatch.setattr("train.StopSignal", lambda: SimpleNamespace(asked=False))  # keep pytest's signal handlers
    trainers = []

    def run(idea, **changes):
        config = tiny_run(idea, **MUON | changes)
        trainer = IDEAS.get(idea, Trainer)(config, start_processes(config.system))
        trainers.append(trainer)
        trainer.run()
        return trainer

    yield run
    for trainer in trainers:
        trainer.close()


def logged(trainer, split, field="loss"):
    return [r[field] for r in read_metrics(trainer.directory / "metrics.jsonl") if r["split"] == split]


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_changes_the_loss_but_not_the_number_of_tokens(idea, trained):
    plain, other = trained("plain"), trained(idea)
    assert logged(plain, "val")[-1] != logged(other, "val")[-1]
    assert logged(other, "val")[-1] < logged(other, "val")[0]
    assert logged(plain, "val", "tokens") == logged(other, "val", "tokens")
    assert other.loader.step == plain.loader.step


def test_averaged_validates_the_mean_over_the_steps_with_a_decreasing_learning_rate(trained, monkeypatch):
    weights = []
    step = Trainer.train_step

    def keep(self, *asked):
        result = step(self, *asked)
        weights.append([p.detach().clone() for p in self.model.parameters()])
        return result

    monkeypatch.setattr(Trainer, "train_step", keep)
    trainer = trained("averaged")
    rates = logged(trainer, "train", "lr")
    last = [i for i in range(1, 6) if rates[i] < rates[i - 1]]
    assert len(last) == 3
    for parameter, *steps in zip(trainer.model.parameters(), *(weights[i] for i in last), strict=True):
        torch.testing.assert_close(parameter.detach(), torch.stack(steps).mean(dim=0))


def test_small_batches_first_makes_two_steps_per_batch(trained):
    halves = trained("small-batches-first", **{"optim.schedule": "constant"})
    steps = [r["step"] for r in read_metrics(halves.directory / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [1, 1, 2, 2, 3, 4, 5, 6]


def test_impossible_runs_with_an_idea_are_refused(trained, tiny_run, write_config, python, tmp_path):
    with pytest.raises(ValueError, match=r"one micro-batch per step, got 2: raise data\.micro_batch"):
        trained("small-batches-first", **{"data.micro_batch": 4})
    with pytest.raises(ValueError, match=r"optim\.name muon, got adamw"):
        trained("momentum-warm-up", **{"optim.name": "adamw"})
    config = write_config(tiny_run("x", **MUON | {"checkpoint.every": 3}))
    sweep = ("-m", "scripts.sweep", "--config", config, "--dir", tmp_path / "swept", "--idea", "averaged", "--seeds", 1)
    python(*sweep)
    shutil.rmtree(tmp_path / "swept" / "x-averaged-seed_1" / "checkpoints" / "step-000006")
    result = python(*sweep, check=False)
    assert result.returncode == 2
    assert "interrupted at step 3" in result.stderr


def test_ideas_change_the_initialization_the_decay_and_the_momentum(trained):
    plain = trained("plain", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    small = trained("small-positions", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    wpe = [t.model.transformer.wpe.weight.detach() for t in (plain, small)]
    torch.testing.assert_close(wpe[1], wpe[0] / 2, atol=1e-6, rtol=1e-4)
    groups = trained("undecayed-embeddings").optimizers[-1].param_groups
    assert [group["weight_decay"] for group in groups] == [0, 0]
    muon = trained("momentum-warm-up").optimizers[0].param_groups[0]
    assert 0.85 < muon["momentum"] < 0.95
