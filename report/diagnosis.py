"""Run all checks of report/doctor.py: on the curves (report/symptoms.py), the checkpoints and the dataset of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints import list_checkpoints
from data.shards import TOKEN, Split, open_split
from data.tokenizer import Tokenizer, load_tokenizer
from report.run_log import read_run_log
from report.symptoms import CHECKS, Curves, Finding, find_curves
from training.run_directory import RunDirectory
from weights import open_model, read_tensors

# `shared_text` reads at most this many tokens of the training split, and a tenth as many of the validation split.
READ_TOKENS = 10_000_000
PASSAGE = 32  # tokens in a passage that `shared_text` searches for
SAMPLE_TOKENS = 4096  # number of tokens that the function `encoding` decodes and encodes again


def diagnose(directory: Path) -> list[Finding]:
    """Return what the checks found in a run: problems first, then notes.

    Raises FileNotFoundError if the directory has no metrics.jsonl, ValueError if the run has too few steps or a
    damaged file.
    """
    log = read_run_log(directory, directory.name)
    checkpoints = list_checkpoints(RunDirectory(directory).checkpoints)
    model = open_model(checkpoints[-1]).config_arguments() if checkpoints else {}
    curves = find_curves(log, model.get("vocab_size"), model.get("n_embd"))
    findings = [finding for check in CHECKS if (finding := check(curves))]
    if frozen := frozen_weights(checkpoints, curves.config.get("model", {}).get("freeze_layers", 0)):
        findings.append(frozen)
    findings += dataset_findings(curves.config)
    findings += beside_references(curves, log.reference_losses)
    return sorted(findings, key=lambda finding: not finding.problem)


def frozen_weights(checkpoints: list[Path], freeze_layers: int) -> Finding | None:
    """Look for matrices that are bitwise equal in the first and the last of the checkpoints that still exist.

    Vectors are not compared: late in a healthy run, an update can be too small to change a LayerNorm weight near 1.
    """
    if len(checkpoints) < 2 or freeze_layers:  # with model.freeze_layers, equal weights are intended
        return None
    first, last = checkpoints[0], checkpoints[-1]
    pairs = zip(read_tensors(first), read_tensors(last), strict=True)
    equal = {name: torch.equal(before, after) for (name, before), (_, after) in pairs if before.dim() > 1}
    frozen = sorted(name for name in equal if equal[name])
    if not frozen:
        return None
    shown = ", ".join(frozen[:3]) + (", ..." if len(frozen) > 3 else "")
    return Finding(
        "weights do not change",
        f"{len(frozen)} of {len(equal)} matrices are equal in {first.name} and {last.name}: {shown}",
        "check that the optimizer has these parameters, that they have a gradient, and the learning rate",
    )


def dataset_findings(config: dict[str, Any]) -> list[Finding]:
    """Return the findings on the token shards of a run, for each dataset if the run has a mixture.

    Datasets of prompts and completions are not checked.
    """
    data = config.get("data", {})
    if data.get("format", "tokens") != "tokens":
        return []
    trained = config.get("optim", {}).get("steps", 0) * data.get("batch_tokens", 0)
    if mixture := data.get("mixture"):
        total = sum(part["weight"] for part in mixture)
        parts = {part["dir"]: trained * part["weight"] / total for part in mixture}
    else:
        parts = {data["dir"]: trained} if data.get("dir") else {}
    return [finding for directory, tokens in parts.items() for finding in one_dataset(Path(directory), tokens)]


def one_dataset(directory: Path, trained: float) -> list[Finding]:
    """Return the findings on one dataset. The whole run reads `trained` tokens of it, repetitions included."""
    try:
        train, val = open_split(directory, "train"), open_split(directory, "val")
        tokenizer = load_tokenizer(directory if train.meta else "gpt2")
    except OSError as error:  # for example, there is no such directory, or no validation split
        return [Finding("the dataset was not checked", str(error), problem=False)]
    except ValueError as error:
        return [Finding("the dataset is damaged", str(error))]
    found = [encoding(train, tokenizer), shared_text(train, val)]
    if (epochs := trained / train.n_tokens) > 4:
        evidence = f"{epochs:.1f} epochs of {train.n_tokens:,} tokens"
        advice = "more than four epochs teach little (Muennighoff et al. 2023): use more text or fewer steps"
        found.append(Finding("the text is repeated often", evidence, advice, problem=False))
    return [finding._replace(evidence=f"{directory}: {finding.evidence}") for finding in found if finding]


def encoding(split: Split, tokenizer: Tokenizer) -> Finding | None:
    """Check whether the split was encoded with this tokenizer: decode a sample of tokens, and encode the text again.

    If it was not, a token is outside the vocabulary, or the number of tokens usually changes.
    """
    tokens = np.empty(min(SAMPLE_TOKENS, split.n_tokens), TOKEN)
    split.read((split.n_tokens - len(tokens)) // 2, tokens)
    if int(tokens.max()) >= tokenizer.vocab_size:
        evidence = f"token {tokens.max()} in a vocabulary of {tokenizer.vocab_size:,}"
        return Finding("the data was encoded with another tokenizer", evidence, "prepare the text again")
    tokens = tokens[tokens != tokenizer.eot]
    again, expected = tokenizer.encode(tokenizer.decode(tokens.tolist())), len(tokens)
    if abs(len(again) - expected) <= 0.03 * expected:
        return None
    evidence = f"{expected:,} tokens decode to a text that the tokenizer encodes as {len(again):,} tokens"
    return Finding("the data was encoded with another tokenizer, or is not text", evidence, "prepare the text again")


def shared_text(train: Split, val: Split) -> Finding | None:
    """Look for passages of the validation split in the training split. Only the beginning of each split is read."""
    n_train, n_val = min(READ_TOKENS, train.n_tokens), min(READ_TOKENS // 10, val.n_tokens)
    tokens, held_out = np.empty(n_train, TOKEN), np.empty(n_val, TOKEN)
    train.read(0, tokens)
    val.read(0, held_out)
    if min(n_train, n_val) < PASSAGE:
        return None
    passages = np.unique(passage_hashes(held_out)[::PASSAGE])
    common = float(np.isin(passages, passage_hashes(tokens)).mean())
    if common < 0.05:
        return None
    evidence = f"{common:.0%} of the validation passages of {PASSAGE} tokens are also in the training text"
    return Finding(
        "the validation text is part of the training text", evidence, "prepare the text again, without copies"
    )


def passage_hashes(tokens: np.ndarray) -> np.ndarray:
    """Return a hash of each passage of PASSAGE tokens, (n,) uint16 -> (n - PASSAGE + 1,) uint64.

    Each hash is the value of a polynomial, modulo 2^64. The tokens of the passage are its coefficients.
    """
    n = len(tokens) - PASSAGE + 1
    hashes = np.zeros(n, np.uint64)
    for i in range(PASSAGE):
        hashes *= np.uint64(6364136223846793005)
        hashes += tokens[i : i + n]
    return hashes


def beside_references(curves: Curves, references: list[tuple[str, float]]) -> list[Finding]:
    """Return a note with the last validation loss and those of other models on the same text; [] if there are none."""
    others = ", ".join(f"{name} {loss:.4f}" for name, loss in references)
    if not others or not len(curves.val["loss"]):
        return []
    return [Finding("beside other models", f"validation loss {curves.val['loss'][-1]:.4f}; {others}", problem=False)]
