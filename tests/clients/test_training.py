"""Programs that train a checkpoint of this repository write models that load here again with the same numbers."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from generation import generate_text
from model import GPT
from pretrained import load_model
from tests.clients.conftest import DOCUMENT
from tests.conftest import VERSES

pytestmark = pytest.mark.slow


@pytest.fixture
def rows(checkpoint):
    _, tokenizer, _ = load_model(str(checkpoint("bpe:400")))
    return [{"input_ids": ids, "labels": ids} for ids in (tokenizer.encode(verse)[:20] for verse in VERSES[:16])]


def test_transformers_trainer_continues_from_a_checkpoint(checkpoint, rows, tmp_path, largest_difference):
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from transformers import Trainer, TrainingArguments

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint("bpe:400"))
    ids = torch.tensor([row["input_ids"] for row in rows])
    before = GPT.from_pretrained(checkpoint("bpe:400"))(ids, labels=ids).loss
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=20,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        seed=0,
    )
    trainer = Trainer(theirs, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    ours = GPT.from_pretrained(tmp_path / "after")
    largest_difference(ours(ids).logits, theirs.eval()(ids).logits.detach())
    assert ours(ids, labels=ids).loss < before - 0.5


def test_the_documented_recipe_of_peft_gives_a_model_that_loads_here(
    checkpoint, tmp_path, monkeypatch, largest_difference
):
    pytest.importorskip("peft", reason="pip install peft")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    recipe = re.search(r"```python\n(.*?peft.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "lines.txt").write_text("\n".join(verse.replace("\n", " ") for verse in VERSES))
    recipe = recipe.replace("runs/mine/checkpoints/step-001000", str(checkpoint("bpe:400")))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(recipe, scope)
    adapted, merged = scope["model"].eval(), GPT.from_pretrained(tmp_path / "merged")
    before = GPT.from_pretrained(checkpoint("bpe:400"))
    ids = torch.tensor([scope["tokenizer"](VERSES[0])["input_ids"]])
    largest_difference(merged(ids).logits, adapted(ids).logits.detach())
    assert merged(ids, labels=ids).loss < before(ids, labels=ids).loss - 0.1
    model, tokenizer, _ = load_model(str(tmp_path / "merged"))
    assert generate_text(model, tokenizer, ["The"], max_new_tokens=3)[0].text
