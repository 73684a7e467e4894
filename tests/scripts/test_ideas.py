"""Ideas change what a run learns, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import train as train_module
from checkpoints import MANIFEST, STATE
from files import file_sha256
from model import GPT, GPTConfig
from scripts.ideas import IDEAS, Idea, find_idea, polar_express
from training.config import Optim
from training.launch import restored_handlers
from training.optim import make_optimizers, newton_schulz

MUON = {
    "optim.name": "muon",
    "optim.steps": 6,
    "optim.warmup_steps": 1,
    "optim.schedule": "wsd",
    "optim.decay_fraction": 0.6,
    "eval.every": 6,
}


@pytest.fixture
def trained(tiny_run, prepare):
    """`trained("z-loss")`: a TrainingRun after its last step, without an idea for "plain"."""

    def run(name, **changes):
        with restored_handlers(), prepare(tiny_run(name, **MUON | changes)) as prepared:
            idea = (Idea if name == "plain" else find_idea(name))(prepared)
            train_module.train(prepared, train_step=idea.train_step, validate=idea.validate)
        return prepared

    return run


def logged(run, split, field="loss"):
    return [record[field] for record in run.directory.read_metrics() if record["split"] == split]


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_changes_what_is_learned_and_not_how_much_is_read(idea, trained):
    plain, other = trained("plain"), trained(idea)
    assert logged(plain, "val")[-1] != logged(other, "val")[-1]
    assert logged(other, "val")[-1] < logged(other, "val")[0]
    assert logged(plain, "val", "tokens") == logged(other, "val", "tokens")
    assert other.loader.step == plain.loader.step


def test_averaged_takes_the_mean_of_the_steps_whose_rate_decreased(trained, monkeypatch):
    weights = []
    step = train_module.train_step

    def keep(run, *requests):
        result = step(run, *requests)
        weights.append([p.detach().clone() for p in run.model.parameters()])
        return result

    monkeypatch.setattr(train_module, "train_step", keep)
    run = trained("averaged")
    rates = logged(run, "train", "lr")
    last = [i for i in range(1, 6) if rates[i] < rates[i - 1]]
    assert len(last) == 3
    for parameter, *steps in zip(run.model.parameters(), *(weights[i] for i in last), strict=True):
        torch.testing.assert_close(parameter.detach(), torch.stack(steps).mean(dim=0))


def test_each_small_batch_is_a_step(trained):
    halves = trained("small-batches-first", **{"optim.schedule": "constant"})
    steps = logged(halves, "train", "step")
    assert steps == [1, 1, 2, 2, 3, 4, 5, 6]


@pytest.fixture
def first_updates():
    """`first_updates("normuon")`: what a step of Muon with an idea subtracts from weights of 0, by name.

    The idea small-positions does not change Muon, so it stands for Muon without an idea.
    """

    def run(ideas):
        config = Optim(name="muon", muon_lr=1.0, weight_decay=0.5)
        model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=4, n_embd=32))
        prepared = SimpleNamespace(
            model=model, optimizers=make_optimizers(model, config), config=SimpleNamespace(optim=config)
        )
        find_idea(ideas)(prepared)
        weights = dict(model.transformer.h.named_parameters())
        matrices = {name: p for name, p in weights.items() if p.dim() == 2}
        generator = torch.Generator().manual_seed(0)
        for parameter in matrices.values():
            parameter.data.zero_()
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        prepared.optimizers[0].step()
        return {name.removeprefix("0."): -p.detach() for name, p in matrices.items()}

    return run


def test_per_head_orthogonalizes_the_matrices_of_each_head(first_updates):
    plain, changed = first_updates("small-positions"), first_updates("per-head")
    torch.testing.assert_close(changed["mlp.c_fc.weight"], plain["mlp.c_fc.weight"])
    for name, heads in (
        ("attn.c_attn.weight", changed["attn.c_attn.weight"].split(8)),
        ("attn.c_proj.weight", changed["attn.c_proj.weight"].split(8, dim=1)),
    ):
        for head in heads:
            values = torch.linalg.svdvals(head)
            assert 0.6 < values.min() <= values.max() < 1.3, name


def test_normuon_divides_rows_by_the_root_of_their_running_mean_square(first_updates):
    plain, changed = first_updates("small-positions"), first_updates("normuon")
    for name, expected in (
        ("mlp.c_fc.weight", 1 / 128),
        ("mlp.c_proj.weight", 1 / 128),
        ("attn.c_attn.weight", 1 / 32),
    ):
        squares = (plain[name] / max(1, len(plain[name]) / 32 if "mlp" in name else 1) ** 0.5).square()
        average = 0.95 * expected + 0.05 * squares.mean(dim=1, keepdim=True)
        torch.testing.assert_close(changed[name], plain[name] * (expected / average).sqrt())


def test_normuon_by_columns_gives_neurons_updates_of_equal_size(first_updates):
    plain, changed = first_updates("small-positions"), first_updates("normuon-columns")
    for name, dim in (("mlp.c_fc.weight", 1), ("mlp.c_proj.weight", 0), ("attn.c_proj.weight", 1)):
        sizes = changed[name].norm(dim=dim)
        torch.testing.assert_close(sizes, sizes.mean().expand_as(sizes))
        assert plain[name].norm(dim=dim).std() > 0.01
        torch.testing.assert_close(changed[name].norm(), plain[name].norm())


def test_polar_express_moves_singular_values_closer_to_one():
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    errors = [
        (torch.linalg.svdvals(function(matrix[None], torch.float32)[0]) - 1).abs().max()
        for function in (newton_schulz, polar_express)
    ]
    assert errors[1] < 0.15 < 0.3 < errors[0]


def test_the_order_of_combined_ideas_does_not_matter(first_updates):
    first, second = first_updates("per-head+polar-express"), first_updates("polar-express+per-head")
    for name, update in first.items():
        assert torch.equal(update, second[name]), name


def test_ideas_are_combined(trained):
    both, one = trained("per-head+normuon"), trained("per-head")
    assert logged(both, "val")[-1] != logged(one, "val")[-1]
    with pytest.raises(ValueError, match="there is no idea none, normuons: choose from undecayed"):
        find_idea("none+per-head+normuons")


def test_impossible_combinations_are_refused(trained, tiny_run, write_config, python, tmp_path):
    with pytest.raises(ValueError, match=r"raise data\.micro_batch"):
        trained("small-batches-first", **{"data.micro_batch": 4})
    with pytest.raises(ValueError, match=r"optim\.name muon, got adamw"):
        trained("momentum-warm-up", **{"optim.name": "adamw"})
    config = write_config(tiny_run("x", **MUON | {"checkpoint.every": 3}))
    sweep = ("-m", "scripts.sweep", "--config", config, "--dir", tmp_path / "swept", "--idea", "averaged", "--seeds", 1)
    python(*sweep)
    shutil.rmtree(tmp_path / "swept" / "x-averaged-seed_1" / "checkpoints" / "step-000006")
    result = python(*sweep, check=False)
    assert result.returncode == 2
    assert "was stopped at step 3 before the last validation" in result.stderr


def test_a_run_that_was_stopped_in_its_last_validation_is_not_continued(tiny_run, write_config, python, tmp_path):
    """`averaged` would otherwise validate the weights of the last step, because no checkpoint stores their mean."""
    config = write_config(tiny_run("x", **MUON))
    sweep = ("-m", "scripts.sweep", "--config", config, "--dir", tmp_path / "swept", "--idea", "averaged", "--seeds", 1)
    python(*sweep)
    run = tmp_path / "swept" / "x-averaged-seed_1"
    checkpoint = run / "checkpoints" / "step-000006"
    state = json.loads((checkpoint / STATE).read_text()) | {"val_loss": None}
    (checkpoint / STATE).write_text(json.dumps(state))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest[STATE] = {"bytes": (checkpoint / STATE).stat().st_size, "sha256": file_sha256(checkpoint / STATE)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    result = python(*sweep, check=False)
    assert result.returncode == 2
    assert "was stopped at step 6 before the last validation" in result.stderr


def test_ideas_change_initialization_decay_and_momentum(trained):
    plain = trained("plain", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    small = trained("small-positions", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    wpe = [t.model.transformer.wpe.weight.detach() for t in (plain, small)]
    torch.testing.assert_close(wpe[1], wpe[0] / 2, atol=1e-6, rtol=1e-4)
    mimetic = trained("mimetic", **{"optim.lr": 1e-9, "optim.muon_lr": 1e-9})
    group = mimetic.optimizers[-1].param_groups[-1]
    assert (group["peak_lr"], group["weight_decay"]) == (1e-3, 0.0)
    assert [parameter.shape for parameter in group["params"]] == [mimetic.model.transformer.wpe.weight.shape]
    queries, keys, _ = mimetic.model.transformer.h[0].attn.c_attn.weight.detach().chunk(3)
    assert torch.nn.functional.cosine_similarity(queries.flatten(), keys.flatten(), dim=0) > 0.6
    positions = mimetic.model.transformer.wpe.weight.detach() / 0.14
    torch.testing.assert_close(positions[:, 0], torch.arange(len(positions)).float().sin(), atol=0.1, rtol=0)
    groups = trained("undecayed-embeddings").optimizers[-1].param_groups
    assert [group["weight_decay"] for group in groups] == [0, 0]
    muon = trained("momentum-warm-up").optimizers[0].param_groups[0]
    assert 0.85 < muon["momentum"] < 0.95
