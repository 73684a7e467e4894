"""For test_launch.py: train configurations; a stop request reaches the last rank inside the second validation.

torchrun --nproc_per_node=2 tests/training/stop_in_validation.py a.yaml b.yaml
"""

import os
import signal

from tests.training.each_run import each_run
from train import train


def main() -> None:
    for run in each_run():
        passes: list[int] = []

        def stop(model, inputs, run=run, passes=passes):
            passes.append(run.state.step)
            if not model.training and passes.count(2) == 3 and run.processes.rank == run.processes.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run.model.register_forward_pre_hook(stop)
        status = train(run)
        # torchrun's processes write without a buffer: one write for the whole line, or the lines of two processes mix
        print(f"{status} forward passes after step 2: {passes.count(2)}\n", end="")


main()
