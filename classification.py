"""Fine-tune a GPT-2 to classify texts, and classify texts. classify.py checks the arguments and calls this module."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from tqdm import tqdm

from data.loader import permute
from data.tables import read_table
from data.tokenizer import Tokenizer, load_tokenizer
from device import autocast, find_device, find_dtype, gradient_scaler, keep_freed_memory
from heads import SequenceClassifier
from model import GPT
from pretrained import fit_vocabulary, resolve_model
from training.config import Optim
from training.distributed import clip_gradients
from training.optim import learning_rate_factor, make_optimizers, set_learning_rate
from weights import locate


class Example(NamedTuple):
    """The first tokens of a text, and its class."""

    tokens: list[int]
    label: int | list[float]  # index of the class (-1: unknown), or the probability of each class


class Score(NamedTuple):
    """The mean loss over some examples, in nats, and the fraction that was classified correctly."""

    loss: float
    accuracy: float


def read_column(path: Path, key: str) -> list[str]:
    """Return a column of a .csv or .jsonl file as strings. Raises ValueError if a row lacks a value."""
    values = []
    for number, row in enumerate(read_table(path), 1):
        if key not in row:
            raise ValueError(f"{path}, row {number} has no column {key!r}, only {', '.join(map(str, row))}")
        if row[key] in (None, ""):
            raise ValueError(f"{path}, row {number}: column {key!r} is empty")
        values.append(str(row[key]))
    return values


def read_labels(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Return the sorted names of the classes, and the class of each row of --train and of each row of --val.

    Raises ValueError if --train has fewer than two classes, or if --val has a class that --train lacks.
    """
    train_labels = read_column(args.train, args.label_key)
    classes = sorted(set(train_labels))
    if len(classes) < 2:
        raise ValueError(f"{args.train} has only one class, {classes[0]!r}: expected at least two")
    val_labels = read_column(args.val, args.label_key)
    if unknown := sorted(set(val_labels) - set(classes)):
        raise ValueError(f"{args.val} has classes that {args.train} lacks: {', '.join(unknown)}")
    return classes, train_labels, val_labels


def choose_length(args: argparse.Namespace, longest: int) -> int:
    """Return --max-length if it is given, otherwise `longest`, the number of tokens that the model supports.

    Raises ValueError if --max-length is above `longest`.
    """
    if args.max_length and args.max_length > longest:
        raise ValueError(f"--max-length {args.max_length} is above the {longest} tokens that the model supports")
    return args.max_length or longest


def encode(
    texts: Sequence[str], labels: Sequence[int | list[float]], tokenizer: Tokenizer, max_length: int
) -> list[Example]:
    """Tokenize texts. Texts longer than `max_length` tokens are cut; the number of these texts is printed on stderr."""
    tokens = [tokenizer.encode(text) for text in texts]
    if n_cut := sum(len(one) > max_length for one in tokens):
        print(f"{n_cut:,} of {len(texts):,} texts are longer than {max_length} tokens and were cut", file=sys.stderr)
    return [Example(one[:max_length], label) for one, label in zip(tokens, labels, strict=True)]


