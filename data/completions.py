"""Prompts with the completions a model is to learn for them, as windows: the loss counts on completions alone.

A directory has train.jsonl and val.jsonl, an object a line: {"prompt": "...", "completion": "..."}. An example is
prompt, completion, `<|endoftext|>`, so that a text sampled after the prompt continues in the same format and ends. The
two are encoded apart, as when only the prompt is there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data.loader import IGNORE_INDEX
from data.shards import file_sha256
from data.tokenizer import Tokenizer

PROMPTS_KEPT = 64  # more than anyone samples from


class CompletionWindows:
    """The examples of a file in windows of T tokens; a `data.loader.Windows`.

    Args:
        path: a .jsonl file.
        sequence_length: T. Of a longer example the beginning of the prompt is cut off, never the completion.
        pack: several examples in a window, in their order, as many as fit, the later ones seeing those before them as
            documents do in pretraining. Else each has a window of its own. What is left of a window is padding.

    `prompts` has the tokens of the first prompts, and `n_cut` says how many prompts were cut.

    Raises:
        ValueError: naming the line, for what is no example, or a completion that does not fit.
        OSError: when the file cannot be read.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, sequence_length: int, *, pack: bool) -> None:
        self.sequence_length, self.source = sequence_length, str(path)
        self.n_cut = 0
        examples = [self._encode(prompt, completion, tokenizer, n) for n, prompt, completion in read_examples(path)]
        lengths = np.array([len(tokens) for tokens, _ in examples])
        # window w holds tokens bounds[w] .. bounds[w + 1]
        ends = np.cumsum(lengths)
        self._bounds = [0]
        for start, end in zip(ends - lengths, ends, strict=True):
            if start > self._bounds[-1] and not (pack and end - self._bounds[-1] <= sequence_length + 1):
                self._bounds.append(int(start))
        self._bounds.append(int(ends[-1]))
        self.prompts = [tokens[~counts].tolist() for tokens, counts in examples[:PROMPTS_KEPT]]
        self._tokens = np.concatenate([tokens for tokens, _ in examples])
        self._counts = np.concatenate([counts for _, counts in examples])
        self._n_counted = np.array([self._counted(w).sum() for w in range(len(self))])
        self.fingerprint = f"{file_sha256(path)} {'packed' if pack else 'padded'}"

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Fill inputs and targets, (T,) int64 each, with a window."""
        tokens = self._tokens[self._bounds[window] : self._bounds[window + 1]]
        n = len(tokens) - 1
        inputs[:n], inputs[n:] = tokens[:-1], 0  # what comes later is not seen, so that padding needs no mask
        targets[:n], targets[n:] = np.where(self._counted(window), tokens[1:], IGNORE_INDEX), IGNORE_INDEX

    def count(self, windows: np.ndarray) -> int:
        """How many targets count in these windows."""
        return int(self._n_counted[windows].sum())

    def _counted(self, window: int) -> np.ndarray:
        """Which of a window's targets are of a completion."""
        return self._counts[self._bounds[window] + 1 : self._bounds[window + 1]]

    def _encode(self, prompt: str, completion: str, tokenizer: Tokenizer, line: int) -> tuple[np.ndarray, np.ndarray]:
        """An example's tokens, and which of them are the completion's."""
        try:
            before, after = tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eot]
        except ValueError as error:
            raise ValueError(f"{self.source}, line {line}: {error}") from None
        before = before or [tokenizer.eot]  # as sample.py begins without a prompt
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
    """Line number, prompt and completion of each line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: data.format completions wants train.jsonl and val.jsonl in data.dir, a line for an example: "
            f'{{"prompt": "...", "completion": "..."}}. Without a val.jsonl, move a tenth of the lines into one'
        )
    examples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt, completion = row["prompt"], row["completion"]
                if not (isinstance(prompt, str) and isinstance(completion, str) and completion):
                    raise ValueError("both must be text, the completion not empty")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected {{"prompt": "...", "completion": "..."}} ({error!r})'
                ) from None
            examples.append((number, prompt, completion))
    if not examples:
        raise ValueError(f"{path} holds no example")
    return examples
