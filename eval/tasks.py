"""The tasks of `eval.run` by name. Each is a function (command-line arguments, Evaluator) -> TaskResult."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.loader import TokenWindows, Windows
from data.shards import Split, open_split
from data.tables import read_table
from data.tokenizer import Tokenizer, load_tokenizer
from eval import hellaswag, lambada
from eval.choice_tasks import CHOICE_TASKS, classification
from eval.choices import Convention, Question, answer, make_questions, mean_and_stderr, with_shots
from eval.evaluator import Evaluator
from eval.loss import ArrayWindows, split_loss
from eval.perplexity import CORPORA, perplexity, perplexity_metrics, read_text
from eval.reference import save_reference
from eval.rows import load_hub_rows
from model import GPT


@dataclass
class TaskResult:
    """The result of one task.

    Attributes:
        convention: how the texts were encoded and scored, such as "harness" or "stride 512"; written to the JSON file.
        metrics: (value, standard error) by metric; the standard error is None if it is not computed.
        count: number of scored examples or tokens.
        examples: one JSON object per example; empty for a task that scores a text as a whole.
    """

    convention: str
    metrics: Mapping[str, tuple[float, float | None]]
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)


TaskFunction = Callable[[argparse.Namespace, Evaluator], TaskResult]
VALIDATION_TOKENS = 10485760  # default of --tokens, the same as that of eval.tokens in training


def find_tasks(names: Sequence[str]) -> dict[str, TaskFunction]:
    """Return the functions of the named tasks. Raises ValueError for an unknown name, or if there are no names."""
    known: dict[str, TaskFunction] = {"hellaswag": run_hellaswag}
    known |= {name: functools.partial(run_choices, name) for name in CHOICE_TASKS}
    known |= {name: functools.partial(run_lambada, name) for name in ("lambada", "lambada_openai")}
    known |= {name: functools.partial(run_corpus, name) for name in CORPORA}
    known |= {"perplexity": run_perplexity, "classify": run_classify, "loss": run_loss}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"unknown task {', '.join(unknown) or '(none given)'}: expected some of {', '.join(known)}")
    return {name: known[name] for name in names}


def is_multiple_choice(name: str) -> bool:
    """Return whether a task consists of multiple-choice questions, which `--shots` applies to."""
    return name in ("hellaswag", "classify", *CHOICE_TASKS)


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice, and LAMBADA (the prediction of the last word of a passage)


def run_hellaswag(args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Evaluate HellaSwag."""
    convention: Convention = args.convention or "completion"
    questions = hellaswag.read_questions(convention)

    def train_questions() -> list[Question]:
        rows = load_hub_rows("Rowan/hellaswag", None, "train")
        return make_questions("hellaswag", rows, hellaswag.RENDERERS[convention])

    return _answer_questions(args, evaluator, questions, train_questions, convention)


