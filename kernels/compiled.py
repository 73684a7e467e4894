"""Compile a function with torch.compile. If compiling fails, run the function uncompiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


class Compiled:
    """A function that is compiled at its first call. If compiling fails, the function runs uncompiled after a warning.

    The first call also compiles the backward pass, so that `__call__` can catch a failure. By default, PyTorch would
    compile the backward pass only in `loss.backward()`.

    Args:
        function: the function to compile.
        what: the name of the function in the warning.
        dynamic: passed to torch.compile. False: compile again for each new shape; None: PyTorch decides.
    """

    def __init__(self, function: Callable[..., Any], what: str, *, dynamic: bool | None = False) -> None:
        import torch._functorch.config as functorch_config  # imported here: these take a second, and few runs compile
        from torch._dynamo.exc import TorchDynamoException

        functorch_config.force_non_lazy_backward_lowering = True
        self._function, self._what, self._cannot_compile = function, what, TorchDynamoException
        self._compiled: Callable[..., Any] | None = torch.compile(function, dynamic=dynamic)

    def __call__(self, *arguments: Any) -> Any:
        """Return the result of the compiled function or, if compiling has failed, of the function itself."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            # Only the compiler's errors are caught, not errors of the function itself.
            except self._cannot_compile as error:
                # The first line may only name the compiler; then the second line describes the error.
                reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
                print(
                    f"warning: compiling {self._what} failed, running it uncompiled is slower: {reason}",
                    file=sys.stderr,
                )
                self._compiled = None
        return self._function(*arguments)
