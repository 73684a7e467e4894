"""For test_float16.py: train configurations so that the gradient of the last rank overflows in the fifth step.

torchrun --nproc_per_node=2 tests/training/overflow_on_one_rank.py a.yaml b.yaml
"""

from tests.training.each_run import each_run
from train import train


def main() -> None:
    for run in each_run():
        scale = run.scaler.scale

        def overflow(tensor, run=run, scale=scale):
            here = run.state.step == 4 and run.processes.rank == run.processes.world_size - 1
            return scale(tensor * float("inf") if here and tensor.requires_grad else tensor)

        run.scaler.scale = overflow
        train(run)


main()
