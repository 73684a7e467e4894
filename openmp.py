"""How the threads of PyTorch's CPU operators wait for work. Import this module before torch, which loads OpenMP.

OpenMP reads its settings when it is loaded. Its threads wait for the next operator by spinning: they check again and
again whether there is work. If nothing else runs, spinning is fastest, because waking a sleeping thread takes time. But
on a busy machine, a spinning thread occupies a core that another thread of the same operator needs. GOMP_SPINCOUNT is
the number of checks before a thread sleeps. Training speed of `make demo` on two cores (bfloat16), in tokens/s:

    GOMP_SPINCOUNT               not set     1000
    nothing else running          21,010   19,726
    another process computing      5,259    9,175
"""

from __future__ import annotations

import os

import psutil

SPINS_WHEN_BUSY = "1000"
# The machine is busy if at least this number of cores is in use. A thread that always computes uses 1 core.
BUSY_CORES = 0.75


def cores_in_use(seconds: float) -> float:
    """Return how many cores all processes use together, measured for `seconds` while this process waits."""
    return psutil.cpu_percent(seconds) / 100 * (psutil.cpu_count() or 1)


def machine_is_busy() -> bool:
    """Return whether other processes use BUSY_CORES or more in two measurements, of 0.1 and then 0.4 seconds.

    A process that has just ended uses a core until its memory is released, so a single measurement is not enough.
    """
    return all(cores_in_use(seconds) >= BUSY_CORES for seconds in (0.1, 0.4))


def adapt_to_load() -> None:
    """Make waiting threads sleep after a short spin if the machine is busy now.

    Only libgomp, the OpenMP library of PyTorch on Linux, reads GOMP_SPINCOUNT. Settings of the user have precedence.
    With OMP_NUM_THREADS=1, which torchrun sets, no threads wait, so the load is not measured.
    """
    is_set = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
    if not (is_set or one_thread) and machine_is_busy():
        os.environ["GOMP_SPINCOUNT"] = SPINS_WHEN_BUSY


adapt_to_load()
