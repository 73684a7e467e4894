"""The files of a run's directory: metrics, samples, provenance, status, the picture, and errors in writing them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import training.setup
from report.curves import draw_loss
from training.config import Config
from training.run_directory import MetricsLog, RunDirectory, keep_samples, read_metrics


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "train"]


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
    path.write_text('{"split": "val", "step": 1}\nnonsense\n{"split": "val", "step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_metrics(path)


@pytest.mark.parametrize("line", ["5", "{}", '{"step": 1}', '{"split": "val", "step": "x"}', "[" * 100_000])
def test_a_line_that_is_json_but_not_a_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"split": "train", "step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a record .*: delete the line"):
        read_metrics(path)


def test_a_damaged_provenance_does_not_stop_a_resume(tiny_run, train, capsys):
    run = train(tiny_run("old", **{"optim.steps": 3}))
    for content in ("[{", '{"a": 1}', "[" * 100_000):
        (run / "provenance.json").write_text(content)
        train(tiny_run("old", **{"optim.steps": 3}))
        assert "kept as provenance.json.damaged" in capsys.readouterr().out
        assert (run / "provenance.json.damaged").read_text() == content
        assert len(RunDirectory(run).read_provenance()) == 1


def test_a_status_whose_process_is_gone_is_shown_as_killed(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_status() == "unknown"
    for written, alone, beside_a_process in (("running", "killed", "running"), ("finished", "finished", "finished")):
        (tmp_path / "status.json").write_text(json.dumps({"status": written, "step": 3}))
        assert directory.read_status() == alone
        directory.lock()
        assert RunDirectory(tmp_path).read_status() == beside_a_process
        directory.close()
        assert directory.read_status() == alone
    (tmp_path / "status.json").write_text("[]")
    with pytest.raises(ValueError, match=r"status.json has a list, expected a dict"):
        directory.read_status()


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


@pytest.mark.parametrize(("has_space", "lost", "written"), [(True, 0, [1, 2, 3]), (False, 2, [1])])
def test_lines_of_metrics_that_wait_are_written_or_counted_at_the_end(tiny_run, tmp_path, has_space, lost, written):
    log = MetricsLog(tmp_path / "metrics.jsonl", -1, tiny_run(**{"checkpoint.on_error": "continue"}))
    log.write("train", 1, loss=1.0)
    with open("/dev/full", "wb", buffering=0) as full:
        log._file, real = full, log._file
        log.write("train", 2, loss=2.0)
        log.write("train", 3, loss=3.0)
        if has_space:
            log._file = real
        assert log.close() == lost
    real.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == written


def test_records_that_are_lost_at_the_end_are_announced(tmp_path):
    said = []
    directory = RunDirectory(tmp_path)
    directory._say, directory._log = said.append, SimpleNamespace(close=lambda: 2)
    directory.close()
    assert said == [f"the last 2 records of {tmp_path / 'metrics.jsonl'} could not be written and are lost"]


HEADING = "==== step 999, sample 1"


@pytest.mark.parametrize(
    "text", [HEADING, f"a\n{HEADING}\nb", f"\\{HEADING}", f"a\r{HEADING}", f"\n\n{HEADING}\n\n", "\\a", ""]
)
def test_a_text_cannot_imitate_the_heading_of_a_sample(tmp_path, text):
    directory = RunDirectory(tmp_path)
    directory._log = SimpleNamespace()  # as if it were open
    directory.append_samples(2, [text, "second"])
    directory.append_samples(4, [text])
    expected = [("step 2", [text, "second"]), ("step 4", [text])]
    assert list(directory.iterate_samples()) == expected
    keep_samples(tmp_path / "samples.txt", 3)
    assert list(directory.iterate_samples()) == expected[:1]
    keep_samples(tmp_path / "missing.txt", 3)
    keep_samples(tmp_path / "samples.txt", 1)
    keep_samples(tmp_path / "samples.txt", 1)
    assert list(directory.iterate_samples()) == []


def test_samples_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "samples.txt"
    path.write_text("==== step 2, sample 1\na\\n\n\n==== step 4, sample 1\nb\n\n")
    keep_samples(path, 3)
    assert path.read_text() == "==== step 2, sample 1\na\\n\n\n"
    assert list(RunDirectory(tmp_path).iterate_samples()) == [("step 2", ["a\\n"])]


def test_a_directory_that_was_not_opened_is_not_written(tmp_path):
    """So processes other than the main one call the same methods."""
    directory = RunDirectory(tmp_path)
    directory.log("train", 1, loss=1.0)
    directory.append_samples(1, ["text"])
    directory.write_status("finished", 1)
    directory.draw_losses(lambda *arguments: pytest.fail("drawn"), 1, [])
    directory.close()
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


def test_samples_of_repeated_steps_appear_once(tiny_run, train):
    config = tiny_run("again", **{"optim.steps": 6, "eval.every": 2, "eval.samples": 2, "checkpoint.every": 4})
    run = train(config)
    samples = (run / "samples.txt").read_text()
    assert samples.count("==== step ") == 8
    shutil.rmtree(run / "checkpoints" / "step-000006")
    with open(run / "samples.txt", "ab") as file:  # as a full disk leaves it: cut in the middle of a character
        file.write("==== step 6, sample 3\nabc п".encode()[:-1])
    train(config)
    assert (run / "samples.txt").read_text() == samples


def test_samples_on_a_full_disk_stop_the_run_or_not_as_configured(tiny_run, train, monkeypatch, capsys):
    monkeypatch.setattr("training.run_directory.keep_samples", lambda *arguments: None)
    options = {"optim.steps": 4, "eval.every": 2, "eval.samples": 1}
    for name in ("stop", "continue"):
        run = tiny_run(name, **options, **{"checkpoint.on_error": name})
        (directory := Path(run.run.dir) / name).mkdir(parents=True)
        (directory / "samples.txt").mkdir()  # a directory, which cannot be opened as a file
        if name == "stop":
            with pytest.raises(OSError, match=r"samples.txt"):
                train(run)
        else:
            train(run)
            assert len(losses(directory)) == 4
            assert capsys.readouterr().out.count("samples.txt could not be written") == 3


def test_a_drawing_error_stops_no_run_and_costs_no_checkpoint(tiny_run, train, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("a fault of matplotlib")

    monkeypatch.setattr("training.run_directory.SECONDS_BETWEEN_PICTURES", 0)
    monkeypatch.setattr("train.draw_loss", refuse)
    run = train(tiny_run("plain", **{"optim.steps": 4, "eval.every": 2, "checkpoint.every": 2}))
    assert len(losses(run)) == 4
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert "loss.png could not be drawn (RuntimeError('a fault of matplotlib')); the run" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "drawn"), [(0, [2, 4, 5]), (1000, [5])])
def test_pictures_are_not_drawn_more_often_than_every_few_seconds(tiny_run, train, monkeypatch, seconds, drawn):
    steps = []
    monkeypatch.setattr("training.run_directory.SECONDS_BETWEEN_PICTURES", seconds)
    monkeypatch.setattr("train.draw_loss", lambda records, *arguments: steps.append(records[-1]["step"]))
    train(tiny_run("drawn", **{"optim.steps": 5, "eval.every": 2}))
    assert steps == drawn


def test_a_name_that_looks_like_mathematics_is_a_name(tiny_run, train, monkeypatch, capsys):
    monkeypatch.setattr("train.draw_loss", draw_loss)
    run = train(tiny_run("$LR_$SEED", **{"optim.steps": 3, "eval.every": 3}))
    assert (run / "loss.png").exists()
    assert "could not be drawn" not in capsys.readouterr().out


def test_a_slow_start_does_not_replace_the_checkpoints_of_another_process(tiny_run, train, prepare, monkeypatch):
    """Both start in an empty place. The second still reads the dataset while the first trains and ends."""
    config, others = tiny_run("raced", **{"optim.steps": 4}), []
    read = training.setup.open_inputs

    def slowly(*arguments, **options):
        monkeypatch.setattr("training.setup.open_inputs", read)
        others.append(train(config))
        return read(*arguments, **options)

    monkeypatch.setattr("training.setup.open_inputs", slowly)
    with pytest.raises(
        ValueError, match=r"another process has trained in .*raced since .*: run the same command again"
    ):
        train(config)
    (run,) = others
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert len(losses(run)) == 4
    train(config)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"


def test_a_status_that_cannot_be_written_does_not_hide_the_failure(tiny_run, prepare, monkeypatch):
    def refuse(path, value):
        raise OSError(f"cannot write {path}: No space left on device")

    with pytest.raises(FloatingPointError, match="diverged"), prepare(tiny_run()):
        monkeypatch.setattr("training.run_directory.write_json", refuse)
        raise FloatingPointError("diverged")


def test_the_reason_why_a_directory_cannot_be_written_is_named(tiny_run, train, monkeypatch):
    def refuse(path, value):  # as write_json raises it, without an errno
        raise OSError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("training.run_directory.write_json", refuse)
    with pytest.raises(OSError, match=r"cannot write to .*\(cannot write .*: No space left on device\): choose"):
        train(tiny_run())
