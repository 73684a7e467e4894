"""Prepare the parts of a dataset as tasks of datatrove's executors: on this machine, on a Slurm cluster or on Ray.

A task runs `python -m data.prepare ... --part I/N` in a process of its own, up to ATTEMPTS times. Each attempt
continues the part where the previous attempt stopped.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from data.prepare.job import available_cores

EXECUTORS = ("local", "slurm", "ray")
ATTEMPTS = 3
LOGS = "logs"  # the directory of the log files, in the directory of the dataset
ROOT = Path(__file__).resolve().parents[2]  # the directory in which `python -m data.prepare` can be run


class SlurmOptions(NamedTuple):
    """Options of a Slurm job: the partition, and the time limit of a task as HH:MM:SS."""

    partition: str | None
    time: str


def _python_path() -> str:
    """Return a PYTHONPATH with which a task can import this module in any working directory."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


class RunCommand:
    """A step of a datatrove pipeline, which runs a command until it succeeds, at most ATTEMPTS times.

    The command runs in the working directory of the process that made this object. In task I of N, `{part}` in the
    command is replaced by I/N. The output of task 1 is appended to part-001.txt in the directory `logs`.
    """

    def __init__(self, command: list[str], logs: Path) -> None:
        self.command, self.logs, self.directory = command, logs, Path.cwd()

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Run the command. Raises RuntimeError with the last line of its output if every attempt fails."""
        command = [word.replace("{part}", f"{rank + 1}/{world_size}") for word in self.command]
        environment = os.environ | {"PYTHONPATH": _python_path()}
        log = self.logs / f"part-{rank + 1:03d}.txt"
        for _ in range(ATTEMPTS):
            with open(log, "ab") as file:
                done = subprocess.run(command, cwd=self.directory, env=environment, stdout=file, stderr=file)
            if done.returncode == 0:
                return
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
        raise RuntimeError(f"task {rank + 1} of {world_size} failed {ATTEMPTS} times: {lines[-1]} (see {log})")


def run_tasks(executor: str, arguments: list[str], out: Path, tasks: int, workers: int, slurm: SlurmOptions) -> None:
    """Prepare all parts of a dataset. On Slurm, submit jobs for the parts and for merging them, and return at once.

    The other executors return when all parts are complete, and the caller has to merge the parts.

    Args:
        executor: one of EXECUTORS.
        arguments: the arguments of `data.prepare`, to which this function adds --part.
        out: directory of the dataset.
        tasks: number of parts.
        workers: number of cores that are planned for each task.
        slurm: options for the executor "slurm".

    Raises:
        ValueError: when a package or an option is missing.
        OSError: when a task failed in every attempt; a repeated call continues the incomplete parts.
    """
    for package in ("datatrove", "ray") if executor == "ray" else ("datatrove",):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--executor {executor} needs the package {package}: pip install {package}")
    if executor == "slurm" and not slurm.partition:
        raise ValueError("--executor slurm needs the name of a partition: --slurm-partition NAME")
    logs = (out / LOGS).absolute()
    logs.mkdir(parents=True, exist_ok=True)
    step = RunCommand([sys.executable, "-m", "data.prepare", *arguments, "--part", "{part}"], logs)
    try:
        if executor == "local":
            _run_here(step, tasks, workers)
        elif executor == "ray":
            _run_on_ray(step, tasks, workers)
        else:
            merge = RunCommand([sys.executable, "-m", "data.prepare", "merge", str(out)], logs / "merge")
            _submit_to_slurm(step, merge, tasks, workers, slurm)
    except RuntimeError as error:
        raise OSError(f"{error}; run the same command again to continue") from error


def datatrove_executors() -> Any:
    """Return datatrove's module of executors."""
    # Imported here: datatrove is not installed with this project, and only executors need it.
    return importlib.import_module("datatrove.executor")


def _run_here(step: RunCommand, tasks: int, workers: int) -> None:
    at_once = min(tasks, max(1, available_cores() // workers))
    # Do not use datatrove's record of finished tasks: after a part was deleted, datatrove would still skip its task.
    datatrove_executors().LocalPipelineExecutor([step], tasks, at_once, str(step.logs), skip_completed=False).run()


def _run_on_ray(step: RunCommand, tasks: int, workers: int) -> None:
    import ray  # imported here: ray is not installed with this project, and only this executor needs it

    ray.init(runtime_env={"env_vars": {"PYTHONPATH": _python_path()}}, ignore_reinit_error=True)
    options = {"logging_dir": str(step.logs), "skip_completed": False}
    datatrove_executors().RayPipelineExecutor([step], tasks, cpus_per_task=workers, **options).run()


def _submit_to_slurm(step: RunCommand, merge: RunCommand, tasks: int, workers: int, slurm: SlurmOptions) -> None:
    merge.logs.mkdir(exist_ok=True)
    bin_directory = Path(sys.executable).parent
    common = {
        "time": slurm.time,
        "partition": slurm.partition,
        "qos": None,
        "skip_completed": False,
        # The job needs PATH to find datatrove's command, and PYTHONPATH to import this module.
        "env_command": f'export PATH="{bin_directory}:$PATH" PYTHONPATH="{ROOT}:$PYTHONPATH"',
    }
    executor = datatrove_executors().SlurmPipelineExecutor
    parts = executor([step], tasks, cpus_per_task=workers, job_name="prepare", logging_dir=str(step.logs), **common)
    executor([merge], 1, job_name="merge", logging_dir=str(merge.logs), depends=parts, **common).run()
