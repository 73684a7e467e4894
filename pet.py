"""Pattern-exploiting training (`classify.py pet`): train a classifier on a few labeled texts and many unlabeled ones.

The method is that of Schick and Schütze 2021, arXiv:2001.07676. A pattern puts a text into a sentence with a blank, and
a word in the blank names the class. cloze.py explains patterns, verbalizers and the letters in shapes.

1. For each pattern, one or more models are trained to fill the blank for the labeled texts, and as language models on
   the unlabeled texts.
2. Together the models assign each unlabeled text a probability for each class (soft labels).
3. A classifier is trained on the unlabeled texts with these probabilities.

iPET (iterated PET) repeats step 1 with a new generation of models. Each new model also learns from unlabeled texts,
which a random subset of the previous generation's models has labeled. Without labeled texts, the first generation is
the pretrained model itself.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from classification import encode, fit, load_classifier, predict, read_column, train, train_step
from cloze import Cloze, Verbalizer, check_pattern, class_scores, make_clozes, read_verbalizer, score_all
from data.loader import IGNORE_INDEX, permute
from data.plain_text import read_escapes
from device import find_dtype, gradient_scaler
from model import GPT
from training.config import Optim
from training.optim import learning_rate_factor, make_optimizers, set_learning_rate

UNLABELED_PER_LABELED = 3  # unlabeled texts for each labeled text in a step, as in the paper
PART_OF_OTHERS = 0.25  # iPET: of the models for other patterns, the fraction that labels texts for a new model
GROWTH = 5  # iPET: the factor by which the number of labeled texts grows with each generation
FIRST_PSEUDO_LABELS = 10  # iPET without labeled texts: number of texts per class that generation 2 is trained on


class Member(NamedTuple):
    """What is kept of a model of the ensemble: the index of its pattern, and its scores of N unlabeled texts."""

    pattern: int
    scores: Tensor  # (N, K)


class Labeled(NamedTuple):
    """Labeled texts for one pattern: the cloze of each text, and the index of the text's class."""

    clozes: list[Cloze]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    """The inputs that all models of an ensemble share. `train`, `unlabeled` and `val` have one element per pattern."""

    base: GPT  # the pretrained model, which is copied for each model of the ensemble
    verbalizer: Verbalizer
    train: list[Labeled]  # without --train, no element has any texts
    unlabeled: list[list[Cloze]]
    val: list[Labeled]
    unlabeled_tokens: list[list[int]]  # tokens of each unlabeled text alone, for the language-modeling loss
    dtype: torch.dtype
    args: argparse.Namespace

    def score(self, model: GPT, clozes: list[Cloze]) -> Tensor:
        """Return the scores (N, K), on the CPU, of N texts. Each text is given as a cloze."""
        return score_all(model, clozes, self.verbalizer, self.args.batch_size, self.dtype)


def run(args: argparse.Namespace) -> None:
    """Train the ensemble and then the classifier, and write the classifier to --out."""
    verbalizer = read_verbalizer(args.verbalizer)
    unlabeled = read_column(args.unlabeled, args.text_key)
    val_texts, val_labels = read_labeled(args, args.val, verbalizer)
    task = make_task(args, verbalizer, unlabeled, val_texts, val_labels)
    args.out.mkdir(parents=True, exist_ok=True)  # if --out cannot be created, fail before the training
    probabilities = label_texts(task)
    # Loading a new classifier sets the seed, so this training uses the same random numbers as `classify.py train`.
    classifier, tokenizer = load_classifier(args, verbalizer.classes)
    train_examples = encode(unlabeled, probabilities.tolist(), tokenizer, classifier.max_length)
    val_examples = encode(val_texts, val_labels, tokenizer, classifier.max_length)
    fit(classifier, tokenizer, train_examples, val_examples, args)


def make_task(
    args: argparse.Namespace,
    verbalizer: Verbalizer,
    unlabeled: Sequence[str],
    val_texts: Sequence[str],
    val_labels: list[int],
) -> Task:
    """Load the model, and fill all texts into the patterns.

    Raises ValueError if a pattern cannot be used, a text's class has no word, or the model is not causal.
    """
    patterns = [read_escapes(pattern) for pattern in args.pattern]
    for pattern in patterns:
        check_pattern(pattern)
    train_texts, train_labels = read_labeled(args, args.train, verbalizer) if args.train else ([], [])
    classifier, tokenizer = load_classifier(args, verbalizer.classes)
    if not classifier.gpt.config.causal:
        raise ValueError(f"{args.model} is not causal: pattern-exploiting training needs a language model")
    length = classifier.max_length

    def fill(texts: Sequence[str]) -> list[list[Cloze]]:
        return [make_clozes(texts, pattern, verbalizer.words, tokenizer, length) for pattern in patterns]

    return Task(
        base=classifier.gpt,
        verbalizer=verbalizer,
        train=[Labeled(clozes, train_labels) for clozes in fill(train_texts)],
        unlabeled=fill(unlabeled),
        val=[Labeled(clozes, val_labels) for clozes in fill(val_texts)],
        unlabeled_tokens=[[tokenizer.eot, *tokenizer.encode(text)][:length] for text in unlabeled],
        dtype=find_dtype(args.dtype, classifier.score.weight.device),
        args=args,
    )


