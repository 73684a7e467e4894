"""The training loop: its curves, its steps, and runs that are stopped or killed and resume."""

import json
import math
import os
import re
import shutil
import signal
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import checkpoints
import data.tokenizer
from checkpoints import MANIFEST, STATE, choose_checkpoint, find_best, read_state
from eval.loss import SplitLoss
from files import file_sha256
from processes import Processes
from train import MAX_BAD_STEPS, train_step
from train import train as train_run
from training.run_directory import read_metrics
from training.setup import setup
from training.validation import Validation


def losses(run, split="train"):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == split]


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_micro_batch_that_does_not_divide_the_batch_gives_the_same_losses(tiny_run, train):
    one = losses(train(tiny_run("one", **{"eval.every": 20})))
    for rows in (3, 1):
        assert losses(train(tiny_run(f"by-{rows}", **{"data.micro_batch": rows}))) == pytest.approx(one, abs=1e-4)
    assert len(one) == 20
    assert one[-1] < one[0] - 0.5  # the model learns


@pytest.mark.parametrize(
    "changes",
    [{}, {"model.dropout": 0.2}, {"optim.name": "muon"}, {"model.attention": "lsh", "model.lsh_buckets": 8}],
    ids=["plain", "dropout", "muon", "lsh"],
)
def test_resuming_from_a_checkpoint_is_bit_exact(tiny_run, train, changes):
    config = tiny_run("whole", **{"checkpoint.every": 7, "checkpoint.keep": 9}, **changes)
    run = train(config)
    whole, records = weights(run, 20), losses(run)
    for step in (14, 20):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    train(config)
    assert same_bits(weights(run, 20), whole)
    assert losses(run) == records
    assert json.loads((run / "provenance.json").read_text())[1]["resumed_at_step"] == 7


def slow_run(tiny_run, name):
    """Return a run of 40 steps of about 20 ms each, slow enough for a signal to arrive at a chosen step."""
    return tiny_run(name, **{"optim.steps": 40, "checkpoint.every": 5, "data.batch_tokens": 2048})


def test_a_run_that_is_killed_at_step_23_ends_with_the_same_bits(
    tiny_run, train, write_config, launch, wait_for_step, python
):
    whole = train(slow_run(tiny_run, "whole"))
    config = slow_run(tiny_run, "killed")
    killed = whole.parent / "killed"
    process = launch(sys.executable, "train.py", "--config", write_config(config))
    wait_for_step(killed, 23, process)
    process.kill()
    process.communicate()
    assert json.loads((killed / "status.json").read_text())["status"] == "running"
    done = python("train.py", "--config", write_config(config))
    assert "resuming from" in done.stdout
    assert same_bits(weights(killed, 40), weights(whole, 40))
    assert [r["step"] for r in read_metrics(killed / "metrics.jsonl")] == list(range(1, 41))
    assert losses(killed) == losses(whole)
    assert not list(killed.rglob("*.partial"))


SIGNALS = [signal.SIGTERM, signal.SIGINT]
MORE_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGHUP)]


@pytest.mark.parametrize("number", [*SIGNALS, *MORE_SIGNALS])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tiny_run, write_config, launch, wait_for_step, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup")
    config = tiny_run("stopped", **{"optim.steps": 100_000, "optim.schedule": "constant"})
    process = launch(sys.executable, "train.py", "--config", write_config(config))
    run = write_config(config).parent / "runs" / "stopped"
    wait_for_step(run, 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Stopping after this step, with a checkpoint" in output
    assert "run the same command to resume" in output
    status = json.loads((run / "status.json").read_text())
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert status == {"status": "preempted", "step": last}
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:06d}"]


def test_the_loss_starts_at_ln_vocabulary_and_a_small_text_can_be_memorized(tiny_run, train, verses):
    changes = {"optim.name": "muon", "optim.muon_lr": 0.02, "optim.weight_decay": 0.0, "optim.steps": 150}
    changes |= {"data.batch_tokens": 1024, "model.n_embd": 64, "model.n_layer": 1}
    curve = losses(train(tiny_run("overfit", **changes)))
    vocab = json.loads((verses / "meta.json").read_text())["vocab_size"]
    assert curve[0] == pytest.approx(math.log(vocab), rel=0.05)
    assert sum(curve[-10:]) / 10 < 0.12  # the rest is names and numbers, which no context determines


