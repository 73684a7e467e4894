"""What each idea changes in a run, and that the rest stays."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from scripts.ideas import IDEAS
from train import Trainer
from training.parallel import start_processes
from training.run_directory import read_metrics

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
    """`trained("z-loss")`: a Trainer at the end of its run, with the plain one for "plain"."""
    monkeypatch.setattr("train.StopSignal", lambda: SimpleNamespace(asked=False))  # signals stay pytest's
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
def test_an_idea_changes_what_is_learnt_and_not_how_much_is_read(idea, trained):
    plain, other = trained("plain"), trained(idea)
    assert logged(plain, "val")[-1] != logged(other, "val")[-1]
    assert logged(other, "val")[-1] < logged(other, "val")[0]
    assert logged(plain, "val", "tokens") == logged(other, "val", "tokens")
    assert other.loader.step == plain.loader.step


def test_the_average_is_of_the_steps_whose_rate_went_down(trained, monkeypatch):
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


def test_small_batches_are_steps_of_their_own(trained):
    halves = trained("small-batches-first", **{"optim.schedule": "constant"})
    steps = [r["step"] for r in read_metrics(halves.directory / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [1, 1, 2, 2, 3, 4, 5, 6]


def test_what_an_idea_cannot_do_is_said(trained, tiny_run, write_config, python, tmp_path):
    with pytest.raises(ValueError, match=r"raise data\.micro_batch"):
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


def test_start_and_decay(trained):
    plain = trained("plain", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    small = trained("small-positions", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    wpe = [t.model.transformer.wpe.weight.detach() for t in (plain, small)]
    torch.testing.assert_close(wpe[1], wpe[0] / 2, atol=1e-6, rtol=1e-4)
    groups = trained("undecayed-embeddings").optimizers[-1].param_groups
    assert [group["weight_decay"] for group in groups] == [0, 0]
    muon = trained("momentum-warm-up").optimizers[0].param_groups[0]
    assert 0.85 < muon["momentum"] < 0.95