def read_labeled(args: argparse.Namespace, path: Path, verbalizer: Verbalizer) -> tuple[list[str], list[int]]:
    """Return the texts of a file and the indices of their classes.

    Raises ValueError if the file has a class that the verbalizer lacks.
    """
    names = read_column(path, args.label_key)
    if unknown := sorted(set(names) - set(verbalizer.classes)):
        raise ValueError(
            f"{path} has classes without a word: {', '.join(unknown)}; name one with --verbalizer WORD={unknown[0]}"
        )
    return read_column(path, args.text_key), [verbalizer.classes.index(name) for name in names]


def label_texts(task: Task) -> Tensor:
    """Train all generations of the ensemble, and return the class probabilities of the unlabeled texts (N, K)."""
    weights, ensemble = first_generation(task)
    for generation in range(1, task.args.generations + 1):
        # Without labeled texts, the first generation is the pretrained model itself and is not trained.
        if generation > 1 or task.train[0].labels:
            ensemble = train_generation(task, ensemble, weights, generation)
    return soft_labels([m.scores for m in ensemble], [weights[m.pattern] for m in ensemble], task.args.temperature)


def first_generation(task: Task) -> tuple[list[float], list[Member]]:
    """Return the weight of each pattern, and an ensemble whose only member for each pattern is the pretrained model.

    A pattern's weight is the accuracy of the pretrained model on the labeled texts in this pattern. Without labeled
    texts, each weight is 1.
    """
    weights, ensemble = [], []
    for i, labeled in enumerate(task.train):
        accuracy = measure(task, task.base, labeled) if labeled.labels else 1.0
        weights.append(accuracy)
        ensemble.append(Member(i, task.score(task.base, task.unlabeled[i])))
        on_train = f"accuracy {accuracy:.4f} on the labeled texts, " if labeled.labels else ""
        on_val = measure(task, task.base, task.val[i])
        print(f"pattern {i + 1}, before training: {on_train}{on_val:.4f} on the validation texts")
    return weights, ensemble


def measure(task: Task, model: GPT, labeled: Labeled) -> float:
    """Return the accuracy: the fraction of texts whose true class has the highest score."""
    chosen = task.score(model, labeled.clozes).argmax(dim=-1)
    return float((chosen == torch.tensor(labeled.labels)).double().mean())