def test_a_finished_run_says_so_and_changes_nothing(tiny_run, train, write_config, python):
    config = tiny_run("done", **{"optim.steps": 3})
    run = train(config)
    before = (run / "metrics.jsonl").read_bytes()
    result = python("train.py", "--config", write_config(config))
    assert "finished after step 3" in result.stdout
    assert (run / "metrics.jsonl").read_bytes() == before


def poisoned(steps):
    """Return a `train_step` whose loss is NaN in these steps (counted from 0)."""

    def step(run, *requests):
        good = run.loss_function
        if run.state.step in steps:
            run.loss_function = lambda *batch: good(*batch) * float("nan")
        result = train_step(run, *requests)
        run.loss_function = good
        return result

    return step


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_run, train):
    run = train(tiny_run("bad", **{"checkpoint.every": 20}), train_step=poisoned({4, 5}))
    state = json.loads((run / "checkpoints/step-000020/trainer/state.json").read_text())
    assert state["skipped_steps"] == 2
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["loss"] is None] == [5, 6]
    assert losses(run)[-1] < losses(run)[0]


def test_ten_bad_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tiny_run, train, monkeypatch):
    drawn = []
    monkeypatch.setattr("train.draw_loss", lambda records, *arguments: drawn.append(records[-1]["step"]))
    with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS} steps in a row.*step 17.*step-000006"):
        train(tiny_run("bad", **{"checkpoint.every": 3}), train_step=poisoned(set(range(7, 100))))
    assert drawn == [17]


def test_a_validation_between_bad_steps_does_not_fail_by_itself(tiny_run, train):
    with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS} steps in a row"):
        train(tiny_run("far", **{"optim.lr": 1e38, "optim.steps": 40, "eval.every": 5, "eval.samples": 1}))


def test_a_step_reads_from_the_device_once(tiny_run, prepare, monkeypatch):
    """Whatever turns a tensor into Python numbers waits for the device: once per step, never per micro-batch."""
    with prepare(tiny_run("reads", **{"data.micro_batch": 2})) as run:
        monkeypatch.setattr("checks.check_ids", lambda *arguments, **options: None)  # on a CPU it reads every id
        reads = []
        for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda t, _real=real, _name=name: (reads.append(_name), _real(t))[1]
            )
        train_step(run, False, False)
        assert reads == ["tolist"]


def test_a_record_has_the_time_of_each_part_and_the_peak_memory(tiny_run, train):
    run = train(tiny_run("timed", **{"checkpoint.every": 5}))
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["split"] == "train"]
    before = 0.0
    for record in records:
        parts = [record[f"{part}_seconds"] for part in ("data", "forward_backward", "optimizer")]
        assert sum(parts) == pytest.approx(record["seconds"] - before, abs=1e-6)
        assert parts[1] == max(parts) or parts[1] > 0.2 * sum(parts)
        before = record["seconds"]
    # a checkpoint counts for the step after it
    assert [r["step"] for r in records if r["checkpoint_seconds"] > 0] == [6, 11, 16]
    memory = [record["peak_memory"] for record in records]
    assert memory == sorted(memory)
    assert 50e6 < memory[-1] < psutil.virtual_memory().total


