"""float16 training: the gradient scaler, its place in checkpoints, and steps whose gradient overflows."""

import json

import pytest
import torch

from checkpoints import read_state
from train import MAX_BAD_STEPS
from train import train as train_run
from training.run_directory import read_metrics

FLOAT16 = {"system.dtype": "float16"}


def trained(run, field="loss"):
    return [record[field] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "train"]


def last_state(run):
    return read_state(max((run / "checkpoints").iterdir()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float16_run_reaches_the_loss_of_a_float32_run(tiny_run, train, optimizer):
    changes = {"optim.name": optimizer, "optim.steps": 60, "eval.every": 60, "data.micro_batch": 4}
    exact, half = (train(tiny_run(dtype, **changes, **{"system.dtype": dtype})) for dtype in ("float32", "float16"))
    losses = [[r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "val"] for run in (exact, half)]
    assert losses[0][-1] < losses[0][0] - 1  # both learn
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.01)
    assert trained(exact) != trained(half)
    assert "loss_scale" not in json.dumps(read_metrics(exact / "metrics.jsonl"))
    assert set(trained(half, "loss_scale")) == {65536.0}


@pytest.fixture
def with_scale(prepare, train):
    """`with_scale(config, scale)`: a run whose scaler starts at another scale; `train` restores signal handlers."""

    def run(config, init_scale):
        prepared = prepare(config)
        prepared.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2000)
        return prepared

    return run


def test_searching_for_the_scale_skips_steps_without_stopping_the_run(tiny_run, with_scale, capsys):
    """A gradient times 2**60 overflows float16 in more steps in a row than end a diverged run."""
    with with_scale(tiny_run(**FLOAT16, **{"optim.steps": 60}), 2.0**60) as run:
        train_run(run)
    directory = run.directory.path
    scales = trained(directory, "loss_scale")
    skipped = scales.index(scales[-1])
    assert MAX_BAD_STEPS < skipped < 55
    assert scales[: skipped + 1] == [2.0 ** (60 - n) for n in range(skipped + 1)]  # halved each time
    assert len(set(trained(directory)[:skipped])) > 1
    state = last_state(directory)
    assert (state["overflow_steps"], state["skipped_steps"]) == (skipped, 0)
    assert state["scaler"]["scale"] == scales[-1]
    assert capsys.readouterr().out.count("overflowed float16") == skipped


def test_a_loss_that_is_not_finite_is_divergence_at_any_scale(tiny_run, with_scale):
    with with_scale(tiny_run(**FLOAT16), 2.0**16) as run:
        with torch.no_grad():
            run.model.transformer.wte.weight[:] = float("nan")
        with pytest.raises(FloatingPointError, match=f"{MAX_BAD_STEPS} steps in a row"):
            train_run(run)
    assert run.state.overflow_steps == 0


@pytest.mark.slow
def test_an_overflow_on_one_rank_skips_that_step_on_all(tiny_run, write_config, python):
    """Under DDP and FSDP. Afterwards every rank has the same scale, and the losses are those of a single process."""
    changes = FLOAT16 | {"optim.steps": 8, "optim.name": "muon"}
    alone = tiny_run("alone", **changes)
    configs = [tiny_run(parallel, **changes, **{"system.parallel": parallel}) for parallel in ("ddp", "fsdp")]
    script = "tests/training/overflow_on_one_rank.py"
    python(script, write_config(alone), PYTHONPATH=".")
    python(script, *map(write_config, configs), processes=2, PYTHONPATH=".")
    directory = write_config(alone).parent / "runs"
    for config in (alone, *configs):
        run = directory / config.run.name
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["split"] == "train"]
        assert [r["step"] for r in records if r["grad_norm"] is None] == [5]
        assert trained(run, "loss_scale") == [65536.0] * 5 + [32768.0] * 3
        assert (last_state(run)["overflow_steps"], last_state(run)["skipped_steps"]) == (1, 0)
        assert trained(run) == pytest.approx(trained(directory / "alone"), abs=2e-3)


def test_the_scale_and_its_growth_resume_from_a_checkpoint(tiny_run, train, monkeypatch):
    """The scale grows every 3 steps: a run that did not restore the count would grow it at other steps."""

    def scaler(device, dtype):
        return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3, enabled=dtype == torch.float16)

    monkeypatch.setattr("training.setup.gradient_scaler", scaler)
    changes = FLOAT16 | {"optim.steps": 10, "model.dropout": 0.1, "checkpoint.keep": 9}
    whole = train(tiny_run("whole", **changes))
    config = tiny_run("stopped", **changes, **{"checkpoint.every": 4})
    stopped = train(config)
    for step in (8, 10):
        (stopped / "checkpoints" / f"step-{step:06d}").rename(stopped / f"moved-{step}")
    train(config)
    assert trained(stopped, "loss_scale") == trained(whole, "loss_scale")
    assert trained(stopped) == trained(whole)
    assert trained(whole, "loss_scale") == [4.0] * 3 + [8.0] * 3 + [16.0] * 3 + [32.0]
