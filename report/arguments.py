"""The command line of the report commands.

This file does not import torch, which takes seconds. So a wrong argument is reported without this delay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from command import CommandParser, ending


def command_line(
    name: str,
    description: str | None,
    add_arguments: Callable[[Callable[..., Any]], None],
    run: Callable[[argparse.Namespace], None],
) -> None:
    """Parse the arguments of `python -m name`, and call `run` with them.

    `add_arguments` declares the arguments: it is called with the method `add_argument` of the parser. A wrong argument,
    or an error that the user can correct, ends the process with a message and status 2. Ctrl-C ends the process with
    status 130.
    """
    parser = CommandParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser.add_argument)
    args = parser.parse_args()
    with ending(parser):
        run(args)
