"""The directory of a run, runs/<name>/, and the functions that write and read its files.

.lock             held by the process that trains
config.yaml       the configuration of the last start
provenance.json   one entry for each start: command, code, versions, hardware
status.json       running | preempted | finished | failed, and the last step
metrics.jsonl     one object per line, see `MetricsLog`
samples.txt       texts that were sampled at each validation
loss.png          training and validation loss
wandb_id.txt      identifies the run at Weights & Biases, if it is used; trackio_id.txt does so for Trackio
tensorboard/      event files of TensorBoard, if it is used
checkpoints/      see training/checkpoint.py
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from checkpoints import list_checkpoints
from files import PARTIAL_SUFFIX, discard, write_json
from training.config import Config
from training.trackers import Tracker, start_trackers

POINTS_DRAWN = 1000  # loss.png shows fewer than twice this number of training losses
SECONDS_BETWEEN_PICTURES = 10  # minimum; drawing takes up to a second, the time of many steps of a small model


class RunDirectory:
    """The files of one run.

    Reading works on any directory of a run. Writing needs `open`, which only the main process calls: on the other
    processes the writing methods do nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_path = path / "metrics.jsonl"
        self._lock: FileLock | None = None
        self._log: MetricsLog | None = None
        self._trackers: dict[str, Tracker] = {}
        self._say: Callable[[str], None] = print
        self._continue_on_error = False
        self._drawn_at = time.monotonic()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl; an empty list if there is no file."""
        return read_metrics(self.metrics_path)

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml; empty if there is no file."""
        return read_file(self.path / "config.yaml", yaml.safe_load, {})

    def read_provenance(self) -> list[dict[str, Any]]:
        """Return the entries of provenance.json, one for each start of the run; an empty list if there is no file."""
        return read_file(self.path / "provenance.json", json.loads, [])

    def read_status(self) -> str:
        """Return the status in status.json: running, preempted, finished or failed; "unknown" if there is no file.

        The result is "killed" if the file says running, but no process holds the lock of the directory.
        """
        status = read_file(self.path / "status.json", json.loads, {}).get("status", "unknown")
        return "killed" if status == "running" and not self.is_locked() else status

    def is_locked(self) -> bool:
        """Return whether some process holds the lock. If .lock exists but cannot be opened, return True."""
        try:
            with open(self.path / ".lock", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def iterate_samples(self) -> Iterator[tuple[str, list[str]]]:
        """Yield "step N" and the texts that were sampled after this step, in the order of writing."""
        path, heading, texts = self.path / "samples.txt", "", list[str]()
        for step, block in split_samples(path.read_bytes() if path.exists() else b""):
            # A block is a heading, the text, a line break and an empty line.
            text = block.decode("utf-8", errors="replace").partition("\n")[2].removesuffix("\n\n")
            text = ESCAPED.sub("", text)
            if f"step {step}" != heading and texts:
                yield heading, texts
                texts = []
            heading = f"step {step}"
            texts.append(text)
        if texts:
            yield heading, texts

    def lock(self) -> None:
        """Lock the directory for this process. The operating system releases the lock even if the process is killed.

        Raises ValueError if another process holds the lock.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"{self.path} is in use by a run that has not ended: wait, or choose another run.name"
            ) from None
        self._lock = lock

    def open(
        self,
        config: Config,
        start: dict[str, Any],
        resumed_at: int | None,
        *,
        repeats_validation: bool,
        say: Callable[[str], None],
    ) -> None:
        """Create the directory if it does not exist, write config.yaml and other files, and start the trackers.

        If the directory exists, also remove incomplete checkpoints.

        Args:
            start: the entry of this start in provenance.json.
            resumed_at: the step from which the run resumes, whose later records and samples are removed. For a new
                run, it is None, and all are removed.
            repeats_validation: whether a resumed run begins with the validation at this step. Then records and samples
                of the earlier validation at this step are removed, too.
            say: prints a message to the user.

        Raises OSError if the directory cannot be written. Raises ValueError if another process holds the lock or has
        written checkpoints since this process was started, if metrics.jsonl is damaged, or if a tracker does not start.
        """
        self._say, self._continue_on_error = say, config.checkpoint.on_error == "continue"
        last_step = -1 if resumed_at is None else resumed_at
        last_validation = last_step - 1 if repeats_validation else last_step
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self.lock()
            if last_step < 0 and list_checkpoints(self.checkpoints):
                raise ValueError(
                    f"another process has trained in {self.path} since this one was started: run the same command "
                    f"again to resume from its checkpoint"
                )
            for partial in self.checkpoints.glob(f"*{PARTIAL_SUFFIX}"):  # a killed process was writing or deleting it
                discard(partial)
            settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
            (self.path / "config.yaml").write_text(settings, encoding="utf-8")
            write_json(self.path / "provenance.json", [*self._earlier_starts(), start])
            self._log = MetricsLog(self.metrics_path, last_step, config, last_validation=last_validation)
            keep_samples(self.path / "samples.txt", last_validation)
            self.write_status("running", max(0, last_step))
        except OSError as error:
            raise OSError(f"cannot write to {self.path} ({error.strerror or error}): choose another run.dir") from error
        try:
            self._trackers = start_trackers(config, self.path, last_step)
        except ValueError:
            self.write_status("failed", max(0, last_step))
            raise

    def _earlier_starts(self) -> list[dict[str, Any]]:
        """Return the entries of provenance.json. If the file is damaged, rename it, warn the user, and return []."""
        try:
            return self.read_provenance()
        except ValueError as error:
            path = self.path / "provenance.json"
            path.replace(f"{path}.damaged")
            self._say(f"warning: {error}. It is kept as {path.name}.damaged, and a new file is begun")
            return []

    def write_status(self, status: str, step: int) -> None:
        """Write status.json: running, preempted, finished or failed, and the number of steps so far."""
        if self._log is not None:
            write_json(self.path / "status.json", {"status": status, "step": step})

    def log(self, split: str, step: int, **values: Any) -> None:
        """Append a record to metrics.jsonl, see `MetricsLog.write`, and send it to the trackers."""
        if self._log is not None:
            self._log.write(split, step, **values)
        for name, tracker in list(self._trackers.items()):
            with self._tracker_errors(name):
                tracker.log({f"{split}/{key}": value for key, value in values.items()}, step)

    def append_samples(self, step: int, texts: Sequence[str]) -> None:
        """Append the texts that were sampled after step `step` to samples.txt."""
        if self._log is not None:
            with self._tolerate_errors("samples.txt"), open(self.path / "samples.txt", "a", encoding="utf-8") as file:
                file.writelines(format_sample(step, i, text) for i, text in enumerate(texts, 1))

    def draw_losses(
        self, draw: Callable[..., None], step: int, references: Sequence[tuple[str, float]], *, last: bool = False
    ) -> None:
        """Draw the losses so far to loss.png. An error is printed and not raised.

        Unless `last` is True, a picture is drawn at most every SECONDS_BETWEEN_PICTURES seconds.

        Args:
            draw: called with the records of metrics.jsonl, the path, a title and `references`.
            step: the number of steps so far.
            references: (name, nats per token) of other models on the same validation set.
            last: True if the run ends here, so that this is the last picture.
        """
        is_recent = time.monotonic() - self._drawn_at < SECONDS_BETWEEN_PICTURES
        if self._log is None or (is_recent and not last):
            return
        every = max(1, step // POINTS_DRAWN)  # all training losses of a long run would need too much memory
        try:
            metrics = iterate_metrics(self.metrics_path)
            records = [r for r in metrics if r["split"] != "train" or r["step"] % every == 0]
            draw(records, self.path / "loss.png", self.path.name, references)
        except Exception as error:  # no run has to stop because of a picture, which can be drawn again
            self._say(f"{self.path / 'loss.png'} could not be drawn ({error!r}); the run continues")
        self._drawn_at = time.monotonic()

    def close(self, *, failed: bool = False) -> None:
        """Finish the trackers, close metrics.jsonl, and release the lock, if this process has them."""
        for name, tracker in list(self._trackers.items()):
            with self._tracker_errors(name):
                tracker.finish(failed=failed)
        self._trackers.clear()
        if self._log is not None and (lost := self._log.close()):
            self._say(f"the last {lost} records of {self.metrics_path} could not be written and are lost")
        if self._lock is not None:
            self._lock.release()

    @contextlib.contextmanager
    def _tracker_errors(self, name: str) -> Iterator[None]:
        """If the `with` block raises an exception of a tracker, print it, and do not use the tracker any more."""
        try:
            yield
        except Exception as error:  # each package has exceptions of its own
            del self._trackers[name]
            self._say(f"{name} failed ({error!r}) and receives no more metrics; metrics.jsonl has all of them")

    @contextlib.contextmanager
    def _tolerate_errors(self, name: str) -> Iterator[None]:
        """With `checkpoint.on_error: continue`, print an OSError of the `with` block instead of raising it."""
        try:
            yield
        except OSError as error:
            if not self._continue_on_error:
                raise
            self._say(f"{self.path / name} could not be written ({error}); the run continues")


class MetricsLog:
    """Writes metrics.jsonl: one object per line, written without delay.

    Opening the log removes the training records after `last_step` (-1: all), all other records after `last_validation`
    (default: `last_step`), and an incomplete last line. So no step appears twice. With `checkpoint.on_error: continue`,
    records that cannot be written wait until the disk has space.
    """

    def __init__(self, path: Path, last_step: int, config: Config, *, last_validation: int | None = None) -> None:
        last_validation = last_step if last_validation is None else last_validation
        self._continue_on_error, self._waiting = config.checkpoint.on_error == "continue", b""
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            for line in iterate_metrics(path):
                if line["step"] <= (last_step if line["split"] == "train" else last_validation):
                    file.write(json.dumps(line) + "\n")
        os.replace(partial, path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (stays open until the run ends)

    def write(self, split: str, step: int, **values: Any) -> None:
        """Append one record. Numbers that are not finite become null, because JSON has no such numbers.

        Raises OSError if the record cannot be written, unless checkpoint.on_error is continue.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._waiting += json.dumps({"split": split, "step": step, **clean}).encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            if not self._continue_on_error:
                raise OSError(
                    f"cannot write {self._file.name} ({error.strerror}): free some space, and run the same command to "
                    f"resume from the last checkpoint"
                ) from error

    def _write_waiting(self) -> None:
        """Write the records that wait. If the disk is full, raise OSError; the next call writes the rest."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> int:
        """Write the records that wait, close the file, and return the number of records that could not be written."""
        with contextlib.suppress(OSError):
            self._write_waiting()
        self._file.close()
        return self._waiting.count(b"\n")


def read_file(path: Path, parse: Callable[[str], Any], default: Any) -> Any:
    """Return `parse` of a file's text, or `default` if there is no file.

    Raises ValueError if parsing fails, or if `default` is not None and the result has another type than `default`.
    """
    if not path.exists():
        return default
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if default is not None and not isinstance(found, type(default)):
        raise ValueError(f"{path} has a {type(found).__name__}, expected a {type(default).__name__}")
    return found


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, or none if there is no file. An incomplete last line is skipped.

    Raises ValueError, naming the line, if any complete line is not a record.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "split" not in record:
                    raise ValueError('expected an object with "split" and "step"')
            except (ValueError, RecursionError) as error:
                if line.endswith(b"\n"):  # only the last line can be incomplete, and it has no line break
                    raise ValueError(f"{path}, line {number} is not a record ({error}): delete the line") from None
            else:
                yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics.jsonl."""
    return list(iterate_metrics(path))


# In samples.txt, a heading begins with "==== ". A line of a sampled text that begins with "==== ", or with backslashes
# and "==== ", gets one more backslash.
HEADING = re.compile(rb"^==== step (\d+), sample ", re.MULTILINE)
NEEDS_ESCAPE = re.compile(r"^(?=\\*==== )", re.MULTILINE)
ESCAPED = re.compile(r"^\\(?=\\*==== )", re.MULTILINE)


def format_sample(step: int, number: int, text: str) -> str:
    """Return a sampled text for samples.txt. Lines that look like headings are escaped for `split_samples`."""
    escaped = NEEDS_ESCAPE.sub(r"\\", text)
    return f"==== step {step}, sample {number}\n{escaped}\n\n"


def split_samples(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the step of each sample in a samples.txt, and the sample with its heading.

    The content is bytes, because a full disk or a kill may have cut the file inside a character.
    """
    headings = list(HEADING.finditer(content))
    starts = [heading.start() for heading in headings]
    for heading, (start, end) in zip(headings, itertools.pairwise([*starts, len(content)]), strict=True):
        yield int(heading[1]), content[start:end]


def keep_samples(path: Path, last_step: int) -> None:
    """Remove the samples of steps after `last_step` from a samples.txt: the resumed run samples them again."""
    if path.exists():
        kept = [sample for step, sample in split_samples(path.read_bytes()) if step <= last_step]
        partial = path.with_suffix(".partial")  # samples.txt stays complete if the process is killed here
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
