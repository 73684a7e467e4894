"""The same run on 1, 2 and 4 processes, with DDP and FSDP and any micro-batch: losses, validation and batches."""

import itertools
import json
import re
import shutil
import socket
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from kernels.compiled import Compiled
from model import GPT, GPTConfig
from training.distributed import Loss
from training.run_directory import read_metrics

TORCHRUN = ("-m", "torch.distributed.run")


def losses(run, split="train"):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == split]


def batches(run):
    """Return the global batches, (steps, windows, T), joined from the parts that the processes read."""
    parts = [np.load(run / f"ids-{rank}.npy") for rank in range(len(list(run.glob("ids-*.npy"))))]
    return np.concatenate(parts, axis=1)


@pytest.fixture
def same_run(tiny_run):
    """A run of 30 steps of 30 windows, which 4 processes cannot divide evenly, with three validations."""

    def configure(name, parallel, rows, **changes):
        changes = {"optim.steps": 30, "optim.lr": 1e-3, "data.batch_tokens": 30 * 32, "eval.every": 15} | changes
        return tiny_run(name, **{"system.parallel": parallel, "data.micro_batch": rows}, **changes)

    return configure


@pytest.fixture
def in_turn(python, write_config):
    """`in_turn(processes, configs)`: train all of them in one start of the processes; returns their directories."""

    def run(processes, configs):
        files = [write_config(config) for config in configs]
        python("tests/training/run_in_turn.py", *files, processes=processes, PYTHONPATH=".", timeout=900)
        return [files[0].parent / "runs" / config.run.name for config in configs]

    return run


def assert_same_run(one, run, train_error=1e-4, val_error=1e-6):
    assert losses(run) == pytest.approx(losses(one), abs=train_error), run.name
    assert losses(run, "val") == pytest.approx(losses(one, "val"), abs=val_error), run.name
    assert np.array_equal(batches(run), batches(one)), run.name
    assert len(losses(run)) == 30
    assert len(losses(run, "val")) == 3


MUON = {"optim.name": "muon", "optim.muon_lr": 0.02, "optim.cautious_decay": True}


def assert_same_muon_run(one, run):
    """Compare losses to 1e-3: Muon's iteration can turn a difference in the last bit into a larger one."""
    assert losses(one)[-1] < losses(one)[0] - 0.5
    assert_same_run(one, run, train_error=1e-3, val_error=1e-3)


def matrix(same_run, processes, micro_batches, **changes):
    return [
        same_run(f"{parallel}-{processes}-by-{rows}{changes.get('optim.name', '')}", parallel, rows, **changes)
        for parallel, rows in itertools.product(("ddp", "fsdp"), micro_batches)
    ]


def test_two_processes_with_both_strategies_give_the_run_of_one(same_run, in_turn):
    one, with_muon = in_turn(1, [same_run("one", "auto", 30), same_run("muon", "auto", 30, **MUON)])
    ddp, fsdp, muon_ddp, muon_fsdp = in_turn(2, matrix(same_run, 2, (4,)) + matrix(same_run, 2, (8,), **MUON))
    for run in (ddp, fsdp):
        assert_same_run(one, run)
    for run in (muon_ddp, muon_fsdp):
        assert_same_muon_run(with_muon, run)


