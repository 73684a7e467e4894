"""Send metrics to other programs that show them: Weights & Biases, TensorBoard and Trackio."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import yaml

from training.config import Config, Log


class Tracker(Protocol):
    """Receives the metrics of a run. If a method raises an exception, the run continues without the tracker."""

    def log(self, values: dict[str, Any], step: int) -> Any:
        """Receive the metrics of a step. Their keys have the form "split/name", such as "val/loss"."""

    def finish(self, *, failed: bool) -> Any:
        """Send or write the metrics that are still waiting. Some trackers also record whether the run has failed."""


def chosen(log: Log) -> list[str]:
    """Return the names of the trackers that a configuration asks for."""
    return [*dict.fromkeys([*log.to, *(["wandb"] if log.wandb != "disabled" else [])])]


def check_packages(log: Log) -> None:
    """Raise ValueError if the package of a tracker is missing. The message has the command that installs it."""
    for name in chosen(log):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"the configuration sends metrics to {name}, but the package is missing: `pip install {name}`, or "
                f"{how_to_remove(name)}"
            )


def how_to_remove(name: str) -> str:
    """Return how to change the configuration so that it no longer uses a tracker."""
    return "remove it from log.to" + (" and set log.wandb to disabled" if name == "wandb" else "")


def start_trackers(config: Config, directory: Path, last_step: int) -> dict[str, Tracker]:
    """Start the trackers of a run, and return them by name.

    Args:
        directory: the run's directory.
        last_step: the step from which the run resumes, -1 for a new run.

    Raises ValueError if a tracker does not start. The trackers that have started are finished first.
    """
    starters: dict[str, Callable[[Config, Path, int], Tracker]] = {
        "wandb": WeightsAndBiases,
        "tensorboard": TensorBoard,
        "trackio": Trackio,
    }
    trackers: dict[str, Tracker] = {}
    for name in chosen(config.log):
        try:
            trackers[name] = starters[name](config, directory, last_step)
        except Exception as error:  # each package has exceptions of its own
            for started in trackers.values():
                with contextlib.suppress(Exception):  # an error in `finish` must not hide the error that ends the run
                    started.finish(failed=True)
            login = "run `wandb login`, check the network, set log.wandb to offline, or " if name == "wandb" else ""
            raise ValueError(f"{name} did not start ({error}): {login}{how_to_remove(name)}") from error
    return trackers


class WeightsAndBiases:
    """Sends metrics to Weights & Biases. The file wandb_id.txt in the run's directory has the run's id at this service.

    A resumed run may send steps again. The service ignores the steps that it already has.
    """

    def __init__(self, config: Config, directory: Path, last_step: int) -> None:
        import wandb  # imported here: most runs do not use it

        self._run = wandb.init(
            project="gpt2",
            name=config.run.name,
            id=run_id(directory / "wandb_id.txt"),
            resume="allow",
            mode="offline" if config.log.wandb == "offline" else "online",
            dir=directory,
            config=config.to_dict(),
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send the metrics of a step."""
        self._run.log(values, step=step)

    def finish(self, *, failed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Writes event files to `tensorboard` in the run's directory. The command `tensorboard --logdir runs` shows them.

    TensorBoard ignores what an earlier attempt wrote for the steps after `last_step`.
    """

    def __init__(self, config: Config, directory: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: most runs do not use it

        self._writer: Any = SummaryWriter(directory / "tensorboard", purge_step=last_step + 1)
        self._writer.add_text("config", f"```\n{yaml.safe_dump(config.to_dict(), sort_keys=False)}```", last_step + 1)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Write those metrics of a step that are numbers."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def finish(self, *, failed: bool) -> None:
        """Write the metrics that are still waiting, and close the files."""
        self._writer.close()


class Trackio:
    """Writes metrics to Trackio's local database, where trackio_id.txt in the run's directory identifies the run.

    Trackio cannot delete steps, so steps that a resumed run repeats appear twice in the database.
    """

    def __init__(self, config: Config, directory: Path, last_step: int) -> None:
        import trackio  # imported here: most runs do not use it

        self._run: Any = trackio.init(
            "gpt2",
            name=f"{config.run.name}-{run_id(directory / 'trackio_id.txt')}",
            resume="allow",
            config=config.to_dict(),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        """Write the metrics of a step to the database."""
        self._run.log(values, step=step)

    def finish(self, *, failed: bool) -> None:
        """Write the metrics that are still waiting."""
        self._run.finish()


def run_id(path: Path) -> str:
    """Return the id in a file, so that a resumed run keeps its id. If there is no file, write one with a random id."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
