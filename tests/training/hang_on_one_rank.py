"""For test_distributed.py: train.py in which one process hangs in its third step, with a short limit for the others.

python tests/training/hang_on_one_rank.py RANK TRAIN_ARGUMENTS
"""

import sys
import time
from datetime import timedelta

import processes

processes.COLLECTIVE_TIMEOUT = timedelta(seconds=4)

import train  # noqa: E402 (after the limit is set)

rank = int(sys.argv.pop(1))
step = train.train_step


def train_step(run, *arguments):
    if run.processes.rank == rank and run.state.step == 2:
        time.sleep(1000)
    return step(run, *arguments)


train.train.__kwdefaults__["train_step"] = train_step
train.main()