def test_profile_writes_a_trace_of_the_operators(tiny_run, write_config, python):
    config = write_config(tiny_run("traced", **{"optim.steps": 8}))
    python("train.py", "--config", config, "--profile")
    trace = json.loads((config.parent / "runs" / "traced" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "aten::_fused_adamw_", "gpt2::linear_cross_entropy_sum"} <= names
    assert "ProfilerStep#2" in names


def test_verify_finds_a_flipped_byte_of_the_dataset_before_anything_is_created(tiny_run, write_config, python, verses):
    config = tiny_run("verified", **{"optim.steps": 3})
    dataset = shutil.copytree(verses, write_config(config).parent / "dataset")
    config.data.dir = str(dataset)
    file = write_config(config)
    python("train.py", "--config", file, "--verify", "--run.name", "sound")
    with open(dataset / "val_000000.bin", "r+b") as shard:
        shard.seek(1100)
        byte = shard.read(1)[0]
        shard.seek(1100)
        shard.write(bytes([byte ^ 1]))
    result = python("train.py", "--config", file, "--verify", check=False)
    assert result.returncode == 2
    assert re.search(r"shard .*val_000000.bin is damaged: sha256 \w+, meta.json says", result.stderr)
    assert not (file.parent / "runs" / "verified").exists()


def test_every_process_verifies_so_that_none_waits_for_another(tiny_run, monkeypatch):
    def refuse(split):
        raise ValueError("verified")

    monkeypatch.setattr("data.shards.Split.verify", refuse)
    processes = Processes(rank=1, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="verified"):
        setup(tiny_run(), processes, verify=True)


def test_a_resumed_run_keeps_its_automatic_micro_batch(tiny_run, train, monkeypatch):
    """`auto` depends on free memory, and another micro-batch sums in another order, which gives other bits."""
    config = tiny_run("auto", **{"data.micro_batch": "auto", "checkpoint.every": 10})
    run = train(config)
    whole = weights(run, 20)
    shutil.rmtree(run / "checkpoints" / "step-000020")
    monkeypatch.setattr("training.plan.fit_micro_batch", lambda *arguments, **options: (1, "as patched"))
    train(config)
    assert same_bits(weights(run, 20), whole)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({}, 8),
        (None, 8),
        ({"device": "NVIDIA H200"}, 1),
        ({"dtype": "torch.bfloat16"}, 1),
        ({"processes": 2}, 1),
        ({"sharded": True}, 1),
        ({"activation_checkpointing": True}, 1),
        ({"micro_batch_asked": 8}, 1),
    ],
    ids=["same", "not-stored", "device", "dtype", "processes", "sharded", "recomputing", "given"],
)
def test_under_other_circumstances_the_micro_batch_is_chosen_again(
    tiny_run, train, prepare, monkeypatch, stored, found
):
    config = tiny_run("auto", **{"data.micro_batch": "auto", "optim.steps": 3})
    checkpoint = train(config) / "checkpoints" / "step-000003"
    state = json.loads((checkpoint / "trainer" / "state.json").read_text())
    assert (state["micro_batch"], state["device"], state["dtype"]) == (8, "cpu", "torch.float32")
    if stored is None:  # as earlier versions saved it
        del state["device"], state["dtype"]
    (checkpoint / "trainer" / "state.json").write_text(json.dumps(state | (stored or {})))
    monkeypatch.setattr("checkpoints.verify", lambda path: None)
    monkeypatch.setattr("training.plan.fit_micro_batch", lambda *arguments, **options: (1, "as patched"))
    with prepare(config) as run:
        assert run.plan.micro_batch == found


def test_resuming_hashes_each_checkpoint_and_parses_each_tokenizer_once(tiny_run, train, monkeypatch):
    config = tiny_run("once", **{"optim.steps": 3})
    checkpoint = train(config) / "checkpoints" / "step-000003"
    verified, parsed = [], []
    verify, parse = checkpoints.verify, data.tokenizer.load_tokenizer
    monkeypatch.setattr("checkpoints.verify", lambda path: (verified.append(path), verify(path))[1])
    for module in ("pretrained", "training.inputs"):
        monkeypatch.setattr(f"{module}.load_tokenizer", lambda name: (parsed.append(str(name)), parse(name))[1])
    train(config)
    assert verified == [checkpoint]
    assert parsed == [str(checkpoint), config.data.dir]
    verified.clear(), parsed.clear()
    train(tiny_run("tuned", **{"optim.steps": 3, "model.init_from": str(checkpoint.parent.parent)}))
    assert verified == [checkpoint]
    assert parsed == [str(checkpoint), config.data.dir]


