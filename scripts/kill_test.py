"""Kill a run repeatedly, and compare its files with those of the same run that was never killed:

    python -m scripts.kill_test --config FILE.yaml --dir DIR --kills 80 --processes 1

An attempt at the run is one start of train.py. Its processes are forked from the script's process, which has imported
all modules already, so an attempt starts quickly. SIGKILL comes at a random moment: during the start, after some steps,
or while a checkpoint is being written. The script prints one JSON object with counts. The exit status is 1 if the two
runs differ (see `differences`), if an attempt fails, or if the run ends before the last kill.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.kill_test")

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint.state_dict  # noqa: F401 (imported here, so that attempts need not import it)

import train
from checkpoints import MANIFEST, list_checkpoints, read_state
from command import CommandParser, at_least_one, ending
from files import PARTIAL_SUFFIX
from training.config import Config, parse_config
from training.run_directory import RunDirectory

MOMENTS = {"start": 0.15, "step": 0.55, "checkpoint": 0.3}  # moment of the kill -> fraction of all kills
GRACE = 60.0  # seconds in which all processes of an attempt must end after some of them were killed


class Attempt:
    """The processes of one start of train.py."""

    def __init__(self, arguments: list[str], processes: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.running: list[int] = []
        self.failed = False
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                if processes > 1:
                    world = {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                    os.environ.update(world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                become_train(arguments, log)
            self.running.append(pid)

    def over(self) -> bool:
        """Return whether every process has ended."""
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.running.remove(pid)
                self.failed |= status != 0
        return not self.running

    def kill(self, pids: list[int]) -> bool:
        """Send SIGKILL to the processes `pids` and, as torchrun does, SIGTERM to the others of the attempt.

        Return whether all processes end within GRACE seconds. Processes that still run after this time get SIGKILL.
        """
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in set(self.running) - set(pids):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while not self.over() and time.monotonic() < deadline:
            time.sleep(0.002)
        in_time = not self.running
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return in_time


def become_train(arguments: list[str], log: Path) -> None:
    """Run train.py's main in this forked process, append its output to `log`, and exit with its status."""
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train.py", *arguments]
        train.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def metrics_inode(run: RunDirectory) -> int:
    """Return the inode of metrics.jsonl, or 0 if there is no such file.

    Each attempt replaces the file by a new one. So a changed inode shows that the attempt has opened the run.
    """
    return run.metrics_path.stat().st_ino if run.metrics_path.exists() else 0


