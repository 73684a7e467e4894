"""What --dry-run prints: memory with a verdict, and the duration of a step and of the run."""

import json
import re

import pytest
import torch

from device import find_card
from model import GPTConfig
from processes import start_processes
from training.config import Config, Flags
from training.dry_run import dry_run
from training.estimate import Hardware, Workload, count_parameters, flops_per_token
from training.metrics import duration
from training.step_time import PUBLISHED, estimate_step, warn_of_slow_cpu


def workload(config=None, model=None, count=1, dtype=torch.float32):
    config, model = config or Config(), model or GPTConfig()
    return Workload.of(config, model, count_parameters(model), Hardware(count, dtype))


@pytest.fixture
def report(tiny_run):
    """`report("8xH100", **changes)`: what a dry run of a tiny run, or of the default one, prints."""

    def run(hardware, config=None, **changes):
        config = config or tiny_run("dry", **{"data.micro_batch": "auto", "system.dtype": "auto"} | changes)
        return dry_run(config, start_processes("cpu", "float32"), Flags(dry_run=hardware))[0]

    return run


@pytest.mark.parametrize(
    ("hardware", "dtype", "expected"),
    [
        ("1xA100", "auto", ["1 x A100, bfloat16", "compared with one H200"]),
        ("2xT4", "auto", ["2 x T4, float16", "compared with one H200"]),  # no bfloat16 before Ampere
        ("1xA100", "float16", ["1 x A100, float16", "compared with one H200"]),
        ("1xV100", "float32", ["1 x V100, float32", "the peak of V100 in float32 is not known"]),
        ("1xV100", "bfloat16", ["1 x V100, bfloat16", "the peak of V100 in bfloat16 is not known"]),
    ],
)
def test_it_knows_the_precision_of_each_card(report, hardware, dtype, expected):
    text = report(hardware, **{"system.dtype": dtype})
    assert all(words in text for words in expected), text


def test_it_says_what_fits_and_which_micro_batch_a_run_would_use(report, tmp_path):
    large = Config()
    large.data.dir = str(tmp_path / "nothing")
    text = report("1xRTX 4090", large)
    rows = {int(row): verdict for row, verdict in re.findall(r"^ *one process +(\d+) .*?  ([a-z].*)$", text, re.M)}
    assert rows[1] == "fits"
    assert rows[64] == "does not fit"
    (chosen,) = (row for row, verdict in rows.items() if verdict == "fits: auto uses this")
    assert 16 <= chosen < 64
    assert 512 % chosen == 0
    large.data.micro_batch = 64
    assert re.findall(r"one process +(\d+) .*does not fit$", report("1xRTX 4090", large), re.M) == ["64"]


def test_without_a_dataset_it_still_says_what_a_run_costs(report, tmp_path):
    large = Config()
    large.data.dir = str(tmp_path / "nothing")
    text = report("8xH100", large)
    assert "124,439,808 parameters" in text
    assert f"no dataset at {tmp_path / 'nothing'}" in text
    assert "GPT-2's vocabulary is assumed" in text
    assert re.search(r"^ +ddp .*%   \d+ (min|h) \d+", text, re.M)
    assert "llm.c trains 124M at 468,000 tokens/s on each H100" in text


def test_a_missing_dataset_is_an_error_only_on_the_hardware_that_would_train(tmp_path):
    config = Config()
    config.data.dir = str(tmp_path / "nothing")
    for hardware, expected in (("8xH100", ""), ("", f"no dataset at {tmp_path / 'nothing'}")):
        missing = dry_run(config, start_processes("cpu", "float32"), Flags(dry_run=hardware))[1]
        assert missing.startswith(expected)
        assert bool(missing) == bool(expected)


def test_on_this_cpu_it_measures_the_rate_of_products(report):
    assert re.search(r"time +\d.*, .* s a step, assuming 75% of the rate", report(""))


def test_it_prints_the_estimates_and_creates_nothing(python, tiny_run, write_config, tmp_path):
    config = tiny_run("dry", **{"data.micro_batch": "auto", "system.dtype": "auto"})
    output = python("train.py", "--config", write_config(config), "--dry-run", "8xH100", "--mfu", "0.5").stdout
    assert "28,096 parameters" in output
    shape = config.model_config(json.loads((tmp_path / config.data.dir / "meta.json").read_text())["vocab_size"])
    flops = flops_per_token(shape, 28_096, 32)
    assert f"{flops / 1e6:,.1f} MFLOPs per token" in output
    assert "5,120 tokens, 20 steps of 256" in output
    assert re.search(r"ddp +1 .*fits", output)
    assert re.search(r"fsdp +1 .*fits", output)
    assert f"{duration(flops * 5120 / (0.5 * 989e12 * 8))}, " in output
    assert "assuming 50% of 989 TFLOP/s" in output
    assert not (tmp_path / "runs").exists()


def test_it_refuses_a_device_that_it_does_not_know(report):
    with pytest.raises(ValueError, match="--dry-run 8xAbacus: expected a number and a device such as 8xH100"):
        report("8xAbacus")


@pytest.mark.parametrize(("name", "project", "published"), PUBLISHED)
def test_the_estimates_are_near_published_rates(name, project, published):
    card = find_card(name)
    step = estimate_step(Config(), workload(dtype=torch.bfloat16), card, 16, sharded=False)
    assert Config().data.batch_tokens / (step.total - step.evaluation) == pytest.approx(published, rel=0.07)


def test_the_parts_of_a_step_grow_with_what_causes_them():
    card, config = find_card("H100"), Config()

    def step(count, rows=8, sharded=False, model="gpt2"):
        work = workload(config, GPTConfig.preset(model), count, torch.bfloat16)
        return estimate_step(config, work, card, rows, sharded=sharded)

    one, eight, many = step(1), step(8), step(64)
    assert one.communication == 0 < eight.communication < many.communication
    assert one.compute == pytest.approx(8 * eight.compute)
    assert step(256, sharded=True).communication > step(256).communication  # more operations
    assert step(8, model="gpt2-xl").communication > eight.communication
    config.optim.name = "muon"
    assert step(1).optimizer > one.optimizer
    config.eval.hellaswag_every = 250
    assert step(8).evaluation > eight.evaluation
    config.eval.every = 0
    assert step(8).evaluation == 0


def test_a_configuration_for_a_gpu_is_announced_on_a_cpu(monkeypatch):
    monkeypatch.setattr("training.step_time.measure_matmul_rate", lambda dtype: 4e11)
    cpu, steps = torch.device("cpu"), Config().optim.steps
    (warning,) = warn_of_slow_cpu(workload(), cpu, steps)
    assert "a step is estimated to take 25 min 02 s, and the run 331 d" in warning
    small = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64)
    assert warn_of_slow_cpu(workload(model=small), cpu, steps) == []
    assert warn_of_slow_cpu(workload(), torch.device("cuda"), steps) == []
