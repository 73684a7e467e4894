"""Weights & Biases, TensorBoard and Trackio: what they receive is what metrics.jsonl has."""

import json
import math
import sqlite3
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from training.config import Log
from training.run_directory import read_metrics
from training.trackers import chosen


def test_which_trackers_are_chosen():
    assert chosen(Log()) == []
    assert chosen(Log(wandb="offline")) == ["wandb"]
    assert chosen(Log(to=["trackio", "wandb"], wandb="online")) == ["trackio", "wandb"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_package_is_named_before_anything_is_created(tiny_run, train, monkeypatch, name):
    monkeypatch.setattr("training.trackers.importlib.util.find_spec", lambda name: None)
    config = tiny_run("absent", **{"log.to": [name]})
    with pytest.raises(ValueError, match=rf"metrics to {name}, but the package is missing: `pip install {name}`"):
        train(config)
    assert not Path(config.run.dir).exists()


def test_a_run_whose_tracker_does_not_start_has_failed(tiny_run, train, monkeypatch, tmp_path):
    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"wandb did not start \(No API key configured.\): run `wandb login`"):
        train(tiny_run("logged", **{"log.wandb": "online"}))
    status = json.loads((tmp_path / "runs" / "logged" / "status.json").read_text())
    assert status == {"status": "failed", "step": 0}


def test_trackers_that_have_started_are_finished_if_another_one_does_not_start(tiny_run, train, monkeypatch):
    finished = []

    def finish(exit_code):
        finished.append(exit_code)
        raise RuntimeError("cannot finish")

    def refuse(*arguments):
        raise OSError("no space")

    monkeypatch.setattr("training.trackers.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(wandb, "init", lambda **options: SimpleNamespace(finish=finish))
    monkeypatch.setattr("training.trackers.TensorBoard", refuse)
    with pytest.raises(ValueError, match=r"tensorboard did not start \(no space\): remove it from log.to"):
        train(tiny_run("logged", **{"log.to": ["wandb", "tensorboard"]}))
    assert finished == [1]


def test_wandb_identifies_a_run_by_its_directory(tiny_run, train, monkeypatch, tmp_path):
    """A resumed run keeps its id; a run of the same name in another directory has another id."""
    ids = []

    def init(id, **options):
        ids.append(id)
        raise wandb.errors.UsageError("enough")

    monkeypatch.setattr(wandb, "init", init)
    for directory in ("one", "one", "two"):
        with pytest.raises(ValueError, match="enough"):
            train(tiny_run("logged", **{"log.to": ["wandb"], "run.dir": str(tmp_path / directory)}))
    assert ids[0] == ids[1] != ids[2]


def test_a_tracker_that_fails_stops_no_run(tiny_run, train, monkeypatch, capsys):
    """Neither in the middle nor at the end. It is asked no more after the first failure."""
    asked, codes = [], []

    def log(values, step):
        asked.append(step)
        if step == 2:
            raise ConnectionError("the network is gone")

    def finish(exit_code):
        codes.append(exit_code)
        raise RuntimeError("cannot finish")

    for number, tracker in enumerate(
        (SimpleNamespace(log=log), SimpleNamespace(log=lambda *a, **o: None, finish=finish))
    ):
        monkeypatch.setattr(wandb, "init", lambda tracker=tracker, **options: tracker)
        run = train(tiny_run(f"offline-{number}", **{"log.to": ["wandb"], "optim.steps": 5}))
        assert len(read_metrics(run / "metrics.jsonl")) == 5
        assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert (asked, codes) == ([1, 2], [0])

    def fail(run, *requests):
        raise FloatingPointError("diverged")

    with pytest.raises(FloatingPointError):
        train(tiny_run("failed", **{"log.to": ["wandb"]}), train_step=fail)
    assert codes == [0, 1]
    output = capsys.readouterr().out
    assert "wandb failed (ConnectionError('the network is gone')) and receives no more metrics" in output
    assert "wandb failed (RuntimeError('cannot finish'))" in output


def stopped_and_resumed(tiny_run, write_config, python, name, **environment):
    """Train 6 steps, lose the steps after 4, and train them again; return the run and its records."""
    options = {"log.to": [name], "optim.steps": 6, "eval.every": 2, "checkpoint.every": 4}
    file = write_config(tiny_run(name, **options))
    python("train.py", "--config", file, **environment)
    run = file.parent / "runs" / name
    (run / "checkpoints" / "step-000006").rename(run / "lost")
    python("train.py", "--config", file, **environment)
    return run, read_metrics(run / "metrics.jsonl")


def test_tensorboard_has_each_step_once(tiny_run, write_config, python):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, records = stopped_and_resumed(tiny_run, write_config, python, "tensorboard")
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    for split in ("train", "val"):
        expected = [(record["step"], record["loss"]) for record in records if record["split"] == split]
        found = [(event.step, event.value) for event in reader.Scalars(f"{split}/loss")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert "batch_tokens: 256" in reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_trackio_has_the_losses_of_metrics_jsonl(tiny_run, write_config, python, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    run, records = stopped_and_resumed(tiny_run, write_config, python, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    name = f"trackio-{(run / 'trackio_id.txt').read_text().strip()}"
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {row[0] for row in rows} == {name}
    logged = {}
    for _, step, metrics in rows:
        logged.setdefault(step, {}).update(json.loads(metrics))
    assert len(records) == 10
    for record in records:
        assert logged[record["step"]][f"{record['split']}/loss"] == record["loss"]


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
