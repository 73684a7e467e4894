"""Windows of tokens from prompts and completions. Only the tokens of the completions count in the loss.

The dataset directory has a train.jsonl and a val.jsonl, with one object per line:
{"prompt": "...", "completion": "..."}. An example consists of the prompt's tokens, the completion's tokens and
`<|endoftext|>`, which counts in the loss too. Prompt and completion are encoded separately, so that the prompt has the
same tokens as in generation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.loader import IGNORE_INDEX, TrainingWindows
from data.tables import read_json_lines
from data.tokenizer import Tokenizer
from files import file_sha256

PROMPTS_KEPT = 64  # the largest number of prompts in `CompletionWindows.prompts`


class CompletionWindows(TrainingWindows):
    """The examples of a file in windows of T tokens. Each epoch has all examples.

    Args:
        path: a .jsonl file.
        tokenizer: encodes prompts and completions.
        sequence_length: T. If an example is too long for a window, the beginning of its prompt is cut off. A completion
            is never cut.
        pack: True puts as many consecutive examples into a window as fit, False gives each example its own window. The
            rest of a window is padding.
        document_mask: if True, each token attends to its own example only.

    Attributes:
        prompts: the tokens of the first PROMPTS_KEPT prompts, for the samples during training.
        n_cut: the number of prompts whose beginning was cut off.

    Raises:
        ValueError: when a line is not an example, cannot be encoded or has a completion that does not fit into a window
            (the message names the line), or when the file has no example.
        OSError: when the file cannot be read.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, sequence_length: int, *, pack: bool, document_mask: bool = False
    ) -> None:
        self.sequence_length, self.source, self.document_mask = sequence_length, str(path), document_mask
        self.n_cut = 0
        examples = [self._encode(prompt, completion, tokenizer, n) for n, prompt, completion in read_examples(path)]
        lengths = np.array([len(tokens) for tokens, _ in examples])
        # The tokens of all examples follow each other. Window w begins at token _bounds[w] and ends before token
        # _bounds[w + 1]. It has room for T + 1 tokens, because its last token is only a target.
        ends = np.cumsum(lengths)
        self._bounds = [0]
        for start, end in zip(ends - lengths, ends, strict=True):
            if start > self._bounds[-1] and not (pack and end - self._bounds[-1] <= sequence_length + 1):
                self._bounds.append(int(start))
        self._bounds.append(int(ends[-1]))
        self.prompts = [tokens[~in_completion].tolist() for tokens, in_completion in examples[:PROMPTS_KEPT]]
        self._tokens = np.concatenate([tokens for tokens, _ in examples])
        self._in_completion = np.concatenate([in_completion for _, in_completion in examples])
        self._example = np.repeat(np.arange(len(lengths)), lengths)  # (tokens,) the index of the example of each token
        self._n_targets = np.array([self._is_target(w).sum() for w in range(len(self))])
        self.fingerprint = f"{file_sha256(path)} {'packed' if pack else 'padded'}"

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Fill `inputs`, `targets` and `documents`, each (T,) int64, with one window.

        `documents` gets, for each input, the index of its example in the file, and -1 for padding.
        """
        tokens = self._tokens[self._bounds[window] : self._bounds[window + 1]]
        n = len(tokens) - 1
        # Padding needs no attention mask: with causal attention, no token attends to the padding after it.
        inputs[:n], inputs[n:] = tokens[:-1], 0
        targets[:n], targets[n:] = np.where(self._is_target(window), tokens[1:], IGNORE_INDEX), IGNORE_INDEX
        if documents is not None:
            first = self._bounds[window]
            documents[:n], documents[n:] = self._example[first : first + n], -1

    def count(self, windows: np.ndarray) -> int:
        """Return how many targets are in the windows with the numbers `windows`, (k,), not counting IGNORE_INDEX."""
        return int(self._n_targets[windows].sum())

    def _is_target(self, window: int) -> np.ndarray:
        """Return, for each token of a window except the first, whether it belongs to a completion: (n,) bool."""
        return self._in_completion[self._bounds[window] + 1 : self._bounds[window + 1]]

    def _encode(self, prompt: str, completion: str, tokenizer: Tokenizer, line: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of an example, (n,) int64, and which of them belong to the completion, (n,) bool."""
        try:
            before, after = tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eot]
        except ValueError as error:
            raise ValueError(f"{self.source}, line {line}: {error}") from None
        # An empty prompt becomes end-of-text, as in generation: the completion's first token needs an input before it.
        before = before or [tokenizer.eot]
        room = self.sequence_length + 1 - len(after)
        if room < 1:
            raise ValueError(
                f"{self.source}, line {line}: a completion of {len(after):,} tokens and a prompt do not fit "
                f"data.sequence_length {self.sequence_length}: raise it, or shorten the completion"
            )
        self.n_cut += len(before) > room
        before = before[-room:]
        return np.array(before + after), np.array([False] * len(before) + [True] * len(after))


def read_examples(path: Path) -> list[tuple[int, str, str]]:
    """Return (line number from 1, prompt, completion) of each line that is not blank.

    Raises FileNotFoundError when the file is missing, ValueError when a line is not an example (the message names
    the line) or the file holds no example.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: data.format completions needs train.jsonl and val.jsonl in data.dir, one example per line: "
            f'{{"prompt": "...", "completion": "..."}}. If there is no val.jsonl, move a tenth of the lines into one'
        )
    examples = []
    for number, row in read_json_lines(path):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not (isinstance(prompt, str) and isinstance(completion, str) and completion):
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": "...", "completion": "..."}}: both '
                f"must be text, the completion not empty; found {', '.join(map(repr, row)) or 'no key'}"
            )
        examples.append((number, prompt, completion))
    if not examples:
        raise ValueError(f"{path} holds no example: expected one object per line")
    return examples
