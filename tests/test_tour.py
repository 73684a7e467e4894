"""docs/tour.ipynb: the stored outputs, and an execution of all cells."""

import json
import random
import re
from pathlib import Path

import pytest

from data.prepare.__main__ import main as prepare_data

pytest.importorskip("ipykernel", reason="ipykernel is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
script = pytest.importorskip("scripts.tour", reason="nbclient is not installed")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(script.TOUR, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def check_execution(notebook):
    """Fail unless all code cells were executed in this order, as they are stored, without errors and warnings."""
    changed = notebook.metadata.get("executed_sources") != script.hash_sources(notebook)
    assert not changed, "the code has changed since the outputs were stored: run `python -m scripts.tour`"
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    assert not any(output.output_type == "error" for output in outputs(notebook))
    on_stderr = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not [text for text in on_stderr if not text.startswith("loaded ")]  # the name of the checkpoint


def test_the_stored_outputs_are_those_of_the_stored_code(tour):
    nbformat.validate(tour)
    check_execution(tour)


def test_the_stored_notebook_is_small_and_tells_nothing_about_the_machine(tour):
    assert script.TOUR.stat().st_size < 500_000
    assert set(tour.metadata) == {"kernelspec", "language_info", "executed_sources"}
    assert not any(cell.metadata for cell in tour.cells)
    texts = [out.text if "text" in out else out.data.get("text/plain", "") for out in outputs(tour)]
    assert not re.search(r"/(home|root|tmp|Users)/|\d{4}-\d\d-\d\d|object at 0x", "".join(texts))


def test_each_link_of_the_tour_leads_to_a_heading_or_a_file(tour):
    text = "\n".join(cell.source for cell in tour.cells if cell.cell_type == "markdown")
    anchors = {"#" + heading.replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.*)", text)}
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 10
    assert [t for t in targets if t not in anchors and not (script.TOUR.parent / t).is_file()] == []


NAMES, PLACES = ["ROSALIND", "DUKE", "TOUCHSTONE", "CELIA"], ["Arden", "France", "Kent", "Milan"]
NOUNS, VERBS = ["king", "forest", "father", "sword", "fool", "crown"], ["sees", "loves", "follows", "fears"]
ADJECTIVES = ["old", "noble", "gentle", "sad"]


def scenes(count):
    """Texts with a simple grammar, which a model learns in seconds. It cannot memorize them: the words are random."""
    choice = random.Random(1).choice
    for _ in range(count):
        yield "\n\n".join(
            f"{choice(NAMES)}:\nThe {choice(ADJECTIVES)} {choice(NOUNS)} {choice(VERBS)} the {choice(NOUNS)}\n"
            f"of {choice(PLACES)}, and the {choice(NOUNS)} is {choice(ADJECTIVES)}."
            for _ in range(4)
        )


@pytest.mark.slow
def test_all_cells_run_with_a_small_model(tiny_run, train, tmp_path):
    """The statements of the tour are true for other models than the demo, too."""
    source, data = tmp_path / "scenes.jsonl", tmp_path / "data"
    source.write_text("".join(json.dumps({"text": scene}) + "\n" for scene in scenes(150)), encoding="utf-8")
    prepare_data(["text", str(source), "--out", str(data), "--tokenizer", "bpe:300", "--val-fraction", "0.1"])
    changes = {"data.dir": str(data), "data.sequence_length": 64, "data.batch_tokens": 512, "model.block_size": 64}
    changes |= {"optim.name": "muon", "optim.steps": 120, "optim.schedule": "wsd", "optim.min_lr_ratio": 0.0}
    run = train(tiny_run(**changes))
    check_execution(script.execute(script.TOUR, TOUR_MODEL=str(run), TOUR_DATA=str(data), OMP_NUM_THREADS="1"))


def test_a_notebook_whose_cell_fails_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "failing.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'one is not two'")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(script, "TOUR", path)
    with pytest.raises(SystemExit, match=r"failing.ipynb was not written.*(\n.*)*one is not two"):
        script.main([])
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "runs/shakespeare/checkpoints").is_dir(), reason="`make demo` has not been run here")
def test_all_cells_run_with_the_model_of_the_demo():
    check_execution(script.execute(script.TOUR))