def test_a_validation_before_the_first_checkpoint_appears_once(tiny_run, train):
    config = tiny_run("twice", **{"optim.steps": 4, "eval.every": 2})
    run = train(config)
    shutil.rmtree(run / "checkpoints")  # as if it had been killed before the first one
    train(config)
    assert [(r["split"], r["step"]) for r in read_metrics(run / "metrics.jsonl")] == [
        ("val", 0), ("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4)
    ]  # fmt: skip


def test_a_stop_request_skips_the_validation_and_the_resumed_run_does_it(tiny_run, train):
    options = {"optim.steps": 8, "eval.every": 2, "eval.samples": 1, "checkpoint.every": 8}

    def logged(run):
        return [(r["split"], r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")]

    def stop_after_step_4(run, *requests):
        return train_step(run, *requests)._replace(stop=run.state.step == 4)

    def interrupt(run, *requests):
        raise KeyboardInterrupt

    whole = train(tiny_run("whole", **options))
    run = train(tiny_run("stopped", **options), train_step=stop_after_step_4)
    assert logged(run) == [record for record in logged(whole) if record[1] < 4 or record[:2] == ("train", 4)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    # Killed after that validation, but before another checkpoint: the next attempt does not log it twice.
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run("stopped", **options), train_step=interrupt)
    assert logged(run)[-1][:2] == ("val", 4)
    train(tiny_run("stopped", **options))
    assert sorted(logged(run)) == sorted(logged(whole))
    assert (run / "samples.txt").read_text() == (whole / "samples.txt").read_text()


def stop_at_pass(prepared, step, number):
    """Let this process get SIGTERM before a forward pass of the validation after a step; return the passes' steps."""
    passes = []

    def stop(model, inputs):
        passes.append(prepared.state.step)
        if not model.training and passes.count(step) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    prepared.model.register_forward_pre_hook(stop)
    return passes


@pytest.mark.parametrize(
    ("step", "number"), [(0, 2), (4, 40), (7, 2), (7, 40)], ids=["at-start", "samples", "last-step", "last-samples"]
)
def test_a_stop_request_interrupts_a_validation_and_the_resumed_run_does_it_again(
    tiny_run, prepare, train, step, number
):
    """No other forward pass follows, the partial result is dropped, and the whole run is the same to the bit."""
    options = {"optim.steps": 7, "eval.every": 2, "eval.samples": 1, "eval.patience": 9, "data.micro_batch": 1}
    config, whole = tiny_run("stopped", **options), train(tiny_run("whole", **options))
    with prepare(config) as run:
        passes = stop_at_pass(run, step, number)
        assert train_run(run) == "preempted"
    assert passes.count(step) == number
    assert passes[-1] == step
    path = run.directory.path
    logged = read_metrics(path / "metrics.jsonl")
    assert [(r["split"], r["step"]) for r in logged if r["step"] >= step] == ([("train", step)] if step else [])
    assert json.loads((path / "status.json").read_text()) == {"status": "preempted", "step": step}
    assert [one.name for one in path.glob("checkpoints/*")] == ([f"step-{step:06d}"] if step else [])

    train(config)
    assert losses(path, "val") == losses(whole, "val")
    assert losses(path) == losses(whole)
    assert (path / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert same_bits(weights(path, 7), weights(whole, 7))
    states = [json.loads((run / "checkpoints/step-000007/trainer/state.json").read_text()) for run in (path, whole)]
    assert states[0]["val_loss"] == states[1]["val_loss"] == losses(whole, "val")[-1]
    assert states[0]["best"] == states[1]["best"]
    assert json.loads((path / "status.json").read_text()) == {"status": "finished", "step": 7}
    before = (path / "metrics.jsonl").read_bytes()
    train(config)  # finished: nothing is validated again
    assert (path / "metrics.jsonl").read_bytes() == before
    assert not [one for one in path.glob("checkpoints/*") if "damaged" in one.name or "partial" in one.name]


def test_a_run_says_that_patience_ended_it(tiny_run, train, capsys):
    options = {"optim.steps": 50, "eval.every": 1, "eval.patience": 2, "optim.lr": 1e-12, "checkpoint.every": 1}
    options["eval.at_start"] = False  # so that the best loss has a checkpoint
    run = train(tiny_run("patient", **options))
    best = min(losses(run, "val"))
    step = losses(run, "val").index(best) + 1
    ending = f"eval.patience ended the run: the validation loss has not been below {best:.4f} since step {step}\n"
    assert ending in capsys.readouterr().out
    (run / "status.json").unlink()  # is not needed to choose a checkpoint
    assert choose_checkpoint(run).name == f"step-{step:06d}"
    train(tiny_run("longer", **options | {"optim.steps": 3, "eval.patience": 3}))  # the last step comes first
    assert "eval.patience ended" not in capsys.readouterr().out


@pytest.fixture
def rising_losses(monkeypatch):
    """Each validation finds a higher loss than the one before it."""

    def measure(run, signal):
        return Validation(SplitLoss(3 + run.state.step, 1.0, 1), {}, None, None, [])

    monkeypatch.setattr("train.measure", measure)


def test_patience_counts_validations_although_their_interval_changes(tiny_run, train, rising_losses):
    options = {"eval.patience": 3, "run.allow_changes": True}
    train(tiny_run("x", **options | {"eval.every": 20, "optim.steps": 24}))
    run = train(tiny_run("x", **options | {"eval.every": 5, "optim.steps": 60}))
    assert losses(run, "val") == [3, 23, 27, 28]
    assert read_state(run / "checkpoints" / "step-000025")["finished"]


@pytest.mark.parametrize(("step", "is_validated"), [(1, False), (2, True), (2, False), (3, False)])
def test_patience_of_a_run_that_an_older_version_began(tiny_run, train, rising_losses, monkeypatch, step, is_validated):
    """Its checkpoints do not store the number of validations since the best one. The run ends at the same step."""
    options = {"eval.patience": 2, "eval.every": 2, "checkpoint.every": 1, "checkpoint.keep": 9}
    run = train(tiny_run("x", **options))
    assert losses(run, "val") == [3, 5, 7]
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    for later in range(step + 1, 5):
        shutil.rmtree(run / "checkpoints" / f"step-{later:06d}")
    state = read_state(checkpoint)
    del state["validations_since_best"]
    (checkpoint / STATE).write_text(json.dumps(state | ({} if is_validated else {"val_loss": None})))
    monkeypatch.setattr("checkpoints.verify", lambda path: None)
    train(tiny_run("x", **options))
    assert losses(run, "val") == [3, 5, 7]


def test_the_lowest_loss_is_searched_again_if_eval_tokens_change(tiny_run, train, capsys):
    """A loss on other tokens may be lower than all that follow: it must not select a checkpoint or end the run."""
    options = {"eval.every": 2, "eval.tokens": 40, "eval.patience": 2, "checkpoint.every": 2, "checkpoint.keep": 1}
    run = train(tiny_run("x", **options | {"optim.steps": 4}))
    checkpoint = run / "checkpoints" / "step-000004"
    before = read_state(checkpoint)
    assert before["val_tokens"] == 40
    unbeatable = before | {"val_loss": 0.1, "best": [0.1, 4]}
    (checkpoint / STATE).write_text(json.dumps(unbeatable))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest[STATE] = {"bytes": (checkpoint / STATE).stat().st_size, "sha256": file_sha256(checkpoint / STATE)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert find_best(run / "checkpoints", set()) == (0.1, checkpoint)

    capsys.readouterr()
    options |= {"eval.tokens": 300, "run.allow_changes": True}
    train(tiny_run("x", **options | {"optim.steps": 12}))
    message = "eval.tokens has changed: validations score 300 tokens, and scored 40 before. Their losses cannot be"
    assert capsys.readouterr().out.count(message) == 1
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"]
    assert [record["step"] for record in records] == [0, 2, 4, 6, 8, 10, 12]  # step 4 on both numbers of tokens
    again = {record["step"]: record["loss"] for record in records[2:]}
    assert again[4] not in (0.1, before["val_loss"])
    lowest = min((loss, step) for step, loss in again.items())
    state = read_state(run / "checkpoints" / "step-000012")
    assert (state["best"], state["val_tokens"]) == ([*lowest], 300)
    assert find_best(run / "checkpoints", set()) == (lowest[0], run / "checkpoints" / f"step-{lowest[1]:06d}")

    train(tiny_run("x", **options | {"optim.steps": 12}))  # the same tokens again: nothing begins again
    assert message.partition(":")[0] not in capsys.readouterr().out
    train(tiny_run("x", **options | {"optim.steps": 12, "eval.tokens": 200}))  # finished: only validated again
    assert read_state(run / "checkpoints" / "step-000012")["val_tokens"] == 200
    last = [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"][-1]
    assert (last["step"], last["loss"] == again[12]) == (12, False)
    capsys.readouterr()
    more = {"eval.tokens": 10**9}
    train(tiny_run("whole", **options | more | {"optim.steps": 4}))
    train(tiny_run("whole", **options | {"eval.tokens": 10**8, "optim.steps": 6}))  # both are the whole split
    assert "eval.tokens has changed" not in capsys.readouterr().out


def test_the_same_initial_model_may_be_written_in_another_way(tiny_run, train, monkeypatch, tmp_path):
    first = train(tiny_run("first", **{"optim.steps": 3}))

    def tune(init_from):
        return train(tiny_run("tuned", **{"model.init_from": init_from, "optim.steps": 4, "eval.every": 2}))

    monkeypatch.chdir(tmp_path / "runs")
    (tmp_path / "link").symlink_to(first)
    for name in ("first", "./first/", "../runs/first", str(first), str(tmp_path / "link")):
        tune(name)
    monkeypatch.chdir(tmp_path)  # the stored name "first" was relative to another directory
    with pytest.raises(ValueError, match=r"model.init_from was 'first', is 'runs'"):
        tune("runs")
    tune("runs/first")


def test_without_a_validation_at_the_start(tiny_run, train):
    run = train(tiny_run("late", **{"optim.steps": 3, "eval.every": 2, "eval.at_start": False}))
    found = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "val"]
    assert found == [2, 3]


def test_a_dataset_without_a_validation_split_needs_eval_every_0(tiny_run, train, prepare, verses, tmp_path):
    dataset = shutil.copytree(verses, tmp_path / "dataset")
    (dataset / "val_000000.bin").unlink()
    meta = json.loads((dataset / "meta.json").read_text())
    meta["shards"]["val"] = []  # as --val-fraction 0 writes it
    (dataset / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(FileNotFoundError, match=r"has no val shards .*, or train without validation, --eval.every 0"):
        train(tiny_run(**{"data.dir": str(dataset), "eval.every": 2}))
    config = tiny_run(**{"data.dir": str(dataset), "optim.steps": 3})
    with prepare(config, verify=True):
        pass
    assert losses(train(config))[-1] > 0


@pytest.mark.slow
def test_memory_does_not_grow_over_5000_steps(tiny_run, train):
    """With validations, samples and checkpoints: resident memory up to step 1,000 and up to step 5,000."""
    changes = {"optim.steps": 5000, "optim.lr": 1e-3, "eval.every": 500, "eval.samples": 1, "checkpoint.every": 250}
    resident, process = {}, psutil.Process()

    def measured_step(run, *requests):
        result = train_step(run, *requests)
        resident[run.state.step] = process.memory_info().rss
        return result

    train(tiny_run("long", **changes), train_step=measured_step)
    settled = max(resident[step] for step in range(501, 1001))
    assert max(resident[step] for step in range(4501, 5001)) - settled < 4 * 2**20


@pytest.mark.slow
def test_the_loader_takes_less_than_one_percent_of_a_step(tiny_run, train):
    """In steps of about 100 ms, without the first step, which waits for the first batch."""
    changes = {"data.batch_tokens": 8192, "model.n_embd": 128, "model.n_layer": 4, "optim.steps": 20, "optim.lr": 1e-3}
    records = read_metrics(train(tiny_run("busy", **changes)) / "metrics.jsonl")
    loading = sum(record["data_seconds"] for record in records[1:])
    assert loading < 0.01 * (records[-1]["seconds"] - records[0]["seconds"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_nothing_is_compiled_again_after_the_first_step(tiny_run, train):
    """Micro-batches of other sizes, evaluation and sampling do not compile anything again."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def counting_step(run, *requests):
        result = train_step(run, *requests)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    changes = {"system.compile": True, "data.micro_batch": 3, "optim.steps": 8, "eval.every": 2, "eval.samples": 1}
    compiled = losses(train(tiny_run("compiled", **changes), train_step=counting_step))
    assert graphs[0] == 2  # 8 windows in micro-batches of at most 3: two of 3 and one of 2
    assert set(graphs) == {2}
    changes["system.compile"] = False
    assert compiled == pytest.approx(losses(train(tiny_run("plain", **changes))), abs=1e-4)
