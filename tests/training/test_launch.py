"""The start and the end of a training process: stop requests, their messages, and exit statuses."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from train import train_step
from training.launch import StopSignal
from training.run_directory import read_metrics

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture
def keep_handlers():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_interrupt_is_not_recorded_but_raised(keep_handlers, capfd, number):
    stop = StopSignal(announce=True)
    assert not stop.received
    os.kill(os.getpid(), number)
    assert stop.received
    again = "; press Ctrl-C again to quit now" if number == signal.SIGINT else ""
    assert capfd.readouterr().err == f"\nStopping after this step, with a checkpoint{again}\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_only_the_main_process_announces_a_stop(keep_handlers, capfd):
    stop = StopSignal(announce=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received
    assert capfd.readouterr().err == ""


def test_under_nohup_the_run_outlives_its_terminal(keep_handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal(announce=False)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.received


@pytest.mark.parametrize("failure", [None, FloatingPointError, KeyboardInterrupt])
def test_after_training_the_previous_handlers_are_back(keep_handlers, tiny_run, train, failure):
    def step(run, *requests):
        os.kill(os.getpid(), signal.SIGTERM)  # its handler replaces that of Ctrl-C
        if failure is not None:
            raise failure
        return train_step(run, *requests)

    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(FloatingPointError, KeyboardInterrupt):
        train(tiny_run(), train_step=step)
    assert [signal.getsignal(number) for number in SIGNALS] == before


# Interrupts itself while train.py imports a module.
IMPORTING = """
import builtins, os, runpy, signal, sys
real, script, module = builtins.__import__, *sys.argv[1:]
def interrupting(name, *rest, **options):
    if name == module:
        builtins.__import__ = real
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **options)
builtins.__import__ = interrupting
sys.argv = [script, "--help"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("module", ["torch", "training.setup"])
def test_control_c_during_the_imports_prints_no_traceback(python, module):
    result = python("-c", IMPORTING, "train.py", module, check=False, PYTHONPATH=".")
    assert result.returncode == -signal.SIGINT  # a shell shows 130
    assert (result.stdout, result.stderr) == ("", "\n")


def test_two_interrupts_end_the_run_at_once_and_say_how_to_go_on(tiny_run, write_config, launch, wait_for_step):
    config = tiny_run("stopped", **{"optim.steps": 100_000, "optim.schedule": "constant", "data.batch_tokens": 32768})
    process = launch(sys.executable, "train.py", "--config", write_config(config))
    run = write_config(config).parent / "runs" / "stopped"
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGINT)
    while "press Ctrl-C again to quit now" not in (line := process.stdout.readline()):
        assert line, "the run has ended"
    process.send_signal(signal.SIGINT)  # earlier, Python could take both for one
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; run the same command to resume from the newest checkpoint" in output
    assert "Traceback" not in output


def test_a_reader_that_goes_away_does_not_end_the_run(tiny_run, write_config):
    config = tiny_run("piped", **{"optim.steps": 30, "log.every": 1, "eval.every": 10})
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(write_config(config))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(), error) == (0, "")
    run = write_config(config).parent / "runs" / "piped"
    assert json.loads((run / "status.json").read_text()) == {"status": "finished", "step": 30}


def test_torchrun_repeats_the_reason_at_the_end_of_its_report(tiny_run, write_config, python):
    config = write_config(tiny_run("absent", **{"data.dir": "/nowhere/at-all"}))
    result = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", "--config", config,
                    check=False)  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.strip("= ")]
    assert "/nowhere/at-all" in "\n".join(lines[-3:]), result.stderr


def test_all_processes_leave_an_interrupted_validation_together(tiny_run, write_config, python):
    """The request reaches one of two processes, under DDP and under FSDP."""
    changes = {"optim.steps": 4, "eval.every": 2, "eval.samples": 1, "data.micro_batch": 1}
    configs = [tiny_run(parallel, **changes, **{"system.parallel": parallel}) for parallel in ("ddp", "fsdp")]
    script = "tests/training/stop_in_validation.py"
    result = python(script, *map(write_config, configs), processes=2, PYTHONPATH=".")
    assert result.stdout.count("preempted forward passes after step 2: 3") == 4, result.stdout
    for config in configs:
        run = write_config(config).parent / "runs" / config.run.name
        logged = [(record["split"], record["step"]) for record in read_metrics(run / "metrics.jsonl")]
        assert logged == [("val", 0), ("train", 1), ("train", 2)]
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
