"""The files of a run's directory: metrics, samples, Weights & Biases."""

import json
import struct

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from training.config import Config
from training.run_directory import MetricsLog, RunDirectory, keep_samples, read_metrics


def test_no_step_appears_twice_and_an_incomplete_line_is_removed(tmp_path):
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


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, Config())
    log.write("train", 1, loss=float("nan"), grad_norm=float("inf"))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "split": "train", "step": 1, "loss": None, "grad_norm": None
    }  # fmt: skip


def test_an_invalid_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)


def test_a_run_whose_wandb_does_not_start_has_no_status(tiny_run, train, monkeypatch, tmp_path):
    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"log.wandb is online, but .* \(No API key configured.\): run `wandb login`"):
        train(tiny_run("logged", **{"log.wandb": "online"}))
    assert not (tmp_path / "runs" / "logged" / "status.json").exists()


def test_wandb_identifies_a_run_by_its_directory(tiny_run, train, monkeypatch, tmp_path):
    """A resumed run keeps its id; a run of the same name in another directory has another id."""
    ids = []

    def init(id, **options):
        ids.append(id)
        raise wandb.errors.UsageError("enough")

    monkeypatch.setattr(wandb, "init", init)
    for directory in ("one", "one", "two"):
        with pytest.raises(ValueError, match="enough"):
            train(tiny_run("logged", **{"log.wandb": "online", "run.dir": str(tmp_path / directory)}))
    assert ids[0] == ids[1] != ids[2]


def test_lines_of_metrics_wait_for_space_if_the_run_continues(tiny_run, tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", -1, tiny_run(**{"checkpoint.on_error": "continue"}))
    log.write("train", 1, loss=1.0)
    with open("/dev/full", "wb", buffering=0) as full:
        log._file, real = full, log._file
        log.write("train", 2, loss=2.0)
    log._file = real
    log.write("train", 3, loss=3.0)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_later_samples_are_removed(tmp_path):
    path = tmp_path / "samples.txt"
    path.write_text("==== step 2, sample 1\na\n\n==== step 4, sample 1\nb\n\n")
    keep_samples(path, 3)
    assert path.read_text() == "==== step 2, sample 1\na\n\n"
    keep_samples(tmp_path / "missing.txt", 3)


def test_a_directory_that_was_not_opened_is_not_written(tmp_path):
    """So processes other than the main one call the same methods."""
    directory = RunDirectory(tmp_path)
    directory.log("train", 1, loss=1.0)
    directory.append_samples(1, ["text"])
    directory.write_status("finished", 1)
    directory.draw_losses(lambda *arguments: pytest.fail("drawn"), 1, [])
    directory.finish()
    directory.release()
    assert (directory.read_metrics(), directory.read_provenance()) == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, Config())
    log._file.close()
    with (
        open("/dev/full", "ab", buffering=0) as log._file,
        pytest.raises(OSError, match=r"cannot write /dev/full \(No space left on device\): free some space"),
    ):
        log.write("train", 1, loss=1.0)


def test_wandb_offline_has_the_losses_of_metrics_jsonl(tiny_run, write_config, python):
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
    """Yield the records of a .wandb file: LevelDB's log format (doc/log_format.md there), after 7 bytes."""
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # the trailer of a block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