@pytest.mark.slow
def test_bfloat16_gives_the_same_run_with_both_strategies(same_run, in_turn):
    """To 1e-4: a difference in the last bit of a float32 number can become one of a bfloat16 number."""
    ddp, fsdp = in_turn(2, matrix(same_run, 2, (3,), **{"system.dtype": "bfloat16"}))
    assert_same_run(ddp, fsdp, val_error=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_resumes_on_one(same_run, in_turn):
    configs = matrix(same_run, 2, (4,), **{"checkpoint.every": 12})
    one, *runs = in_turn(1, [same_run("one", "auto", 30)]) + in_turn(2, configs)
    for run in runs:
        for step in (24, 30):
            shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    in_turn(1, configs)
    for run in runs:
        assert json.loads((run / "provenance.json").read_text())[-1]["resumed_at_step"] == 12
        assert losses(run) == pytest.approx(losses(one), abs=1e-4)
        assert losses(run, "val") == pytest.approx(losses(one, "val"), abs=1e-6)


@pytest.mark.slow
def test_any_number_of_processes_strategy_and_micro_batch_give_the_same_run(same_run, in_turn):
    one, *others = in_turn(1, [same_run(f"one-by-{rows}", "auto", rows) for rows in (30, 1, 4, 8)])
    for processes in (2, 4):
        others += in_turn(processes, matrix(same_run, processes, (1, 4, 8)))
    for run in others:
        assert_same_run(one, run)
    assert len(others) == 3 + 6 + 6


@pytest.mark.slow
def test_muon_on_four_processes_gives_the_run_of_one(same_run, in_turn):
    (one,) = in_turn(1, [same_run("one", "auto", 30, **MUON)])
    for run in in_turn(4, matrix(same_run, 4, (8,), **MUON)):
        assert_same_muon_run(one, run)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_resumes_on_one_and_two_with_both_strategies(same_run, in_turn):
    """What four processes saved with FSDP after step 12 is trained to the end in three ways."""
    (one,) = in_turn(1, [same_run("one", "auto", 8)])
    saved = same_run("four", "fsdp", 3, **{"checkpoint.every": 12})
    (four,) = in_turn(4, [saved])
    assert_same_run(one, four)
    for step in (24, 30):
        shutil.rmtree(four / "checkpoints" / f"step-{step:06d}")
    for processes, parallel in ((1, "auto"), (2, "ddp"), (2, "fsdp")):
        name = f"on-{processes}-{parallel}"
        continued = shutil.copytree(four, four.parent / name)
        in_turn(processes, [same_run(name, parallel, 4, **{"run.resume": "must"})])
        assert losses(continued) == pytest.approx(losses(one), abs=1e-4), name
        assert losses(continued, "val") == pytest.approx(losses(one, "val"), abs=1e-6), name
        parts = [np.load(continued / f"ids-{rank}.npy") for rank in range(processes)]
        assert np.array_equal(np.concatenate(parts, axis=1), batches(one)[12:]), name
        assert json.loads((continued / "provenance.json").read_text())[-1]["resumed_at_step"] == 12


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit(same_run, in_turn):
    """The sum of three gradients depends on their order, which DDP changes after its first backward pass."""
    config = same_run("whole", "ddp", 4, **{"checkpoint.every": 12})
    (whole,) = in_turn(3, [config])
    part = shutil.copytree(whole, whole.parent / "part")
    for step in (24, 30):
        shutil.rmtree(part / "checkpoints" / f"step-{step:06d}")
    in_turn(3, [same_run("part", "ddp", 4, **{"checkpoint.every": 12, "run.resume": "must"})])
    assert json.loads((part / "provenance.json").read_text())[-1]["resumed_at_step"] == 12
    ends = [json.loads((run / "checkpoints" / "step-000030" / "manifest.json").read_text()) for run in (whole, part)]
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert ends[0][name] == ends[1][name], name


def workers(agent):
    """Return torchrun's workers in the order of their ranks."""
    children = [(child, child.environ()) for child in psutil.Process(agent.pid).children()]
    return {int(environment["RANK"]): child for child, environment in children if "RANK" in environment}


def long_run(tiny_run, name, steps=120):
    changes = {"optim.steps": steps, "checkpoint.every": 10, "data.batch_tokens": 2048, "optim.lr": 1e-3}
    return tiny_run(name, **changes)


@pytest.mark.slow
def test_torchrun_restarts_the_processes_after_a_kill(tiny_run, write_config, launch, wait_for_step):
    """Twice: first the second process is killed, then, after the restart, the main process."""
    config = long_run(tiny_run, "elastic")
    run = write_config(config).parent / "runs" / "elastic"
    agent = launch(sys.executable, *TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=3", "train.py",
                   "--config", write_config(config))  # fmt: skip
    for step, rank in ((25, 1), (60, 0)):
        wait_for_step(run, step, agent)
        workers(agent)[rank].kill()
    output, _ = agent.communicate(timeout=240)
    assert agent.returncode == 0, output
    assert json.loads((run / "status.json").read_text()) == {"status": "finished", "step": 120}
    starts = json.loads((run / "provenance.json").read_text())
    assert [start["processes"] for start in starts] == [2, 2, 2]
    assert starts[1]["resumed_at_step"] >= 10
    assert starts[2]["resumed_at_step"] >= 40
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(1, 121))


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_prints_its_own_message(
    tiny_run, write_config, launch, wait_for_step, verses
):
    """A shard disappears for the second of two processes; the first waits for gradients that never come."""
    dataset = shutil.copytree(verses, write_config(tiny_run("x")).parent / "vanishing")
    config = long_run(tiny_run, "fails", steps=100_000)
    config.data.dir = str(dataset)
    run = write_config(config).parent / "runs" / "fails"
    agent = launch(sys.executable, *TORCHRUN, "--standalone", "--nproc_per_node=2",
                   "tests/training/lose_a_shard.py", "1", "20", "--config", write_config(config),
                   PYTHONPATH=".")  # fmt: skip
    wait_for_step(run, 20, agent)
    began = time.monotonic()
    output, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert time.monotonic() - began < 60
    assert re.search(r"^train.py: process 1: cannot read shard .*train_000000.bin: No such file", output, re.M), output
    assert "process 0: lost process 1: its own message states the cause, unless it was killed or hangs" in output
    # torchrun repeats the cause, not the consequence
    assert "No such file" in "".join(output.splitlines()[-5:]), output
    assert json.loads((run / "status.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_process_that_hangs_is_named_by_the_others(tiny_run, write_config, launch):
    """After the time limit of a collective operation. torchrun would only see that no process has ended."""
    config = write_config(tiny_run("hangs"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one, _ = (
        launch(sys.executable, "tests/training/hang_on_one_rank.py", "1", "--config", config, PYTHONPATH=".",
               RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    )  # fmt: skip
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 1
    assert (
        "train.py: process 0: lost process 1: its own message states the cause, unless it was killed or hangs" in output
    )


def compiled_loss(monkeypatch, error):
    """Return a compiled loss that raises `error`, the plain loss of the same small model, and ids to call them with."""

    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    torch.manual_seed(0)
    loss = Loss(GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=4)).train())
    return Compiled(loss, "the loss"), loss, torch.randint(7, (2, 4))


def test_a_failed_compilation_is_reported_and_training_continues(monkeypatch, capsys):
    loss, plain, ids = compiled_loss(monkeypatch, TorchDynamoException("no such compiler: nowhere++"))
    assert torch.equal(loss(ids, ids), plain(ids, ids))
    assert torch.equal(loss(ids, ids), plain(ids, ids))
    assert capsys.readouterr().err.count("compiling the loss failed") == 1


def test_an_error_of_the_model_is_not_treated_as_a_failed_compilation(monkeypatch):
    loss, _, ids = compiled_loss(monkeypatch, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        loss(ids, ids)