def run_choices(name: str, args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Evaluate a task of `CHOICE_TASKS`."""
    task = CHOICE_TASKS[name]
    convention: Convention = args.convention or "harness"
    questions = make_questions(name, task.rows(), task.render)

    def train_questions() -> list[Question]:
        return make_questions(name, task.train_rows(), task.render)

    result = _answer_questions(args, evaluator, questions, train_questions, convention)
    if not args.shots:  # the prefix "paper, " of some tasks means: as in the GPT-2 paper, which uses no shots
        result.convention = f"{task.convention_prefix}{result.convention}"
    return result


def run_classify(args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Classify the rows of a table. --template gives the contexts, and the words of --labels are the choices."""
    words = dict(pair.partition("=")[::2] for pair in args.labels.split(","))
    if len(words) < 2 or not all(words.values()):
        raise ValueError(f"--labels {args.labels}: expected at least two pairs VALUE=WORD, separated by commas")
    render = classification(args.template, args.label_field, words)
    questions = make_questions(str(args.file), read_table(args.file), render)

    def train_questions() -> list[Question]:
        if args.train_file is None:
            raise ValueError("--shots needs examples: give --train-file, or --shots-from evaluated")
        return make_questions(str(args.train_file), read_table(args.train_file), render)

    convention: Convention = args.convention or "harness"
    return _answer_questions(args, evaluator, questions, train_questions, convention)


def _answer_questions(
    args: argparse.Namespace,
    evaluator: Evaluator,
    questions: list[Question],
    train_questions: Callable[[], list[Question]],
    convention: Convention,
) -> TaskResult:
    label: str = convention
    asked = questions[: args.limit]
    if args.shots:
        from_evaluated = args.shots_from == "evaluated"
        try:
            pool = questions if from_evaluated else train_questions()
        except OSError as error:
            raise OSError(
                f"{error}; to take the examples from the evaluated rows, use --shots-from evaluated"
            ) from error
        asked = with_shots(asked, pool, args.shots, args.seed, leave_one_out=from_evaluated)
        label += f", {args.shots} shots from {args.shots_from}, seed {args.seed}"
    answers = answer(asked, evaluator.tokenizer, evaluator.score, convention)
    metrics = {
        "acc": mean_and_stderr(answers.choice == answers.gold),
        "acc_norm": mean_and_stderr(answers.choice_norm == answers.gold),
    }
    if answers.bits_per_byte is None:
        _report_dropped_text(evaluator)
    else:
        metrics["bits_per_byte"] = mean_and_stderr(answers.bits_per_byte)
    columns = (answers.gold.tolist(), answers.choice.tolist(), answers.choice_norm.tolist(), answers.scores)
    names = ("gold", "choice", "choice_norm", "scores")
    examples = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return TaskResult(label, metrics, len(asked), examples)


def run_lambada(name: str, args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Evaluate `lambada` or `lambada_openai`."""
    texts = lambada.load_openai_passages() if name == "lambada_openai" else lambada.read_passages()
    words = lambada.score_last_words(texts[: args.limit], evaluator.tokenizer, evaluator.score)
    # In the file of --examples, choice 0 is the correct word, and -1 stands for any other word.
    choices = [0 if correct else -1 for correct in words.correct]
    examples = [
        {"gold": 0, "choice": choice, "choice_norm": choice, "scores": [log_prob]}
        for choice, log_prob in zip(choices, words.log_probs.tolist(), strict=True)
    ]
    return TaskResult("harness", lambada.lambada_metrics(words), len(choices), examples)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity and loss


def run_perplexity(args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Compute the perplexity of a text file, or of the validation split of a dataset."""
    if args.text is not None:
        text = read_text(args.text)
        return _slide(args, evaluator, evaluator.tokenizer.encode(text), text, len(text.split()))
    split, dataset_tokenizer = _open_validation(args.data)
    tokens = _encode_split(split, dataset_tokenizer, evaluator.tokenizer, args.tokens or VALIDATION_TOKENS)
    starts_with_eot = tokens[0] == evaluator.tokenizer.eot  # `SlidingWindows` adds this end-of-text itself
    return _slide(args, evaluator, tokens[int(starts_with_eot) :], None, 0)


def run_corpus(name: str, args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Compute the perplexity of a corpus of the GPT-2 paper."""
    corpus = CORPORA[name]
    raw = read_text(args.text) if args.text is not None else corpus.load()
    text = corpus.detokenize(raw)
    result = _slide(args, evaluator, evaluator.tokenizer.encode(text), text, len(raw.split()))
    result.convention = f"{corpus.convention}{result.convention}"
    return result


def _slide(
    args: argparse.Namespace, evaluator: Evaluator, tokens: list[int], text: str | None, n_words: int
) -> TaskResult:
    """Compute the perplexity of `tokens`.

    `text` is the text of the tokens, or None if the text is not known. `n_words` is the number of words that the text
    had before detokenization; it is ignored if `text` is None.

    If the tokenizer does not represent all of the text, there is no metric per byte or per word, because the bytes and
    words would include text that was not scored.
    """
    block_size = evaluator.model.config.block_size
    stride = args.stride or max(1, block_size // 2)
    covered = tokens if args.limit is None else tokens[: args.limit * stride]
    if text is not None and evaluator.tokenizer.decode(tokens) != text:
        _report_dropped_text(evaluator)
        n_bytes = n_words = 0
    elif text is None or len(covered) < len(tokens):
        documents = [evaluator.tokenizer.decode(part) for part in _documents(covered, evaluator.tokenizer.eot)]
        n_bytes = sum(len(document.encode()) for document in documents)
        # With --limit, the words before detokenization cannot be counted, so there is no metric per word.
        n_words = 0 if text is not None else sum(len(document.split()) for document in documents)
    else:
        n_bytes = len(text.encode())
    result = perplexity(covered, evaluator.tokenizer.eot, block_size, stride, evaluator.score)
    return TaskResult(f"stride {stride}", perplexity_metrics(result, n_bytes, n_words), result.tokens)


def _report_dropped_text(evaluator: Evaluator) -> None:
    """Report on stderr that the tokenizer does not represent all of the text."""
    if evaluator.processes.is_main:
        print(
            f"{evaluator.name}: decoding the tokens does not give the original text, so there is no figure per byte or "
            "per word",
            file=sys.stderr,
        )


def _documents(tokens: Sequence[int], eot: int) -> Iterator[list[int]]:
    """Yield the tokens of each document. The end-of-text tokens, which separate the documents, are left out."""
    part: list[int] = []
    for token in tokens:
        if token == eot:
            yield part
            part = []
        else:
            part.append(token)
    yield part


def _open_validation(directory: Path) -> tuple[Split, Tokenizer]:
    """Open the validation split of a dataset, and its tokenizer (GPT-2's if the dataset has no tokenizer.json)."""
    split = open_split(directory, "val")
    return split, load_tokenizer(directory if (directory / "tokenizer.json").is_file() else "gpt2")


def _encode_split(split: Split, dataset_tokenizer: Tokenizer, tokenizer: Any, limit: int) -> list[int]:
    """Return the first `limit` + 1 tokens of a split: `limit` targets and the input before the first target.

    If `tokenizer` is not that of the dataset, the text of these tokens is encoded again with `tokenizer`.
    """
    read = np.empty(min(limit + 1, split.n_tokens), np.uint16)
    split.read(0, read)
    tokens: list[int] = read.tolist()
    if dataset_tokenizer == tokenizer:
        return tokens
    encoded: list[int] = []
    for document in _documents(tokens, dataset_tokenizer.eot):
        if document:
            encoded += [tokenizer.eot, *tokenizer.encode(dataset_tokenizer.decode(document))]
    return encoded


def run_loss(args: argparse.Namespace, evaluator: Evaluator) -> TaskResult:
    """Compute the loss on the validation split of a dataset in the same way as training does."""
    if not isinstance(evaluator.model, GPT):
        raise ValueError("--tasks loss supports GPT-2 models only: for other models use --tasks perplexity --data")
    if args.document_mask and args.save_reference:
        raise ValueError("--save-reference stores a loss in windows of several documents: omit --document-mask")
    tokenizer, processes = evaluator.tokenizer, evaluator.processes
    sequence_length = min(1024, evaluator.model.config.block_size)
    split, dataset_tokenizer = _open_validation(args.data)
    limit = min(args.tokens or VALIDATION_TOKENS, (args.limit or VALIDATION_TOKENS) * sequence_length)
    windows: Windows
    if dataset_tokenizer == tokenizer:
        eot = tokenizer.eot if args.document_mask else None
        windows = TokenWindows(split, sequence_length, tokenizer.vocab_size, tokens=limit, mask_eot=eot)
    elif args.document_mask:
        raise ValueError(f"--document-mask needs a dataset with the model's tokenizer, and {args.data} has another")
    else:
        tokens = np.array(_encode_split(split, dataset_tokenizer, tokenizer, limit))
        windows = ArrayWindows(tokens, sequence_length, f"the validation split of {args.data}")
    with processes.autocast():
        result = split_loss(
            evaluator.model,
            windows,
            tokenizer.token_bytes(),
            micro_batch=evaluator.batch_size,
            rank=processes.rank,
            world_size=processes.world_size,
            reduce=processes.all_reduce_sum,
        )
    if args.save_reference and processes.is_main:
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens}
        save_reference(args.data, evaluator.name, values | {"tokenizer": tokenizer.kind})
    metrics = {"loss": (result.loss, None), "bits_per_byte": (result.bits_per_byte, None)}
    masked = ", documents by themselves" if args.document_mask else ""
    return TaskResult(f"windows of {sequence_length}, {tokenizer.kind} tokens{masked}", metrics, result.tokens)
