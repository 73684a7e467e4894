"""Test scripts/slurm.sh with a real torchrun, and with an srun and a scontrol that imitate Slurm's on one machine."""

import itertools
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent

# Like Slurm's srun: runs the command once per node, forwards signals, and returns the highest exit status.
SRUN = """#!/usr/bin/env bash
tasks=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
worst=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path, launch):
    """`cluster(nodes, *arguments)`: start scripts/slurm.sh as sbatch would."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    starts = itertools.count()

    def sbatch(nodes, *arguments):
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "PROCESSES": "1", "PORT": str(port),
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here[1-2]",
            "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_RESTART_COUNT": str(next(starts)),
            "REQUEUED": str(tmp_path / "requeued"),
        }  # fmt: skip
        return launch("bash", ROOT / "scripts/slurm.sh", *arguments, **environment)

    return sbatch


@pytest.mark.slow
def test_a_preempted_job_saves_requeues_itself_and_finishes(tiny_run, write_config, cluster, wait_for_step, tmp_path):
    """Run two nodes with one process each: send SIGUSR1, then start the requeued job."""
    changes = {"optim.steps": 300, "optim.lr": 1e-3, "data.batch_tokens": 2048, "checkpoint.keep": 9}
    config = write_config(tiny_run("preempted", **changes))
    run = tmp_path / "runs" / "preempted"
    job = cluster(2, "--config", config)
    wait_for_step(run, 10, job)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted", output
    assert 10 <= status["step"] < 300
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{status['step']:06d}"]
    assert (tmp_path / "requeued").read_text() == "4711\n"

    again = cluster(2, "--config", config)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert json.loads((run / "status.json").read_text()) == {"status": "finished", "step": 300}
    starts = json.loads((run / "provenance.json").read_text())
    assert [(start["processes"], start["resumed_at_step"]) for start in starts] == [(2, None), (2, status["step"])]
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert load_file(run / "checkpoints" / "step-000300" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--optim.steps", "-3"), "optim.steps"), ((), "no dataset at")],
    ids=["field", "dataset"],
)
def test_an_impossible_job_is_refused_before_it_starts(cluster, tiny_run, write_config, tmp_path, arguments, message):
    config = write_config(tiny_run("x", **{"data.dir": str(tmp_path / "nowhere")}))
    job = cluster(1, "--config", config, *arguments)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2
    assert message in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued(tiny_run, write_config, cluster, tmp_path):
    """The status `preempted` of a previous attempt must not requeue it either."""
    directory = tmp_path / "runs" / "x"
    directory.mkdir(parents=True)
    (directory / "status.json").write_text('{"status": "preempted", "step": 3}')
    with FileLock(directory / ".lock"):  # the dry run, which comes first, does not lock the directory
        job = cluster(1, "--config", write_config(tiny_run("x")))
        output, _ = job.communicate(timeout=240)
    assert job.returncode == 1, output
    assert "is in use by a run that has not ended" in output
    assert "ended without finishing or being preempted (srun: 1)" in output
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_the_two_node_commands_of_the_documentation(tiny_run, write_config, launch, tmp_path):
    config = write_config(tiny_run("nodes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        launch(
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
            "--master-addr=127.0.0.1", f"--master-port={port}", "--nproc_per_node=1", "train.py", "--config", config,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    run = tmp_path / "runs" / "nodes"
    assert json.loads((run / "status.json").read_text()) == {"status": "finished", "step": 20}
    assert json.loads((run / "provenance.json").read_text())[0]["processes"] == 2
