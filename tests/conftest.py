"""Fixtures for many tests: small datasets, which the commands of a user make once, and small runs."""

import os

# NumPy reads the number of its threads when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from data.tokenizer import load_tokenizer
from processes import start_processes
from tests import forked
from train import train as train_run
from training.config import Checkpoint, Config, Data, Eval, Model, Optim, Run, System
from training.launch import restored_handlers
from training.setup import setup

ROOT = Path(__file__).parent.parent
BROWSER_TIMEOUT = 120_000  # milliseconds, enough for a busy machine
torch.set_num_threads(1)  # as in the processes that `python` starts: the number of threads changes the order of sums
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the hub has the mark `network` and unsets this


def run_python(*arguments, check=True, timeout=300, processes=1, **environment):
    """Run `python ...` in the repository and capture its output. With `check`, fail if the exit status is not 0.

    Several processes form a group as with torchrun, but without torchrun's agent, which takes longer.
    """
    command = [str(argument) for argument in arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if environment.keys() - {"PYTHONPATH"} or (command[0].startswith("-") and command[0] != "-m"):
        assert processes == 1, "only forks can be several processes"
        python = [sys.executable, *command]
        result = subprocess.run(python, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)
    else:
        result = forked.run(command, variables, timeout, processes)
    if check and result.returncode != 0:
        pytest.fail(f"{arguments} exited with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result


@pytest.fixture(scope="session")
def python():
    """`python("train.py", "--config", ...)`: the completed process."""
    return run_python


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's tokenizer."""
    return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def save_model(tmp_path_factory):
    """`save_model(model, tokenizer)`: a new directory with both."""

    def save(model, tokenizer):
        directory = tmp_path_factory.mktemp("model")
        model.save_pretrained(directory, eos_token_id=tokenizer.eot)
        tokenizer.save(directory)
        return directory

    return save


VERSES = [
    f"{name}:\nThe {thing} of {place} is {number} leagues away,\nand no {thing} shall stay me on the way.\n"
    for number in range(40)
    for name, thing, place in [
        ("ROSALIND", "forest", "Arden"),
        ("DUKE", "court", "France"),
        ("TOUCHSTONE", "ox", "Kent"),
    ]
]


@pytest.fixture(scope="session")
def verses(tmp_path_factory):
    """A dataset of about 10 KB with characters as tokens: 120 documents, a tenth of them for validation."""
    directory = tmp_path_factory.mktemp("verses")
    source = directory / "verses.jsonl"
    source.write_text("".join(json.dumps({"text": verse}) + "\n" for verse in VERSES), encoding="utf-8")
    out = directory / "dataset"
    run_python("-m", "data.prepare", "text", source, "--out", out, "--tokenizer", "char", "--val-fraction", "0.1")
    return out


@pytest.fixture
def tiny_run(verses, tmp_path):
    """`tiny_run("name", **{"optim.steps": 5})`: the configuration of a run whose steps take milliseconds."""

    def configure(name="tiny", **changes):
        config = Config(
            run=Run(name=name, dir=str(tmp_path / "runs")),
            model=Model(preset=None, n_layer=2, n_head=2, n_embd=32, block_size=32),
            data=Data(dir=str(verses), batch_tokens=256, sequence_length=32, micro_batch=8),
            optim=Optim(lr=1e-2, warmup_steps=2, steps=20),
            eval=Eval(every=0, samples=0, hellaswag=False),
            checkpoint=Checkpoint(every=0),
            system=System(device="cpu", dtype="float32"),
        )
        for path, value in changes.items():
            section, field = path.split(".")
            setattr(getattr(config, section), field, value)
        return dataclasses.replace(config)  # checks the combination again

    return configure


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Runs in this process draw no picture: it takes most of the time of a small run. Child processes draw theirs."""
    monkeypatch.setattr("train.draw_loss", lambda *arguments: None)


@pytest.fixture
def prepare():
    """`prepare(config)`: a TrainingRun that is set up in this process, to use in a `with` statement."""

    def run(config, **options):
        return setup(config, start_processes(config.system.device, config.system.dtype), **options)

    return run


@pytest.fixture
def train(prepare):
    """`train(config)`: train in this process, with other functions than train.py's if given; the run's directory."""

    def run(config, **functions):
        with restored_handlers(), prepare(config) as prepared:
            train_run(prepared, **functions)
        return prepared.directory.path

    return run


@pytest.fixture
def write_config(tmp_path):
    """`write_config(config)`: the path of a YAML file for a process of its own."""

    def write(config):
        path = tmp_path / f"{config.run.name}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        return path

    return write


@pytest.fixture
def launch():
    """`launch(*command, **environment)`: a process with its output in a pipe. The test ends it and its children."""
    started = []

    def begin(*command, **environment):
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            parent = psutil.Process(process.pid)
            for one in (*parent.children(recursive=True), parent):  # torchrun's workers are in sessions of their own
                one.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def wait_for_step():
    """`wait_for_step(run, step, process)`: wait until the run has logged the step. The process may not end before."""

    def wait(run, step, process):
        path = run / "metrics.jsonl"
        while not path.exists() or f'"step": {step},' not in path.read_text(encoding="utf-8"):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=BROWSER_TIMEOUT)
        yield browser
        browser.close()
