"""The directory of a run, runs/<name>/: the only module that reads and writes its files.

.lock             held by the process that trains
config.yaml       the configuration of the last start
provenance.json   one entry for each start: command, code, versions, hardware
status.json       running | preempted | finished | failed, and the last step
metrics.jsonl     one object per line, see `MetricsLog`
samples.txt       texts that were sampled at each validation
loss.png          training and validation loss
wandb_id.txt      identifies the run at Weights & Biases, if it is used
checkpoints/      see training/checkpoint.py
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from files import PARTIAL_SUFFIX, discard, write_json
from training.config import Config

POINTS_DRAWN = 1000  # number of training losses that loss.png shows


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
        self._say: Callable[[str], None] = print
        self._continue_on_error = False

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl; none if there is no file."""
        return read_metrics(self.metrics_path)

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml; empty if there is no file."""
        return read_file(self.path / "config.yaml", yaml.safe_load, {})

    def read_provenance(self) -> list[dict[str, Any]]:
        """Return the entries of provenance.json, one for each start of the run; none if there is no file."""
        return read_file(self.path / "provenance.json", json.loads, [])

    def read_status(self) -> str:
        """Return running, preempted, finished or failed; "unknown" if there is no file."""
        return read_file(self.path / "status.json", json.loads, {}).get("status", "unknown")

    def iterate_samples(self) -> Iterator[tuple[str, list[str]]]:
        """Yield "step N" and the texts that were sampled after it, in the order of writing."""
        path = self.path / "samples.txt"
        if not path.exists():
            return
        heading, texts = "", list[str]()
        for part in f"\n{path.read_text(encoding='utf-8', errors='replace')}".split("\n==== ")[1:]:
            title, _, text = part.partition("\n")
            step = title.partition(",")[0]
            if step != heading and texts:
                yield heading, texts
                texts = []
            heading = step
            texts.append(text.rstrip("\n"))
        if texts:
            yield heading, texts

    def lock(self) -> None:
        """Lock the directory for this process. The system releases the lock however the process ends.

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
        self, config: Config, start: dict[str, Any], last_step: int, last_validation: int, say: Callable[[str], None]
    ) -> None:
        """Create the directory, or remove what was written after the step from which the run resumes.

        Args:
            start: the entry of this start in provenance.json.
            last_step: the step from which the run resumes, -1 for a new run. Later records of training are removed.
            last_validation: later validations and samples are removed.
            say: prints a message to the user.

        Raises OSError if the directory cannot be written, ValueError if it is locked or Weights & Biases fails.
        """
        self._say, self._continue_on_error = say, config.checkpoint.on_error == "continue"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self.lock()
            for partial in self.checkpoints.glob(f"*{PARTIAL_SUFFIX}"):  # a killed process was writing or deleting it
                discard(partial)
            settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
            (self.path / "config.yaml").write_text(settings, encoding="utf-8")
            write_json(self.path / "provenance.json", [*self.read_provenance(), start])
            self._log = MetricsLog(self.metrics_path, last_step, config, last_validation=last_validation)
            keep_samples(self.path / "samples.txt", last_validation)
            self.write_status("running", max(0, last_step))
        except OSError as error:
            raise OSError(f"cannot write to {self.path} ({error.strerror or error}): choose another run.dir") from error

    def write_status(self, status: str, step: int) -> None:
        """Write status.json."""
        if self._log is not None:
            write_json(self.path / "status.json", {"status": status, "step": step})

    def log(self, split: str, step: int, **values: Any) -> None:
        """Append a record to metrics.jsonl, see `MetricsLog.write`."""
        if self._log is not None:
            self._log.write(split, step, **values)

    def append_samples(self, step: int, texts: Sequence[str]) -> None:
        """Append sampled texts to samples.txt."""
        if self._log is not None:
            with self._tolerate_errors("samples.txt"), open(self.path / "samples.txt", "a", encoding="utf-8") as file:
                file.writelines(f"==== step {step}, sample {i}\n{text}\n\n" for i, text in enumerate(texts, 1))

    def draw_losses(self, draw: Callable[..., None], step: int, references: Sequence[tuple[str, float]]) -> None:
        """Draw the losses so far to loss.png.

        Args:
            draw: called with the records of metrics.jsonl, the path, a title and `references`.
            step: the number of steps so far.
            references: (name, nats per token) of other models on the same validation set.
        """
        if self._log is None:
            return
        every = max(1, step // POINTS_DRAWN)  # memory must not grow with the length of the run
        records = [r for r in iterate_metrics(self.metrics_path) if r["split"] != "train" or r["step"] % every == 0]
        with self._tolerate_errors("loss.png"):
            draw(records, self.path / "loss.png", self.path.name, references)
        gc.collect()  # figures contain reference cycles: without this, dozens of megabytes of them accumulate

    def finish(self) -> None:
        """Close metrics.jsonl and finish with Weights & Biases. The picture and the status can still be written."""
        if self._log is not None:
            self._log.close()

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._lock is not None:
            self._lock.release()

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
    """Writes metrics.jsonl: one object per line, written without delay, and sent to Weights & Biases if enabled.

    Opening the log removes the records after step `last_step`, from which the run resumes, the validations after
    `last_validation` (by default the same step), and an incomplete last line. So no step appears twice. With
    `checkpoint.on_error: continue`, records that cannot be written wait until the disk has space.

    Raises ValueError if Weights & Biases does not start.
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
        self._wandb = None if config.log.wandb == "disabled" else start_wandb(config, path.parent)

    def write(self, split: str, step: int, **values: Any) -> None:
        """Append one record. Numbers that are not finite become null, because JSON has no such numbers."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._waiting += json.dumps({"split": split, "step": step, **clean}).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._continue_on_error:
                raise OSError(
                    f"cannot write {self._file.name} ({error.strerror}): free some space, and run the same command to "
                    f"resume from the last checkpoint"
                ) from error
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Close the file, and finish with Weights & Biases."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(config: Config, directory: Path) -> Any:
    """Return the run at Weights & Biases that belongs to a run's directory. Raises ValueError if it does not start."""
    import wandb  # imported here: most runs do not use it

    # The id belongs to the directory: a resumed run continues its curves, a new run of the same name has its own.
    id_file = directory / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    try:
        return wandb.init(
            project="gpt2",
            name=config.run.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=config.log.wandb,
            dir=directory,
            config=config.to_dict(),
        )
    except wandb.Error as error:
        raise ValueError(
            f"log.wandb is {config.log.wandb}, but Weights & Biases did not start ({error}): run `wandb login`, check "
            f"the network, or set log.wandb to offline or disabled"
        ) from error


def read_file(path: Path, parse: Callable[[str], Any], default: Any) -> Any:
    """Return `parse` of a file's text, or `default` if there is no file. Raises ValueError if parsing fails."""
    if not path.exists():
        return default
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl; none if there is no file. An incomplete last line is skipped.

    Raises ValueError, naming the line, if another line is not JSON.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if line.endswith("\n"):  # only the last line can be incomplete, and it has no line break
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics.jsonl."""
    return list(iterate_metrics(path))


def keep_samples(path: Path, last_step: int) -> None:
    """Remove the samples of steps after `last_step` from a samples.txt: the resumed run samples them again."""
    if path.exists():
        # Read as bytes, because a full disk or a kill may have cut the file inside a character.
        blocks = re.split(rb"^(?===== step (\d+), sample )", path.read_bytes(), flags=re.MULTILINE)[1:]
        kept = [block for step, block in zip(blocks[::2], blocks[1::2], strict=True) if int(step) <= last_step]
        partial = path.with_suffix(".partial")  # the file stays complete if the process is killed while it writes
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
