"""Kill a run again and again, and hold what it leaves to what the same run leaves when it is let alone:

    python -m scripts.kill_test --config FILE.yaml --dir DIR --kills 80 --processes 1

Each life is forked from this process, which has imported everything, so that it begins within a fraction of a second;
with several processes this script stands in for torchrun. SIGKILL comes at a random moment: of the start, some steps
into the life, or while a checkpoint is being written. Prints one JSON object with what was counted; exit status 1 where
weights, optimizer state or metrics differ from those of the run let alone, or a temporary file is left.
"""

from __future__ import annotations

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

import torch.distributed.checkpoint.state_dict  # noqa: F401 (imported once here, not in every life)

import train
from command import ending
from training.checkpoint import MANIFEST, PARTIAL, list_checkpoints, read_state
from training.config import Config, parse_config
from training.metrics import read_metrics

MOMENTS = {"start": 0.15, "step": 0.55, "checkpoint": 0.3}  # what a kill is aimed at, and how often
GRACE = 60.0  # seconds in which the others must end when one process is dead


class Life:
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
        """Whether every process has ended."""
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.running.remove(pid)
                self.failed |= status != 0
        return not self.running

    def kill(self, pids: list[int]) -> bool:
        """SIGKILL to some; the rest is told by SIGTERM, as torchrun does. Returns whether all ended in time."""
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
    """Run train.py's main in this forked process, its output appended to `log`, and end with its exit status."""
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


class Run:
    """What can be seen of a run in its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.metrics = directory, directory / "metrics.jsonl"

    def metrics_file(self) -> int:
        """Which file metrics.jsonl is: each life writes one of its own."""
        return self.metrics.stat().st_ino if self.metrics.exists() else 0

    def first_step(self) -> int:
        """The step that the newest life went on from."""
        return json.loads((self.directory / "provenance.json").read_text())[-1]["resumed_at_step"] or 0

    def last_step(self) -> int:
        """The last step in metrics.jsonl."""
        with open(self.metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole = file.read().split(b"\n")[:-1]
        return json.loads(whole[-1])["step"] if whole and whole[-1].endswith(b"}") else 0

    def half_written(self) -> Path | None:
        """A checkpoint that is being written; not one that is being deleted, which is older than a whole one."""
        whole = list_checkpoints(self.directory / "checkpoints")
        for path in (self.directory / "checkpoints").glob(f"step-*{PARTIAL}"):
            if not whole or path.name.removesuffix(PARTIAL) > whole[-1].name:
                return path
        return None


def kill_once(run: Run, life: Life, moment: str, chance: random.Random, steps: int) -> dict[str, bool] | None:
    """Wait for the moment and kill; what was hit, or None where the life ended by itself."""
    began, metrics_before, half_before = time.monotonic(), run.metrics_file(), run.half_written()
    stale = half_before.stat().st_ino if half_before is not None else 0
    delay, new_steps = chance.uniform(0, 0.6), chance.randint(1, steps)

    def new_half() -> bool:
        try:
            found = run.half_written()
            return found is not None and found.stat().st_ino != stale
        except OSError:  # renamed in between: whole now
            return False

    def stepped(n: int) -> bool:
        return run.metrics_file() not in (0, metrics_before) and run.last_step() >= run.first_step() + n

    while moment != "start" or time.monotonic() < began + delay:
        if life.over():
            return None
        if (moment == "checkpoint" and new_half()) or (moment == "step" and stepped(new_steps)):
            time.sleep(chance.uniform(0, 0.01))
            break
        time.sleep(0.0005)
    some = chance.sample(life.running, chance.randint(1, len(life.running))) if life.running else []
    in_time = life.kill(some)
    return {"after_first_step": stepped(1), "half_written": new_half(), "hung": not in_time}


def differences(alone: Run, killed: Run, config: Config) -> list[str]:
    """What distinguishes the two finished runs, in words."""
    found = []
    last = [list_checkpoints(run.directory / "checkpoints")[-1] for run in (alone, killed)]
    hashes = [json.loads((path / MANIFEST).read_text(encoding="utf-8")) for path in last]
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        if read_state(last[0])["step"] != read_state(last[1])["step"] or hashes[0][name] != hashes[1][name]:
            found.append(f"{last[1] / name} is not that of {last[0]}")
    seen = [
        [(record["split"], record["step"], record["loss"]) for record in read_metrics(run.metrics)]
        for run in (alone, killed)
    ]
    if [step for split, step, _ in seen[1] if split == "train"] != list(range(1, config.optim.steps + 1)):
        found.append(f"{killed.metrics} has not each step once")
    if seen[0] != seen[1]:
        found.append(f"{killed.metrics} has other losses than {alone.metrics}")
    found += [f"{path} was left" for path in killed.directory.rglob(f"*{PARTIAL}")]
    return found


def kill_and_compare(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Train alone and under kills: what was counted, and the differences. Ends with status 1 where it cannot go on."""
    args.dir.mkdir(parents=True, exist_ok=True)
    alone, killed = Run(args.dir / "alone"), Run(args.dir / "killed")

    def live(run: Run) -> Life:
        where = ["--run.dir", str(args.dir), "--run.name", run.directory.name]
        return Life(["--config", args.config, *where], args.processes, args.dir / f"{run.directory.name}.log")

    def finish(run: Run) -> None:
        life = live(run)
        while not life.over():
            time.sleep(0.01)
        if life.failed:
            sys.exit(f"a life failed, see {args.dir / run.directory.name}.log")

    finish(alone)
    chance = random.Random(args.seed)
    moments = [name for name, share in MOMENTS.items() for _ in range(round(share * args.kills))]
    moments += ["step"] * (args.kills - len(moments))
    chance.shuffle(moments)
    counts = {"kills": 0, "after_first_step": 0, "half_written": 0, "hung": 0}
    for moment in moments[: args.kills]:
        hit = kill_once(killed, live(killed), moment, chance, config.optim.steps // args.kills)
        if hit is None:
            sys.exit(f"the run ended by itself after {counts['kills']} kills: raise optim.steps")
        counts["kills"] += 1
        for name, value in hit.items():
            counts[name] += value
    finish(killed)
    return counts | {"processes": args.processes, "differences": differences(alone, killed, config)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.kill_test", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--config", required=True, metavar="FILE.yaml", help="a short run of many steps and checkpoints"
    )
    parser.add_argument("--dir", required=True, type=Path, help="where the two runs go, `alone` and `killed`")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="of the run; all on this machine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    config = parse_config(["--config", args.config])
    if args.kills > config.optim.steps:
        parser.error(f"--kills {args.kills} in a run of optim.steps {config.optim.steps}: raise it, or kill less often")
    with ending(parser):
        counted = kill_and_compare(args, config)
        print(json.dumps(counted))
        sys.exit(bool(counted["differences"]))


if __name__ == "__main__":
    main()
