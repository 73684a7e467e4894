"""HellaSwag against a slow implementation of its two conventions, and against lm-evaluation-harness itself."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.tokenizer import load_tokenizer
from eval.choices import answer
from eval.hellaswag import RENDERERS, completion, harness, hellaswag, read_questions
from eval.likelihood import log_likelihoods
from eval.rows import read_rows
from model import GPT, GPTConfig
from pretrained import resolve_model

SPREAD = range(0, 10042, 20)  # 503 rows of both sources, ActivityNet and WikiHow


def make_model(n_embd=32, n_layer=2):
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=256, n_layer=n_layer, n_head=2, n_embd=n_embd)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_the_data_is_the_complete_validation_set():
    rows = read_rows("hellaswag/none/validation")
    assert len(rows) == 10042
    assert rows[0]["ctx"] == "A man is sitting on a roof. he"
    golds = np.bincount([int(row["label"]) for row in rows])
    assert golds.tolist() == [2515, 2485, 2584, 2458]


def test_the_conventions_render_a_row_differently():
    row = {
        "activity_label": "Clean and jerk",
        "ctx_a": "[header] How to lift [title] Stand up.",
        "ctx_b": "the man",
        "ctx": "[header] How to lift [title] Stand up. the man",
        "endings": [" lifts [step] the  bar. [substeps] Now."],
        "label": "0",
    }
    assert completion(row).contexts == ("[header] How to lift [title] Stand up. the man",)
    assert completion(row).choices == (" lifts [step] the  bar. [substeps] Now.",)
    assert harness(row).contexts == ("Clean and jerk: How to lift. Stand up. The man",)
    assert harness(row).choices == ("lifts the bar. Now.",)


# ---------------------------------------------------------------------------------------------------------------------
# (a) An independent slow implementation: one ending at a time, without padding


def slow_completion(row):
    """build-nanogpt: encode the context and a space with the ending separately; take the mean loss of the ending."""
    return [(row["ctx"], " " + ending, None) for ending in row["endings"]]


def slow_harness(row):
    """lm-evaluation-harness: encode preprocess(activity_label + ": " + ctx_a + " " + ctx_b.capitalize()) and ending."""

    def preprocess(text):
        text = text.strip()
        text = text.replace(" [title]", ". ")
        text = re.sub("\\[.*?\\]", "", text)
        return text.replace("  ", " ")

    context = preprocess(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    return [(context, " " + preprocess(ending), len(preprocess(ending))) for ending in row["endings"]]


@torch.no_grad()
def slow_choices(model, tokenizer, row, convention):
    totals, norms = [], []
    for context, ending, n_characters in (slow_completion if convention == "completion" else slow_harness)(row):
        if convention == "completion":
            context_ids, ending_ids = tokenizer.encode(context), tokenizer.encode(ending)
        else:
            context_ids = tokenizer.encode(context)
            ending_ids = tokenizer.encode(context + ending)[len(context_ids) :]
        ids = torch.tensor([context_ids + ending_ids])
        logits = model(ids[:, :-1], logits_to_keep=len(ending_ids)).logits[0]
        total = -float(F.cross_entropy(logits, torch.tensor(ending_ids), reduction="sum"))
        totals.append(total)
        norms.append(total / (n_characters or len(ending_ids)))
    return totals, int(np.argmax(totals)), int(np.argmax(norms))


@pytest.mark.parametrize("rows_chosen", [SPREAD[::12], pytest.param(SPREAD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("convention", ["completion", "harness"])
def test_choices_match_the_slow_implementation(model, tokenizer, convention, rows_chosen):
    rows = read_rows("hellaswag/none/validation")
    questions = read_questions(convention)
    answers = answer(
        [questions[i] for i in rows_chosen], tokenizer, lambda requests: log_likelihoods(model, requests), convention
    )
    expected = [slow_choices(model, tokenizer, rows[i], convention) for i in rows_chosen]
    np.testing.assert_allclose(np.array(answers.scores), [totals for totals, _, _ in expected], rtol=1e-5)
    assert answers.choice.tolist() == [choice for _, choice, _ in expected]
    assert answers.choice_norm.tolist() == [choice for _, _, choice in expected]
    assert (answers.choice != answers.choice_norm).any()
    assert answers.gold.tolist() == [int(rows[i]["label"]) for i in rows_chosen]


@pytest.mark.slow
@pytest.mark.skipif(not Path("runs/shakespeare/checkpoints").is_dir(), reason="`make demo` has not been run here")
@pytest.mark.parametrize("convention", ["completion", "harness"])
def test_choices_of_the_demo_model_match_the_slow_implementation(convention):
    directory = resolve_model("runs/shakespeare")
    demo, demo_tokenizer = GPT.from_pretrained(directory), load_tokenizer(directory)
    questions = read_questions(convention)

    def fits(i):  # the slow implementation does not cut long texts
        texts = (questions[i].contexts[0] + " " + choice for choice in questions[i].choices)
        return max(len(demo_tokenizer.encode(text)) for text in texts) <= demo.config.block_size

    rows = [i for i in range(0, 10042, 16) if fits(i)][:500]
    assert len(rows) == 500
    test_choices_match_the_slow_implementation(demo, demo_tokenizer, convention, rows)


def test_batch_size_and_number_of_processes_do_not_change_the_result(model, tokenizer):
    alone = hellaswag(model, tokenizer, limit=24)
    assert set(alone) == {"convention", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "count"}
    assert alone["count"] == 24
    assert alone["acc_norm_stderr"] == pytest.approx(math.sqrt(alone["acc_norm"] * (1 - alone["acc_norm"]) / 23))
    assert hellaswag(model, tokenizer, limit=24, batch_size=3) == alone
    # Simulate three processes one after another: first collect what each contributes, then return the sum to one.
    parts = []
    for rank in range(3):
        hellaswag(model, tokenizer, limit=24, rank=rank, world_size=3, reduce=lambda t: parts.append(t.clone()))
    total = sum(parts)
    together = hellaswag(model, tokenizer, limit=24, rank=1, world_size=3, reduce=lambda t: t.copy_(total))
    assert together == alone


def test_the_tokenizer_of_another_model_is_refused(tokenizer):
    small = GPT(GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="they do not belong together"):
        hellaswag(small, tokenizer, limit=1)


# ---------------------------------------------------------------------------------------------------------------------
# (b) lm-evaluation-harness itself, if it is installed


def harness_choices(directory, rows):
    """Score the choices of each row with the preprocessing, tokenization, batching and model class of lm_eval."""
    import datasets
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    lm = HFLM(pretrained=str(directory), tokenizer=str(directory), device="cpu", dtype="float32", batch_size=8)
    docs = process_docs(datasets.Dataset.from_list(rows))
    instances = [
        Instance("loglikelihood", doc, (doc["query"], " " + choice), i)
        for doc in docs
        for i, choice in enumerate(doc["choices"])
    ]
    scores = np.array([total for total, _ in lm.loglikelihood(instances, disable_tqdm=True)]).reshape(-1, 4)
    lengths = np.array([[len(choice) for choice in doc["choices"]] for doc in docs], float)
    return scores, scores.argmax(1), (scores / lengths).argmax(1)


@pytest.mark.slow
def test_choices_match_lm_evaluation_harness(model, tokenizer, tmp_path):
    pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed: pip install lm_eval[hf]"
    )
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    rows = read_rows("hellaswag/none/validation")
    scores, choice, choice_norm = harness_choices(tmp_path, [rows[i] for i in SPREAD])
    questions = [RENDERERS["harness"](rows[i]) for i in SPREAD]
    answers = answer(questions, tokenizer, lambda requests: log_likelihoods(model, requests), "harness")
    np.testing.assert_allclose(np.array(answers.scores), scores, rtol=1e-5)
    assert answers.choice.tolist() == choice.tolist()
    assert answers.choice_norm.tolist() == choice_norm.tolist()


LOCAL_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_lm_evaluation_harness_loads_a_checkpoint(model, tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval[hf]")
    from lm_eval.tasks import TaskManager

    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    questions = [read_questions("harness")[i] for i in SPREAD[::25]]
    rows = [{"query": q.contexts[0], "choices": q.choices, "gold": q.gold} for q in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = LOCAL_TASK.replace("FILE", str(tmp_path / "rows.jsonl"))
    (tmp_path / "local_choice.yaml").write_text(task, encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]["local_choice"]
    answers = answer(questions, tokenizer, lambda requests: log_likelihoods(model, requests), "harness")
    assert found["acc,none"] == pytest.approx((answers.choice == answers.gold).mean())
    assert found["acc_norm,none"] == pytest.approx((answers.choice_norm == answers.gold).mean())
