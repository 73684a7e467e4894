"""What a run reports."""

import json
import struct

import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

from model import GPT, GPTConfig
from training.config import Config
from training.estimate import flops_per_token, peak_flops
from training.metrics import duration
from training.run_directory import MetricsLog, read_metrics


def test_no_step_stands_twice_and_a_torn_line_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, Config())
    for step in (1, 2, 3):
        log.write("train", step, loss=float(step))
    log.close()
    with open(path, "a") as file:
        file.write('{"split": "train", "st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, 2, Config())
    log.write("train", 3, loss=30.0)
    log.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, Config())
    log.write("train", 1, loss=float("nan"), grad_norm=float("inf"))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "split": "train", "step": 1, "loss": None, "grad_norm": None
    }  # fmt: skip


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)


def test_flops_of_a_token():
    shape = GPTConfig()
    with torch.device("meta"):
        n = GPT(shape).num_parameters()
    assert flops_per_token(shape, n, 512) == 6 * 124_439_808 + 12 * 12 * 768 * 512


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla P4", None),
    ],
)
def test_peaks_by_device_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59, "59 s"), (250, "4 min 10 s"), (7500, "2 h 05 min"), (273_600, "3 d 04 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_where_wandb_does_not_start_no_run_is_said_to_be_going(tiny_run, train, monkeypatch, tmp_path):
    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"log.wandb is online, but .* \(No API key configured.\): run `wandb login`"):
        train(tiny_run("logged", **{"log.wandb": "online"}))
    assert not (tmp_path / "runs" / "logged" / "status.json").exists()


def test_wandb_knows_a_run_by_its_directory(tiny_run, train, monkeypatch, tmp_path):
    """Going on, it is the same run; begun anew or in another place under the same name, another."""
    ids = []

    def init(id, **options):
        ids.append(id)
        raise wandb.errors.UsageError("enough")

    monkeypatch.setattr(wandb, "init", init)
    for directory in ("one", "one", "two"):
        with pytest.raises(ValueError, match="enough"):
            train(tiny_run("logged", **{"log.wandb": "online", "run.dir": str(tmp_path / directory)}))
    assert ids[0] == ids[1] != ids[2]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, Config())
    log._file.close()
    with (
        open("/dev/full", "ab", buffering=0) as log._file,
        pytest.raises(OSError, match=r"cannot write /dev/full \(No space left on device\): make room"),
    ):
        log.write("train", 1, loss=1.0)


def test_wandb_offline_has_what_metrics_jsonl_has(tiny_run, write_config, python):
    config = tiny_run("logged", **{"log.wandb": "offline", "optim.steps": 4, "eval.every": 2})
    python("train.py", "--config", write_config(config), WANDB_SILENT="true")
    run = write_config(config).parent / "runs" / "logged"
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    logged = {}
    for record in read_wandb(file):
        if record.WhichOneof("record_type") == "history":
            row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            logged.setdefault(row["_step"], {}).update(row)
    records = read_metrics(run / "metrics.jsonl")
    assert len(records) == 7
    for record in records:
        assert logged[record["step"]][f"{record['split']}/loss"] == record["loss"]


def read_wandb(path):
    """The records of a .wandb file: LevelDB's log format (github.com/google/leveldb, doc/log_format.md), 7 bytes in."""
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # a block's trailer
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
