"""Fine-tune a GPT-2 to classify texts, and classify texts with it.

python classify.py train --model gpt2 --train reviews.csv --val held-out.csv --out runs/reviews
python classify.py predict --model runs/reviews --file new.csv > classes.jsonl

Files are .csv with a header or .jsonl. The columns are "text" and "label", or those of --text-key and --label-key. With
--strategy last, transformers loads the result as a GPT2ForSequenceClassification with the names of the classes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from command import DEVICE_HELP, DTYPE_CHOICES, DTYPE_HELP, MODEL_HELP, at_least_one, ending

if TYPE_CHECKING:  # importing torch takes seconds: --help and a wrong argument should not wait for it
    import torch
    from torch import Tensor

    from data.tokenizer import Tokenizer
    from heads import SequenceClassifier


class Example(NamedTuple):
    """The first tokens of a text, and the index of its class, or -1 if it is unknown."""

    tokens: list[int]
    label: int


class Score(NamedTuple):
    """The mean loss over some examples, in nats, and the fraction that was classified correctly."""

    loss: float
    accuracy: float


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|predict")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--text-key", default="text", metavar="KEY", help="column with the texts (default: text)")
    add("--batch-size", type=int, default=16, metavar="N", help="texts in a batch (default: 16)")
    add("--max-length", type=int, metavar="N", help="tokens to read of each text (default: as many as the model can)")
    add("--device", default="auto", help=DEVICE_HELP)
    add("--dtype", choices=DTYPE_CHOICES, default="auto", help=DTYPE_HELP)
    train = commands.add_parser("train", parents=[shared], help="fine-tune on texts with labels")
    add = train.add_argument
    add("--train", type=Path, required=True, metavar="FILE", help="texts to train on")
    add("--val", type=Path, required=True, metavar="FILE", help="texts that select the best epoch")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write the best classifier to")
    add("--label-key", default="label", metavar="KEY", help="column with the classes (default: label)")
    add(
        "--strategy",
        choices=("last", "all"),
        default="last",
        help="hidden states that the class is computed from: those of the last token or of all",
    )
    add("--epochs", type=int, default=3, metavar="N", help="largest number of epochs (default: 3)")
    add(
        "--patience",
        type=int,
        default=2,
        metavar="N",
        help="stop after N epochs without a lower validation loss (default: 2)",
    )
    add("--lr", type=float, default=2e-5, help="peak learning rate of AdamW (default: 2e-5)")
    add(
        "--freeze-layers",
        type=int,
        default=0,
        metavar="N",
        help="freeze the first N blocks and the embeddings (default: 0, none)",
    )
    add("--seed", type=int, default=1337, help="seed of the head's initial weights and of the order of the texts")
    predict = commands.add_parser(
        "predict", parents=[shared], help="print the class of each text as one JSON object per line"
    )
    predict.add_argument("--file", type=Path, required=True, metavar="FILE", help="texts to classify")
    args = parser.parse_args(arguments)
    at_least_one(parser, args, "batch_size", "max_length", "epochs", "patience")
    if args.command == "train" and not 0 < args.lr < math.inf:
        parser.error(f"--lr must be above 0, got {args.lr}")
    if args.command == "train" and args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.command == "train" and args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists: choose another directory, or delete it")
    return args


def read_column(path: Path, key: str) -> list[str]:
    """Return a column of a .csv or .jsonl file as strings."""
    from eval.rows import read_table

    values = []
    for number, row in enumerate(read_table(path), 1):
        if key not in row:
            raise ValueError(f"{path}, row {number} has no column {key!r}, only {', '.join(map(str, row))}")
        if row[key] in (None, ""):
            raise ValueError(f"{path}, row {number}: column {key!r} is empty")
        values.append(str(row[key]))
    return values


def encode(texts: list[str], labels: list[int], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Tokenize texts. Texts longer than `max_length` tokens are cut, and their number is printed on stderr."""
    tokens = [tokenizer.encode(text) for text in texts]
    if n_cut := sum(len(one) > max_length for one in tokens):
        print(f"{n_cut:,} of {len(texts):,} texts are longer than {max_length} tokens and were cut", file=sys.stderr)
    return [Example(one[:max_length], label) for one, label in zip(tokens, labels, strict=True)]