def last_step(run: RunDirectory) -> int:
    """Return the step of the last complete line of metrics.jsonl, or 0 if there is none."""
    with open(run.metrics_path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        complete = file.read().split(b"\n")[:-1]
    return json.loads(complete[-1])["step"] if complete and complete[-1].endswith(b"}") else 0


def unfinished_checkpoint(run: RunDirectory) -> Path | None:
    """Return the partial directory of the checkpoint that is being written, or None if there is none.

    A partial directory is ignored if its step is not later than that of the newest complete checkpoint, because it is
    then being deleted or replaced.
    """
    complete = list_checkpoints(run.checkpoints)
    for path in run.checkpoints.glob(f"step-*{PARTIAL_SUFFIX}"):
        if not complete or path.name.removesuffix(PARTIAL_SUFFIX) > complete[-1].name:
            return path
    return None


def kill_once(
    run: RunDirectory, attempt: Attempt, moment: str, chance: random.Random, steps: int
) -> dict[str, bool] | None:
    """Wait for `moment`, one of MOMENTS. Then kill a random choice of the attempt's processes.

    The moment "step" comes after a random number of new steps, from 1 to `steps`. Return whether the attempt had taken
    a step, whether a checkpoint was half-written, and whether a process did not end within GRACE seconds. Return None
    if the attempt ended by itself.
    """
    started, inode_before, unfinished_before = time.monotonic(), metrics_inode(run), unfinished_checkpoint(run)
    stale = unfinished_before.stat().st_ino if unfinished_before is not None else 0
    delay, new_steps = chance.uniform(0, 0.6), chance.randint(1, steps)

    def writes_checkpoint() -> bool:
        try:
            found = unfinished_checkpoint(run)
            return found is not None and found.stat().st_ino != stale
        except OSError:  # the directory was renamed meanwhile, so the checkpoint is complete
            return False

    def has_stepped(n: int) -> bool:
        if metrics_inode(run) in (0, inode_before):
            return False
        return last_step(run) >= (run.read_provenance()[-1]["resumed_at_step"] or 0) + n

    while moment != "start" or time.monotonic() < started + delay:
        if attempt.over():
            return None
        if (moment == "checkpoint" and writes_checkpoint()) or (moment == "step" and has_stepped(new_steps)):
            time.sleep(chance.uniform(0, 0.01))
            break
        time.sleep(0.0005)
    some = chance.sample(attempt.running, chance.randint(1, len(attempt.running))) if attempt.running else []
    in_time = attempt.kill(some)
    return {"after_first_step": has_stepped(1), "half_written": writes_checkpoint(), "hung": not in_time}


def differences(alone: RunDirectory, killed: RunDirectory, config: Config) -> list[str]:
    """Describe how two finished runs differ, and name temporary files that remain in the directory of `killed`."""
    found = []
    last = [list_checkpoints(run.checkpoints)[-1] for run in (alone, killed)]
    hashes = [json.loads((path / MANIFEST).read_text(encoding="utf-8")) for path in last]
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        if read_state(last[0])["step"] != read_state(last[1])["step"] or hashes[0][name] != hashes[1][name]:
            found.append(f"{last[1] / name} differs from {last[0] / name}")
    seen = [
        [(record["split"], record["step"], record["loss"]) for record in run.read_metrics()] for run in (alone, killed)
    ]
    if [step for split, step, _ in seen[1] if split == "train"] != list(range(1, config.optim.steps + 1)):
        found.append(f"{killed.metrics_path} does not contain each step exactly once")
    if seen[0] != seen[1]:
        found.append(f"{killed.metrics_path} differs in its losses from {alone.metrics_path}")
    found += [f"{path} was not removed" for path in killed.path.rglob(f"*{PARTIAL_SUFFIX}")]
    return found


def kill_and_compare(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Train without kills and with kills, and return the counts and the differences between the two runs.

    Exits with status 1 if an attempt fails, or if the run ends before the last kill.
    """
    args.dir.mkdir(parents=True, exist_ok=True)
    alone, killed = RunDirectory(args.dir / "alone"), RunDirectory(args.dir / "killed")

    def start(run: RunDirectory) -> Attempt:
        where = ["--run.dir", str(args.dir), "--run.name", run.path.name]
        return Attempt(["--config", args.config, *where], args.processes, args.dir / f"{run.path.name}.log")

    def finish(run: RunDirectory) -> None:
        attempt = start(run)
        while not attempt.over():
            time.sleep(0.01)
        if attempt.failed:
            sys.exit(f"an attempt failed, see {args.dir / run.path.name}.log")

    finish(alone)
    chance = random.Random(args.seed)
    moments = [name for name, fraction in MOMENTS.items() for _ in range(round(fraction * args.kills))]
    moments += ["step"] * (args.kills - len(moments))
    chance.shuffle(moments)
    counts = {"kills": 0, "after_first_step": 0, "half_written": 0, "hung": 0}
    for moment in moments[: args.kills]:
        hit = kill_once(killed, start(killed), moment, chance, config.optim.steps // args.kills)
        if hit is None:
            sys.exit(f"the run ended by itself after {counts['kills']} kills: raise optim.steps")
        counts["kills"] += 1
        for name, value in hit.items():
            counts[name] += value
    finish(killed)
    return counts | {"processes": args.processes, "differences": differences(alone, killed, config)}


def main() -> None:
    """Read the command line, run the test, and print the counts."""
    parser = CommandParser(
        prog="python -m scripts.kill_test", description=(__doc__ or "").split("\n\n")[0].rstrip(":") + "."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.yaml", help="YAML file of a short run with many steps and checkpoints"
    )
    parser.add_argument("--dir", required=True, type=Path, help="directory of the two runs, `alone` and `killed`")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of the run, all on this machine (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    args = parser.parse_args()
    config = parse_config(["--config", args.config])
    at_least_one(parser, args, "kills", "processes")
    if config.eval.patience:
        parser.error(f"eval.patience {config.eval.patience} may end the run before optim.steps: set it to 0")
    if (killed := args.dir / "killed").exists():
        parser.error(f"{killed} is the run of an earlier test: give another --dir, or delete it")
    if args.kills > config.optim.steps:
        parser.error(
            f"--kills {args.kills} in a run of optim.steps {config.optim.steps}: raise optim.steps, or kill less often"
        )
    with ending(parser):
        counted = kill_and_compare(args, config)
        print(json.dumps(counted))
        sys.exit(bool(counted["differences"]))


if __name__ == "__main__":
    main()
