"""How the threads of PyTorch's CPU operators wait for work. Import this module before torch, which loads OpenMP.

OpenMP reads its settings when it is loaded. Its threads wait for the next operator by spinning. On a quiet machine that
is fastest: sleeping threads would have to be woken hundreds of times in a training step. On a busy machine a spinning
thread occupies the core that another thread of the same operator needs. Measured on two cores in tokens/s of the demo's
training (bfloat16):

    GOMP_SPINCOUNT               not set     1000       0
    nothing else running          21,010   19,726   14,090
    another process computing      5,259    9,175
"""

from __future__ import annotations

import os

import psutil

SPINS_WHEN_BUSY = "1000"
BUSY_CORES = 0.75  # cores in use by other processes: about one that computes all the time


def cores_in_use(seconds: float = 0.1) -> float:
    """Return the number of cores that all processes use together, measured while this process waits."""
    return psutil.cpu_percent(seconds) / 100 * (psutil.cpu_count() or 1)


def adapt_to_load() -> None:
    """Make waiting threads sleep after a short spin if other processes use the cores now.

    Only libgomp, with which PyTorch is built on Linux, reads this setting. It changes no result. A value in
    GOMP_SPINCOUNT or OMP_WAIT_POLICY is left as it is.
    """
    if os.environ.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}) and cores_in_use() >= BUSY_CORES:
        os.environ["GOMP_SPINCOUNT"] = SPINS_WHEN_BUSY


adapt_to_load()