def batch(examples: list[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids and attention mask, (B, T) each, padded on the right, and labels (B,)."""
    import torch

    T = max(len(example.tokens) for example in examples)
    ids, mask = torch.zeros(2, len(examples), T, dtype=torch.int64)
    for row, kept, example in zip(ids, mask, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
        kept[: len(example.tokens)] = 1
    return ids.to(device), mask.to(device), torch.tensor([example.label for example in examples], device=device)


def compute_logits(
    classifier: SequenceClassifier, examples: list[Example], batch_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the logits (N, K) of N examples over K classes, computed in batches of similar length."""
    import torch

    from device import autocast

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
    import torch
    from torch.nn.functional import cross_entropy

    logits = compute_logits(classifier, examples, batch_size, dtype)
    labels = torch.tensor([example.label for example in examples])
    return Score(cross_entropy(logits, labels).item(), (logits.argmax(dim=-1) == labels).double().mean().item())


def train(args: argparse.Namespace) -> None:
    """Train on one file, and keep the classifier of the epoch with the lowest loss on the other."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from data.loader import permute
    from data.tokenizer import load_tokenizer
    from device import autocast, find_device, find_dtype, gradient_scaler, keep_freed_memory
    from heads import SequenceClassifier
    from model import GPT
    from pretrained import resolve_model
    from training.config import Optim
    from training.optim import learning_rate_factor, make_optimizers, set_learning_rate
    from weights import locate

    device = find_device(args.device, "--device")
    dtype = find_dtype(args.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    names = read_column(args.train, args.label_key)
    classes = sorted(set(names))
    if len(classes) < 2:
        raise ValueError(f"{args.train} has only one class, {classes[0]!r}: expected at least two")
    val_names = read_column(args.val, args.label_key)
    if unknown := sorted(set(val_names) - set(classes)):
        raise ValueError(f"{args.val} has classes that {args.train} lacks: {', '.join(unknown)}")

    directory = locate(resolve_model(args.model))
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(args.seed)
    gpt = GPT.from_pretrained(directory, dtype=torch.float32)  # small updates vanish in half precision
    max_length = choose_length(args, gpt.config.block_size)
    classifier = SequenceClassifier(gpt, len(classes), args.strategy, max_length).to(device)
    classifier.labels = classes
    gpt.freeze(args.freeze_layers, embeddings=args.freeze_layers > 0)
    train_examples, val_examples = (
        encode(read_column(path, args.text_key), [classes.index(name) for name in labels], tokenizer, max_length)
        for path, labels in ((args.train, names), (args.val, val_names))
    )

    args.out.mkdir(parents=True, exist_ok=True)  # fail before the first epoch, not after it
    steps_per_epoch = math.ceil(len(train_examples) / args.batch_size)
    steps = args.epochs * steps_per_epoch
    optim = Optim(lr=args.lr, warmup_steps=steps // 10, steps=steps, min_lr_ratio=0.0)
    optimizers, scaler = make_optimizers(classifier, optim), gradient_scaler(device, dtype)
    print(f"{len(train_examples):,} texts of {len(classes)} classes, {args.epochs} epochs of {steps_per_epoch:,} steps")
    best, best_epoch = evaluate(classifier, val_examples, args.batch_size, dtype), 0
    print(f"before training: validation loss {best.loss:.4f}, accuracy {best.accuracy:.4f}")
    for epoch in range(1, args.epochs + 1):
        classifier.train()
        order = permute(np.arange(len(train_examples)), len(train_examples), args.seed, epoch)
        total = 0.0
        for step in tqdm(range(steps_per_epoch), desc=f"epoch {epoch}", leave=False, disable=None, unit="step"):
            chosen = [train_examples[i] for i in order[step * args.batch_size : (step + 1) * args.batch_size]]
            ids, mask, labels = batch(chosen, device)
            set_learning_rate(optimizers, learning_rate_factor((epoch - 1) * steps_per_epoch + step, optim))
            with autocast(device, dtype):
                loss = classifier(ids, attention_mask=mask, labels=labels).loss
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), optim.grad_clip)
            # Above a loss scale of 1, the scale may cause infinite gradients: the scaler skips the step and lowers it.
            if not torch.isfinite(norm) and (not loss.isfinite() or scaler.get_scale() <= 1):
                raise FloatingPointError(f"epoch {epoch}, step {step + 1}: the gradient is not finite; lower --lr")
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            total += loss.item() * len(chosen)
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


def save(classifier: SequenceClassifier, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the classifier to a temporary directory, then move its files over those of the previous one.

    If the process is killed while it writes, the previous classifier is still complete.
    """
    partial = directory / "partial"
    partial.mkdir(exist_ok=True)
    classifier.save_pretrained(partial, eos_token_id=tokenizer.eot)
    tokenizer.save(partial, pads=True)
    for path in partial.iterdir():
        os.replace(path, directory / path.name)
    partial.rmdir()


def predict(args: argparse.Namespace) -> None:
    """Print {"text", "label", "probability"} for each row of a file, in the order of the file."""
    import torch

    from data.tokenizer import load_tokenizer
    from device import find_device, find_dtype
    from heads import SequenceClassifier
    from weights import locate

    device = find_device(args.device, "--device")
    directory = locate(args.model)
    classifier = SequenceClassifier.from_pretrained(directory, dtype=torch.float32, device=device)
    texts = read_column(args.file, args.text_key)
    max_length = choose_length(args, classifier.max_length)
    examples = encode(texts, [-1] * len(texts), load_tokenizer(directory), max_length)
    rows = compute_logits(classifier, examples, args.batch_size, find_dtype(args.dtype, device))
    for text, logits in zip(texts, rows, strict=True):
        probability, index = logits.softmax(dim=-1).max(dim=-1)
        label = classifier.labels[int(index)]
        print(json.dumps({"text": text, "label": label, "probability": round(float(probability), 6)}))


def choose_length(args: argparse.Namespace, longest: int) -> int:
    """Return --max-length, or the `longest` length that the model supports."""
    if args.max_length and args.max_length > longest:
        raise ValueError(f"--max-length {args.max_length} is above the {longest} tokens that the model supports")
    return args.max_length or longest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="classify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = parse_arguments(parser, arguments)
    with ending(parser):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("classify.py runs in a single process: start it without torchrun")
        train(args) if args.command == "train" else predict(args)


if __name__ == "__main__":
    main()
