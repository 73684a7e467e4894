#!/usr/bin/env bash
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Train under Slurm until the run is finished, across preemptions and time limits:
#
#   sbatch scripts/slurm.sh --config configs/gpt2-124m.yaml
#
# Five minutes before the time limit (or on preemption, with Slurm's PreemptParameters=send_user_signal) Slurm sends
# SIGUSR1 to this script. The script forwards the signal to the training processes, which write a checkpoint after the
# current step, set the status in status.json to `preempted` and exit. The script reads status.json, because torchrun's
# exit status does not show whether a run was preempted. It then requeues the job, which resumes from the checkpoint.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-.venv/bin/python}
PROCESSES=${PROCESSES:-gpu}  # number of processes per node, or gpu for one process per GPU
PORT=${PORT:-29500}

run=$("$PYTHON" -c 'from training.config import parse_config; run = parse_config().run; print(f"{run.dir}/{run.name}")' "$@") || exit 2
"$PYTHON" train.py "$@" --dry-run || exit 2  # finds errors in the configuration or dataset before all nodes start

# Delete the file of the previous attempt, because this attempt may fail before it writes its own.
rm -f "$run/status.json"

# The script that runs on each node. SIGUSR1 would kill torchrun, which would then kill its workers. Therefore torchrun
# ignores the signal, and this script sends it to the workers, torchrun's child processes, which handle it. The script
# does the same on SIGTERM (scancel).
node='
trap "" USR1
"$@" &
agent=$!
trap "pkill -USR1 -P $agent" USR1 TERM
while kill -0 "$agent" 2>/dev/null; do wait "$agent"; status=$?; done
exit "$status"
'
srun bash -c "$node" node "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$PROCESSES" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv_endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$PORT" \
    train.py "$@" &
step=$!
trap 'kill -USR1 "$step"' USR1 TERM  # srun forwards it to the nodes
while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done

case $("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$run/status.json" 2>/dev/null) in
    finished) exit 0 ;;
    preempted) exec scontrol requeue "$SLURM_JOB_ID" ;;
    *) echo "slurm.sh: $run ended without finishing or being preempted (srun: $status); see its output" >&2; exit 1 ;;
esac