def batch(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids and attention mask, (B, T), padded on the right, and labels (B,) or probabilities (B, K)."""
    T = max(len(example.tokens) for example in examples)
    ids, mask = torch.zeros(2, len(examples), T, dtype=torch.int64)
    for row, kept, example in zip(ids, mask, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
        kept[: len(example.tokens)] = 1
    return ids.to(device), mask.to(device), torch.tensor([example.label for example in examples], device=device)


def compute_logits(
    classifier: SequenceClassifier, examples: list[Example], batch_size: int, dtype: torch.dtype
) -> Tensor:
    """Return float32 logits (N, K) on the CPU, for N examples and K classes. Leave the classifier in eval mode.

    Each batch holds texts of similar length, so that it needs little padding.
    """
    device = classifier.score.weight.device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    results = torch.empty(len(examples), classifier.num_labels)
    classifier.eval()
    with torch.no_grad(), autocast(device, dtype):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            ids, mask, _ = batch([examples[i] for i in places], device)
            results[places] = classifier(ids, attention_mask=mask).logits.float().cpu()
    return results


def evaluate(classifier: SequenceClassifier, examples: list[Example], batch_size: int, dtype: torch.dtype) -> Score:
    """Measure loss and accuracy on examples with known classes."""
    logits = compute_logits(classifier, examples, batch_size, dtype)
    labels = torch.tensor([example.label for example in examples])
    return Score(cross_entropy(logits, labels).item(), (logits.argmax(dim=-1) == labels).double().mean().item())


def train(args: argparse.Namespace) -> None:
    """Train on the file --train, and write the classifier of the best epoch to the directory --out.

    The best epoch is the one with the lowest loss on the file --val.
    """
    classes, train_labels, val_labels = read_labels(args)
    classifier, tokenizer = load_classifier(args, classes)
    train_examples, val_examples = (
        encode(
            read_column(path, args.text_key), [classes.index(name) for name in labels], tokenizer, classifier.max_length
        )
        for path, labels in ((args.train, train_labels), (args.val, val_labels))
    )
    fit(classifier, tokenizer, train_examples, val_examples, args)


def load_classifier(args: argparse.Namespace, classes: list[str]) -> tuple[SequenceClassifier, Tokenizer]:
    """Return a classifier with --model's weights and a random head, on --device, and the tokenizer of the model.

    With --freeze-layers N above 0, the first N blocks and the embeddings are frozen.
    """
    device = find_device(args.device, "--device")
    if device.type == "cpu":
        keep_freed_memory()
    directory = locate(resolve_model(args.model, checkpoint=args.checkpoint))
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(args.seed)
    gpt = GPT.from_pretrained(directory, dtype=torch.float32)  # in half precision, small updates would have no effect
    fit_vocabulary(gpt, tokenizer, directory)
    max_length = choose_length(args, gpt.config.block_size)
    classifier = SequenceClassifier(gpt, len(classes), args.strategy, max_length).to(device)
    classifier.labels = classes
    gpt.freeze(args.freeze_layers, embeddings=args.freeze_layers > 0)
    return classifier, tokenizer


def fit(
    classifier: SequenceClassifier,
    tokenizer: Tokenizer,
    train_examples: list[Example],
    val_examples: list[Example],
    args: argparse.Namespace,
) -> None:
    """Train a classifier. After each epoch with the lowest validation loss so far, write the classifier to --out.

    Training ends early after --patience epochs without a lower validation loss. The labels of the training examples may
    be probabilities, but the labels of the validation examples must be indices of classes.
    """
    device = classifier.score.weight.device
    dtype = find_dtype(args.dtype, device)
    args.out.mkdir(parents=True, exist_ok=True)  # if --out cannot be created, fail before the first epoch
    steps_per_epoch = math.ceil(len(train_examples) / args.batch_size)
    steps = args.epochs * steps_per_epoch
    optim = Optim(lr=args.lr, warmup_steps=steps // 10, steps=steps, min_lr_ratio=0.0)
    optimizers, scaler = make_optimizers(classifier, optim), gradient_scaler(device, dtype)
    n_classes = classifier.num_labels
    print(f"{len(train_examples):,} texts of {n_classes} classes, {args.epochs} epochs of {steps_per_epoch:,} steps")
    best, best_epoch = evaluate(classifier, val_examples, args.batch_size, dtype), 0
    print(f"before training: validation loss {best.loss:.4f}, accuracy {best.accuracy:.4f}")
    for epoch in range(1, args.epochs + 1):
        classifier.train()
        order = permute(np.arange(len(train_examples)), len(train_examples), args.seed, epoch)
        total = 0.0
        for step in tqdm(range(steps_per_epoch), desc=f"epoch {epoch}", leave=False, disable=None, unit="step"):
            chosen = [train_examples[i] for i in order[step * args.batch_size : (step + 1) * args.batch_size]]
            set_learning_rate(optimizers, learning_rate_factor((epoch - 1) * steps_per_epoch + step, optim))
            try:
                compute_loss = partial(classification_loss, classifier, chosen)
                loss = train_step(classifier, compute_loss, optimizers, scaler, dtype, optim.grad_clip)
            except FloatingPointError as error:
                raise FloatingPointError(f"epoch {epoch}, step {step + 1}: {error}") from None
            total += loss * len(chosen)
        score = evaluate(classifier, val_examples, args.batch_size, dtype)
        better = score.loss < best.loss or best_epoch == 0
        if better:
            best, best_epoch = score, epoch
            save(classifier, tokenizer, args.out)
        print(
            f"epoch {epoch}: training loss {total / len(train_examples):.4f}, validation loss {score.loss:.4f}, "
            f"accuracy {score.accuracy:.4f}{'; the best so far, saved in ' + str(args.out) if better else ''}"
        )
        if not better and epoch - best_epoch >= args.patience:
            print(f"stopping: no lower loss in {args.patience} epochs")
            break


def classification_loss(classifier: SequenceClassifier, examples: Sequence[Example]) -> Tensor:
    """Return the mean cross-entropy of a batch of examples as a tensor (), in nats."""
    ids, mask, labels = batch(examples, classifier.score.weight.device)
    return cross_entropy(classifier(ids, attention_mask=mask).logits.float(), labels)


def train_step(
    model: nn.Module,
    compute_loss: Callable[[], Tensor],
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    grad_clip: float,
) -> float:
    """Take one optimizer step on the loss of a batch, and return this loss in nats.

    Raises FloatingPointError if the gradient is not finite, unless float16's loss scale may be the reason.
    """
    with autocast(next(model.parameters()).device, dtype):
        loss = compute_loss()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = clip_gradients(model, grad_clip)
    # A loss scale above 1 can make gradients infinite although the loss is finite. Then the scaler skips this step and
    # lowers the scale.
    if not torch.isfinite(norm) and (not loss.isfinite() or scaler.get_scale() <= 1):
        raise FloatingPointError("the gradient is not finite; lower --lr")
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss.item()


def save(classifier: SequenceClassifier, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the classifier to a temporary directory, then move its files over the files of the previous classifier.

    If the process is killed while it writes the temporary directory, the previous classifier is still complete.
    """
    partial = directory / "partial"
    partial.mkdir(exist_ok=True)
    classifier.save_pretrained(partial, eos_token_id=tokenizer.eot)
    tokenizer.save(partial, pads=True, model_max_length=classifier.max_length)
    for path in partial.iterdir():
        os.replace(path, directory / path.name)
    partial.rmdir()


def predict(args: argparse.Namespace) -> None:
    """Print a JSON object {"text", "label", "probability"} for each row of --file, in the order of the rows."""
    device = find_device(args.device, "--device")
    directory = locate(resolve_model(args.model, checkpoint=args.checkpoint))
    classifier = SequenceClassifier.from_pretrained(directory, dtype=torch.float32, device=device)
    texts = read_column(args.file, args.text_key)
    max_length = choose_length(args, classifier.max_length)
    examples = encode(texts, [-1] * len(texts), load_tokenizer(directory), max_length)
    rows = compute_logits(classifier, examples, args.batch_size, find_dtype(args.dtype, device))
    for text, logits in zip(texts, rows, strict=True):
        probability, index = logits.softmax(dim=-1).max(dim=-1)
        label = classifier.labels[int(index)]
        print(json.dumps({"text": text, "label": label, "probability": round(float(probability), 6)}))
