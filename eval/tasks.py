"""The tasks that `eval.run` knows by name: each takes the command line's options and a subject, and gives figures."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.loader import TokenWindows
from data.shards import ShardWriter, open_split
from data.tokenizer import load_tokenizer
from eval import hellaswag, lambada
from eval.choices import (
    TASKS,
    Convention,
    Question,
    answer,
    build,
    classification,
    load_hub_rows,
    mean_and_stderr,
    read_table,
    with_shots,
)
from eval.loss import split_loss
from eval.perplexity import CORPORA, perplexity, read_text, summarize
from eval.reference import save_reference
from model import GPT

if TYPE_CHECKING:
    from eval.run import Subject


@dataclass
class Outcome:
    """What a task found: (value, its standard error or None where it has none) by metric, over `count` examples, and a
    line for each of those."""

    convention: str
    metrics: Mapping[str, tuple[float, float | None]]
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)


Run = Callable[[argparse.Namespace, "Subject"], Outcome]


def find_tasks(names: Sequence[str]) -> dict[str, Run]:
    """The functions behind `names`. Raises ValueError for one that is unknown, with those that are known."""
    known: dict[str, Run] = {"hellaswag": run_hellaswag}
    known |= {name: functools.partial(run_choices, name) for name in TASKS}
    known |= {name: functools.partial(run_lambada, name) for name in ("lambada", "lambada_openai")}
    known |= {name: functools.partial(run_corpus, name) for name in CORPORA}
    known |= {"perplexity": run_perplexity, "classify": run_classify, "loss": run_loss}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"unknown task {', '.join(unknown) or '(none given)'}: known are {', '.join(known)}")
    return {name: known[name] for name in names}


def has_questions(name: str) -> bool:
    """Whether a task is of questions with choices, which solved examples can come before."""
    return name in ("hellaswag", "classify", *TASKS)


def run_hellaswag(args: argparse.Namespace, subject: Subject) -> Outcome:
    convention: Convention = args.convention or "completion"
    questions = hellaswag.read_questions(convention)

    def train() -> list[Question]:
        return build("hellaswag", load_hub_rows("Rowan/hellaswag", None, "train"), hellaswag.RENDER[convention])

    return _choose(args, subject, questions, train, convention)


def run_choices(name: str, args: argparse.Namespace, subject: Subject) -> Outcome:
    task = TASKS[name]
    questions = build(name, task.rows(), task.question)
    convention: Convention = args.convention or "harness"
    outcome = _choose(args, subject, questions, lambda: build(name, task.train_rows(), task.question), convention)
    if not args.shots:  # the paper gave no solved examples
        outcome.convention = f"{task.convention_prefix}{outcome.convention}"
    return outcome


def run_classify(args: argparse.Namespace, subject: Subject) -> Outcome:
    words = dict(pair.partition("=")[::2] for pair in args.labels.split(","))
    if len(words) < 2 or not all(words.values()):
        raise ValueError(f"--labels {args.labels}: expected at least two of the form VALUE=WORD, with commas between")
    question = classification(args.template.replace("\\n", "\n"), args.label_field, words)
    questions = build(str(args.file), read_table(args.file), question)

    def train() -> list[Question]:
        if args.train_file is None:
            raise ValueError("--shots needs --train-file to draw from, or --shots-from evaluated")
        return build(str(args.train_file), read_table(args.train_file), question)

    convention: Convention = args.convention or "harness"
    return _choose(args, subject, questions, train, convention)


def _choose(
    args: argparse.Namespace,
    subject: Subject,
    questions: list[Question],
    train: Callable[[], list[Question]],
    convention: Convention,
) -> Outcome:
    label: str = convention
    asked = questions[: args.limit]
    if args.shots:
        same = args.shots_from == "evaluated"
        try:
            pool = questions if same else train()
        except OSError as error:
            raise OSError(f"{error}; without it, draw the shots with --shots-from evaluated") from error
        asked = with_shots(asked, pool, args.shots, args.seed, same=same)
        label += f", {args.shots} shots from {args.shots_from}, seed {args.seed}"
    answers = answer(asked, subject.tokenizer, subject.score, convention)
    metrics = {
        "acc": mean_and_stderr(answers.choice == answers.gold),
        "acc_norm": mean_and_stderr(answers.choice_norm == answers.gold),
        "bits_per_byte": mean_and_stderr(answers.bits_per_byte),
    }
    columns = (answers.gold.tolist(), answers.choice.tolist(), answers.choice_norm.tolist(), answers.scores)
    names = ("gold", "choice", "choice_norm", "scores")
    examples = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return Outcome(label, metrics, len(asked), examples)


def run_lambada(name: str, args: argparse.Namespace, subject: Subject) -> Outcome:
    texts = lambada.load_openai_passages() if name == "lambada_openai" else lambada.read_passages()
    words = lambada.guess_last_words(texts[: args.limit], subject.tokenizer, subject.score)
    # There is one ending and no choice among several: 0 is its index, -1 another word.
    choices = [0 if correct else -1 for correct in words.correct]
    examples = [
        {"gold": 0, "choice": choice, "choice_norm": choice, "scores": [log_prob]}
        for choice, log_prob in zip(choices, words.log_probs.tolist(), strict=True)
    ]
    return Outcome("harness", lambada.summarize(words), len(choices), examples)


def run_perplexity(args: argparse.Namespace, subject: Subject) -> Outcome:
    if args.text is not None:
        text = read_text(args.text)
        return _slide(args, subject, subject.tokenizer.encode(text), text, len(text.split()))
    tokens = _validation_tokens(args.data, subject.tokenizer, args.tokens)
    return _slide(args, subject, tokens[tokens[0] == subject.tokenizer.eot :], None, 0)


def run_corpus(name: str, args: argparse.Namespace, subject: Subject) -> Outcome:
    corpus = CORPORA[name]
    raw = read_text(args.text) if args.text is not None else corpus.load()
    text = corpus.detokenize(raw)
    outcome = _slide(args, subject, subject.tokenizer.encode(text), text, len(raw.split()))
    outcome.convention = f"{corpus.convention}{outcome.convention}"
    return outcome


def _slide(args: argparse.Namespace, subject: Subject, tokens: list[int], text: str | None, n_words: int) -> Outcome:
    """Perplexity of `tokens`, which are those of `text` where that is given, and then of `n_words` words."""
    block_size = subject.model.config.block_size
    stride = args.stride or max(1, block_size // 2)
    covered = tokens if args.limit is None else tokens[: args.limit * stride]
    if text is None or len(covered) < len(tokens):
        documents = [subject.tokenizer.decode(part) for part in _documents(covered, subject.tokenizer.eot)]
        n_bytes = sum(len(document.encode()) for document in documents)
        # The words of a part of a corpus in its own tokenisation cannot be told from the text.
        n_words = 0 if text is not None else sum(len(document.split()) for document in documents)
    else:
        n_bytes = len(text.encode())
    result = perplexity(covered, subject.tokenizer.eot, block_size, stride, subject.score)
    return Outcome(f"stride {stride}", summarize(result, n_bytes, n_words), result.tokens)


def _documents(tokens: Sequence[int], eot: int) -> Iterator[list[int]]:
    """The runs of tokens between one end-of-text and the next."""
    part: list[int] = []
    for token in tokens:
        if token == eot:
            yield part
            part = []
        else:
            part.append(token)
    yield part


def _validation_tokens(directory: Path, tokenizer: Any, limit: int) -> list[int]:
    """The first `limit` tokens of a data set's validation split after its first; in `tokenizer`'s tokens, if the data
    set has others, of the same text."""
    split = open_split(directory, "val")
    read = np.empty(min(limit + 1, split.n_tokens), np.uint16)
    split.read(0, read)
    tokens: list[int] = read.tolist()
    own = _dataset_tokenizer(directory)
    if own == tokenizer:
        return tokens
    again: list[int] = []
    for document in _documents(tokens, own.eot):
        if document:
            again += [tokenizer.eot, *tokenizer.encode(own.decode(document))]
    return again


def _dataset_tokenizer(directory: Path) -> Any:
    return load_tokenizer(directory if (directory / "tokenizer.json").is_file() else "gpt2")


def run_loss(args: argparse.Namespace, subject: Subject) -> Outcome:
    if not isinstance(subject.model, GPT):
        raise ValueError("--tasks loss is for GPT-2s; for another model take --tasks perplexity --data")
    tokenizer, processes = subject.tokenizer, subject.processes
    own = _dataset_tokenizer(args.data)
    sequence_length = min(1024, subject.model.config.block_size)
    with tempfile.TemporaryDirectory() as temporary:
        directory, n_tokens = args.data, args.tokens
        if own != tokenizer:
            tokens = np.array(_validation_tokens(args.data, tokenizer, args.tokens), np.uint16)
            writer = ShardWriter(Path(temporary), "val", len(tokens), tokenizer.eot)
            writer.write(tokens)
            writer.finish()
            directory, n_tokens = Path(temporary), len(tokens)
        windows = TokenWindows(open_split(directory, "val"), sequence_length, tokenizer.vocab_size, tokens=n_tokens)
        with processes.autocast():
            result = split_loss(
                subject.model,
                windows,
                tokenizer.token_bytes(),
                micro_batch=subject.batch_size,
                rank=processes.rank,
                world_size=processes.world_size,
                reduce=processes.sum,
            )
    if args.save_reference and processes.is_main:
        figures = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens}
        save_reference(args.data, subject.name, figures | {"tokenizer": tokenizer.kind})
    metrics = {"loss": (result.loss, None), "bits_per_byte": (result.bits_per_byte, None)}
    return Outcome(f"windows of {sequence_length}, {tokenizer.kind} tokens", metrics, result.tokens)
