"""`sample.py --interactive`: continue prompts from the terminal until end of file."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer
from generation.terminal import decoding_options, first_seed, load, print_probabilities, print_stream
from model import GPT

HELP = """\
A line that starts with a colon is a command:
  :temperature 0.7       below 1 favors probable tokens, above 1 improbable ones (0: always the most probable)
  :top-k 50              sample from the 50 most probable tokens (0: from all)
  :top-p 0.9             sample from the most probable tokens whose probabilities sum to 0.9
  :max-new-tokens 100    tokens to generate
  :num-samples 3         samples of each prompt
  :show-probs 5          first print the 5 most probable next tokens (0: print none)
  :more                  continue the last text
  :help                  print this
  :quit                  end the program, as Ctrl-D does
The arrow keys bring back earlier lines. Ctrl-C stops an answer; at the prompt, it ends the program."""


class Setting(NamedTuple):
    """A setting that a command can change."""

    convert: Callable[[str], float]  # converts what the user types; raises ValueError if this is not a number
    is_possible: Callable[[float], bool]  # returns whether the setting may have the converted value
    expected: str  # the possible values, in words, for error messages


SETTINGS = {
    "temperature": Setting(float, lambda x: 0 <= x < math.inf, "a number, at least 0"),
    "top_k": Setting(int, lambda x: x >= 0, "a whole number, at least 0"),
    "top_p": Setting(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "max_new_tokens": Setting(int, lambda x: x >= 1, "a whole number, at least 1"),
    "num_samples": Setting(int, lambda x: x >= 1, "a whole number, at least 1"),
    "show_probs": Setting(int, lambda x: x >= 0, "a whole number, at least 0"),
}


def run(args: argparse.Namespace) -> None:
    """Load the model that the arguments of sample.py select, and continue prompts from the terminal."""
    with contextlib.suppress(ImportError):  # readline gives input() line editing and a history; Windows lacks readline
        import readline  # noqa: F401
    model, tokenizer, name, size = load(args)
    print(f"{name}: {size}")
    print("Each prompt is continued by itself, without the earlier ones. :help lists commands, Ctrl-D ends.")
    Session(args, model, tokenizer).run()


class Session:
    """The state of `sample.py --interactive`: the settings, the seed of the next sample, and the last text.

    The last text is the last prompt with its continuation, and `:more` uses it as the prompt.
    """

    def __init__(self, args: argparse.Namespace, model: GPT, tokenizer: Tokenizer) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.seed, self.last_text = first_seed(args), ""

    def run(self) -> None:
        """Ask for lines until end of file or `:quit`. If a line is invalid, print the error and ask again."""
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            if line.strip() == ":quit":
                return
            try:
                if line.startswith(":"):
                    self.command(*line[1:].split())
                elif line.strip():
                    self.answer(line)
            except ValueError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:  # Ctrl-C during an answer; at the prompt, it ends the program
                print()

    def answer(self, prompt: str) -> None:
        """Print `num_samples` continuations of a prompt as they are generated.

        If `show_probs` is set, first print that number of the most probable next tokens. Raises ValueError, and prints
        nothing, if the model cannot continue the prompt.
        """
        options = self.check(prompt)
        if self.args.show_probs:
            print_probabilities(self.model, self.tokenizer, prompt, self.args.show_probs)
        for _ in range(self.args.num_samples):
            seed, self.seed = self.seed, self.seed + 1
            self.last_text = prompt + print_stream(self.model, self.tokenizer, prompt, seed, options)

    def command(self, name: str = "", *values: str) -> None:
        """Run a command. In the user's line, the first word after the colon is `name`, the other words are `values`.

        Raises ValueError if the command is unknown or cannot be run.
        """
        setting = name.replace("-", "_")
        if name == "help" and not values:
            print(HELP)
        elif name == "more" and not values:
            if not self.last_text:
                raise ValueError("there is no text to continue yet: type a prompt first")
            self.answer(self.last_text)
        elif setting in SETTINGS:
            self.change(setting, " ".join(values))
        else:
            raise ValueError(f":{' '.join([name, *values])} is not a command: :help lists them")

    def change(self, name: str, value: str) -> None:
        """Change a setting. Raises ValueError, and changes nothing, if the value is impossible.

        A change of temperature, top_k or top_p also selects the method: greedy decoding if the temperature is 0,
        otherwise sampling.
        """
        setting, before, vocab_size = SETTINGS[name], dict(vars(self.args)), self.model.config.vocab_size
        line = f":{name.replace('_', '-')} {value}".strip()
        try:
            number = setting.convert(value)
        except ValueError:
            number = math.nan
        if not setting.is_possible(number):
            raise ValueError(f"{line}: expected {setting.expected}; :help has an example")
        if name == "show_probs" and number > vocab_size:
            raise ValueError(f"{line}: the vocabulary has only {vocab_size:,} tokens")
        setattr(self.args, name, number)
        if name in ("temperature", "top_k", "top_p"):
            self.args.sampling = self.args.temperature != 0
        try:
            self.check("")
        except ValueError:
            vars(self.args).update(before)
            raise

    def check(self, prompt: str) -> dict[str, Any]:
        """Return the options of `generate` for a prompt. Raises ValueError if the model cannot continue the prompt."""
        return decoding_options(self.args, self.model, self.tokenizer, [prompt])