def soft_labels(scores: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Return the combined probabilities (N, K) of models: softmax(weighted mean of their scores / temperature).

    Args:
        scores: one tensor (N, K) for each model.
        weights: one number for each model. If all of them are 0, the models have equal weights.
    """
    if not any(weights):
        weights = [1.0] * len(scores)
    mean = torch.stack([score * weight for score, weight in zip(scores, weights, strict=True)]).sum(dim=0)
    return (mean / (sum(weights) * temperature)).softmax(dim=-1)


def train_generation(task: Task, previous: list[Member], weights: list[float], generation: int) -> list[Member]:
    """Train one or more models with different seeds for each pattern, and return a Member for each model.

    From generation 2 on, the labeled texts also include unlabeled texts that members of `previous` have labeled.
    """
    ensemble = []
    for i in range(len(task.train) * task.args.models_per_pattern):
        pattern = i // task.args.models_per_pattern
        seed = task.args.seed + 1000 * generation + i
        labeled = task.train[pattern]
        if generation > 1:
            others = [member for member in previous if member.pattern != pattern] or previous
            chosen = pseudo_label(others, weights, labeled.labels, task.verbalizer, generation, seed)
            labeled = Labeled(
                labeled.clozes + [task.unlabeled[pattern][index] for index in chosen],
                labeled.labels + list(chosen.values()),
            )
        model = train_model(task, labeled, seed)
        ensemble.append(Member(pattern, task.score(model, task.unlabeled[pattern])))
        print(
            f"generation {generation}, pattern {pattern + 1}, seed {seed}: {len(labeled.labels):,} labeled texts, "
            f"accuracy {measure(task, model, task.val[pattern]):.4f} on the validation texts"
        )
    return ensemble


def pseudo_label(
    others: Sequence[Member],
    weights: Sequence[float],
    labels: Sequence[int],
    verbalizer: Verbalizer,
    generation: int,
    seed: int,
) -> dict[int, int]:
    """Choose unlabeled texts for a new model, and label them (iPET). Return {index of text: class}.

    A random fraction (PART_OF_OTHERS) of `others` labels the texts. `others` are models of the previous generation.
    `weights` has a weight for each pattern. `labels` are the classes of the texts in --train. With each generation, the
    number of labeled texts grows by the factor GROWTH, and the classes keep the proportions that they have in `labels`.
    Without --train, all classes get the same number of texts. The texts of a class are drawn at random from those that
    the models assign to this class. Texts about which the models are more certain are more likely to be drawn.
    """
    rng = np.random.default_rng(seed)
    size = max(1, round(PART_OF_OTHERS * len(others)))
    asked = [others[i] for i in rng.choice(len(others), size, replace=False)]
    probabilities = soft_labels([m.scores for m in asked], [weights[m.pattern] for m in asked], 1.0)
    certainty, predicted = (values.numpy() for values in probabilities.double().max(dim=-1))
    chosen: dict[int, int] = {}
    for label in range(len(verbalizer.classes)):
        if labels:
            wanted = labels.count(label) * (GROWTH ** (generation - 1) - 1)
        else:
            wanted = FIRST_PSEUDO_LABELS * GROWTH ** (generation - 2)
        places = np.flatnonzero(predicted == label)
        if len(places) > wanted:
            weight = certainty[places]
            places = rng.choice(places, wanted, replace=False, p=weight / weight.sum())
        chosen |= dict.fromkeys(places.tolist(), label)
    return chosen


def train_model(task: Task, labeled: Labeled, seed: int) -> GPT:
    """Fine-tune the pretrained model to fill the blanks of `labeled`, and as a language model on unlabeled texts."""
    args, n = task.args, len(labeled.labels)
    torch.manual_seed(seed)
    model = copy.deepcopy(task.base).train()
    steps_per_epoch = math.ceil(n / args.batch_size)
    steps = args.pattern_epochs * steps_per_epoch
    optim = Optim(lr=args.lr, warmup_steps=steps // 10, steps=steps, min_lr_ratio=0.0)
    device = model.transformer.wte.weight.device
    optimizers, scaler = make_optimizers(model, optim), gradient_scaler(device, task.dtype)
    for step in tqdm(range(steps), desc="pattern", leave=False, disable=None, unit="step"):
        epoch, place = divmod(step, steps_per_epoch)
        batch = permute(np.arange(n), n, seed, epoch)[place * args.batch_size : (place + 1) * args.batch_size]
        n_unlabeled = UNLABELED_PER_LABELED * args.batch_size
        texts = draw(task.unlabeled_tokens, step * n_unlabeled, n_unlabeled, seed)
        set_learning_rate(optimizers, learning_rate_factor(step, optim))
        clozes, labels = [labeled.clozes[i] for i in batch], [labeled.labels[i] for i in batch]
        compute_loss = partial(pattern_loss, model, clozes, labels, texts, task.verbalizer, args.alpha)
        train_step(model, compute_loss, optimizers, scaler, task.dtype, optim.grad_clip)
    return model


def draw(texts: Sequence[list[int]], start: int, count: int, seed: int) -> list[list[int]]:
    """Return the texts at the places start .. start + count - 1 of an endless sequence.

    The sequence consists of epochs. Each epoch has all texts, in a random order that depends only on `seed` and on the
    number of the epoch.
    """
    n = len(texts)
    return [texts[int(permute(np.array([i % n]), n, seed, i // n)[0])] for i in range(start, start + count)]


def pattern_loss(
    model: GPT,
    clozes: Sequence[Cloze],
    labels: Sequence[int],
    texts: Sequence[list[int]],
    verbalizer: Verbalizer,
    alpha: float,
) -> Tensor:
    """Return (1 - alpha) * cross-entropy of the classes + alpha * language-modeling loss on `texts`, as a tensor ()."""
    scores = class_scores(model, clozes, verbalizer)
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor(labels, device=scores.device))
    if alpha == 0:
        return loss
    rows = [torch.tensor(tokens) for tokens in texts]
    ids = pad_sequence(rows, batch_first=True).to(scores.device)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORE_INDEX).to(scores.device)
    return (1 - alpha) * loss + alpha * model(ids[:, :-1], targets=targets).loss


COMMANDS = {"train": train, "predict": predict, "pet": run}  # classify.py calls these functions
