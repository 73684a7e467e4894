"""For the scripts of this directory that torchrun starts: the runs that their command line names, in turn."""

import sys
from collections.abc import Iterator

from processes import start_processes, stop_processes
from training.config import parse_config
from training.setup import TrainingRun, setup


def each_run() -> Iterator[TrainingRun]:
    """Yield the run of each configuration file in `sys.argv`. The processes start once, which takes seconds."""
    processes = None
    for path in sys.argv[1:]:
        config = parse_config(["--config", path])
        processes = processes or start_processes(config.system.device, config.system.dtype)
        with setup(config, processes) as run:
            yield run
    stop_processes()
