"""How a training process starts, is asked to stop, and ends: signals, messages and exit statuses."""

from __future__ import annotations

# Import `command` before torch. `command` sets an environment variable that OpenMP reads when torch is imported.
from command import complete_output, described, fail, lasting_output

# isort: split
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from processes import Processes, lost_process, name_lost_processes, start_processes, stop_processes
from training.config import Config, Flags, parse_command_line

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopSignal:
    """Records the first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, so that training can stop after the current step.

    After this first signal, Ctrl-C raises KeyboardInterrupt as usual. If the process was started with nohup, SIGHUP
    stays ignored. The handlers stay after training: if another process fails, torchrun sends SIGTERM to this one, which
    must still print what it knows. A program that trains several runs uses `restored_handlers` (below).

    Args:
        announce: whether to print on stderr that training will stop; True on the main process only.
    """

    def __init__(self, *, announce: bool) -> None:
        self.received, self._announce = False, announce
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self.received = not self.received, True
        # From now on, Ctrl-C raises KeyboardInterrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._announce and is_first:
            again = "; press Ctrl-C again to quit now" if number == signal.SIGINT else ""
            # Use os.write, not print, because the signal may interrupt another print, which holds the lock of stderr.
            with contextlib.suppress(OSError):  # for example, the terminal is closed
                os.write(2, f"\nStopping after this step, with a checkpoint{again}\n".encode())


@contextmanager
def restored_handlers() -> Iterator[None]:
    """At the end of the `with` block, restore the present handlers of STOP_SIGNALS."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: the handler was not set in Python, which cannot restore it
                signal.signal(number, handler)


@contextmanager
def training_process() -> Iterator[tuple[Config, Flags, Processes]]:
    """Read the command line and join the other processes. Yield configuration, flags and processes to a `with` block.

    Some errors, here or in the block, end this process with a message. The exit status is 2 for an error that the user
    can correct, 1 if the communication with another process fails, and 130 for Ctrl-C. All other errors are raised
    unchanged.
    """
    who = f"process {os.environ.get('RANK', '?')}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    with lasting_output():
        try:
            with complete_output():
                config, flags = parse_command_line()
                system = config.system
                yield config, flags, start_processes(system.device, system.dtype, deterministic=system.deterministic)
        except (ValueError, OSError, FloatingPointError) as error:
            fail(f"train.py: {who}{described(error)}")
        except RuntimeError as error:
            if not lost_process(error):
                raise
            reason, lost = str(error).splitlines()[0], name_lost_processes()
            cause = "its own message states the cause, unless it was killed or hangs"
            fail(f"train.py: {who}lost {lost}: {cause} ({reason})", 1, consequence=True)
        except KeyboardInterrupt:
            print(
                f"\ntrain.py: {who}stopped; run the same command to resume from the newest checkpoint", file=sys.stderr
            )
            sys.exit(130)
        stop_processes()
