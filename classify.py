"""Fine-tune a GPT-2 to sort texts into classes, and sort texts with it.

python classify.py train --model gpt2 --train reviews.csv --val held-out.csv --out runs/reviews
python classify.py predict --model runs/reviews --file new.csv > classes.jsonl

Files are .csv with a header or .jsonl; the columns are "text" and "label" unless --text-key and --label-key say so.
What it writes is, with --strategy last, a GPT2ForSequenceClassification to transformers, with the names of the classes.
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

if TYPE_CHECKING:  # torch takes seconds to import: --help and a wrong argument need not wait for it
    import torch
    from torch import Tensor

    from data.tokenizer import Tokenizer
    from heads import SequenceClassifier


class Example(NamedTuple):
    """A text's first tokens, and the number of its class; -1 where it is not known."""

    tokens: list[int]
    label: int


class Score(NamedTuple):
    """Of some examples: the mean loss in nats, and the share that was put in the right class."""

    loss: float
    accuracy: float


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|predict")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--text-key", default="text", metavar="KEY", help="column of the texts (default: text)")
    add("--batch-size", type=int, default=16, metavar="N", help="texts at a time (default: 16)")
    add("--max-length", type=int, metavar="N", help="tokens of a text that are read (default: all that the model can)")
    add("--device", default="auto", help=DEVICE_HELP)
    add("--dtype", choices=DTYPE_CHOICES, default="auto", help=DTYPE_HELP)
    train = commands.add_parser("train", parents=[shared], help="fine-tune on texts with labels")
    add = train.add_argument
    add("--train", type=Path, required=True, metavar="FILE", help="what to learn from")
    add("--val", type=Path, required=True, metavar="FILE", help="what to choose the best epoch by")
    add("--out", type=Path, required=True, metavar="DIR", help="where the best classifier goes")
    add("--label-key", default="label", metavar="KEY", help="column of the classes (default: label)")
    add("--strategy", choices=("last", "all"), default="last", help="what the class is read off (see heads.py)")
    add("--epochs", type=int, default=3, metavar="N", help="at most (default: 3)")
    add("--patience", type=int, default=2, metavar="N", help="epochs without a lower loss to end after (default: 2)")
    add("--lr", type=float, default=2e-5, help="peak learning rate of AdamW (default: 2e-5)")
    add("--freeze-layers", type=int, default=0, metavar="N", help="blocks, from the first, that do not train")
    add("--seed", type=int, default=1337, help="of the head's first weights and the order")
    predict = commands.add_parser("predict", parents=[shared], help="print the class of each text, an object a line")
    predict.add_argument("--file", type=Path, required=True, metavar="FILE", help="the texts")
    args = parser.parse_args(arguments)
    at_least_one(parser, args, "batch_size", "max_length", "epochs", "patience")
    if args.command == "train" and not 0 < args.lr < math.inf:
        parser.error(f"--lr must be above 0, got {args.lr}")
    if args.command == "train" and args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.command == "train" and args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists: choose another, or delete it")
    return args


def read_column(path: Path, key: str) -> list[str]:
    """A column of a .csv or .jsonl file, as text."""
    from eval.rows import read_table

    values = []
    for number, row in enumerate(read_table(path), 1):
        if key not in row:
            raise ValueError(f"{path}, row {number} has no {key!r}: it has {', '.join(map(str, row))}")
        if row[key] in (None, ""):
            raise ValueError(f"{path}, row {number}: its {key!r} is empty")
        values.append(str(row[key]))
    return values


def encode(texts: list[str], labels: list[int], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Texts in tokens; of those that are longer than `max_length` the beginning, and how many were, on stderr."""
    tokens = [tokenizer.encode(text) for text in texts]
    if n_cut := sum(len(one) > max_length for one in tokens):
        print(f"{n_cut:,} of {len(texts):,} texts go on after {max_length} tokens, unread", file=sys.stderr)
    return [Example(one[:max_length], label) for one, label in zip(tokens, labels, strict=True)]


def batch(examples: list[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask, (B, T) each, padded on the right, and labels (B,)."""
    import torch

    T = max(len(example.tokens) for example in examples)
    ids, mask = torch.zeros(2, len(examples), T, dtype=torch.int64)
    for row, kept, example in zip(ids, mask, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
        kept[: len(example.tokens)] = 1
    return ids.to(device), mask.to(device), torch.tensor([example.label for example in examples], device=device)


def logits_of(classifier: SequenceClassifier, examples: list[Example], batch_size: int, dtype: torch.dtype) -> Tensor:
    """The logits (N, K) of the classes of N examples, computed in batches of about one length."""
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
    """How well the classifier does on examples whose classes are known."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = logits_of(classifier, examples, batch_size, dtype)
    labels = torch.tensor([example.label for example in examples])
    return Score(cross_entropy(logits, labels).item(), (logits.argmax(dim=-1) == labels).double().mean().item())


def train(args: argparse.Namespace) -> None:
    """Learn from one file, and keep what does best on the other."""
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
        raise ValueError(f"{args.train} has one class, {classes[0]!r}: there is nothing to tell apart")
    val_names = read_column(args.val, args.label_key)
    if unknown := sorted(set(val_names) - set(classes)):
        raise ValueError(f"{args.val} has classes that {args.train} lacks: {', '.join(unknown)}")

    directory = locate(resolve_model(args.model))
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(args.seed)
    gpt = GPT.from_pretrained(directory, dtype=torch.float32)  # a file in half precision would lose small updates
    max_length = fitting_length(args, gpt.config.block_size)
    classifier = SequenceClassifier(gpt, len(classes), args.strategy, max_length).to(device)
    classifier.labels = classes
    gpt.freeze(args.freeze_layers, embeddings=args.freeze_layers > 0)
    learn, val = (
        encode(read_column(path, args.text_key), [classes.index(name) for name in labels], tokenizer, max_length)
        for path, labels in ((args.train, names), (args.val, val_names))
    )

    args.out.mkdir(parents=True, exist_ok=True)  # now, not after an epoch's work
    steps_per_epoch = math.ceil(len(learn) / args.batch_size)
    steps = args.epochs * steps_per_epoch
    optim = Optim(lr=args.lr, warmup_steps=steps // 10, steps=steps, min_lr_ratio=0.0)
    optimizers, scaler = make_optimizers(classifier, optim), gradient_scaler(device, dtype)
    print(f"{len(learn):,} texts of {len(classes)} classes, {args.epochs} epochs of {steps_per_epoch:,} steps")
    best, best_epoch = evaluate(classifier, val, args.batch_size, dtype), 0
    print(f"before: validation loss {best.loss:.4f}, accuracy {best.accuracy:.4f}")
    for epoch in range(1, args.epochs + 1):
        classifier.train()
        order = permute(np.arange(len(learn)), len(learn), args.seed, epoch)
        total = 0.0
        for step in tqdm(range(steps_per_epoch), desc=f"epoch {epoch}", leave=False, disable=None, unit="step"):
            chosen = [learn[i] for i in order[step * args.batch_size : (step + 1) * args.batch_size]]
            ids, mask, labels = batch(chosen, device)
            set_learning_rate(optimizers, learning_rate_factor((epoch - 1) * steps_per_epoch + step, optim))
            with autocast(device, dtype):
                loss = classifier(ids, attention_mask=mask, labels=labels).loss
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), optim.grad_clip)
            # a scale above 1 is still being searched for: the scaler skips this step and lowers it
            if not torch.isfinite(norm) and (not loss.isfinite() or scaler.get_scale() <= 1):
                raise FloatingPointError(f"epoch {epoch}, step {step + 1}: the gradient is not finite; lower --lr")
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            total += loss.item() * len(chosen)
        score = evaluate(classifier, val, args.batch_size, dtype)
        better = score.loss < best.loss or best_epoch == 0
        if better:
            best, best_epoch = score, epoch
            save(classifier, tokenizer, args.out)
        print(
            f"epoch {epoch}: training loss {total / len(learn):.4f}, validation loss {score.loss:.4f}, "
            f"accuracy {score.accuracy:.4f}{'; the best so far is in ' + str(args.out) if better else ''}"
        )
        if not better and epoch - best_epoch >= args.patience:
            print(f"no lower loss in {args.patience} epochs: the end")
            break


def save(classifier: SequenceClassifier, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the classifier beside the one that is there, and then over it, so that a kill leaves one that is whole."""
    partial = directory / "partial"
    partial.mkdir(exist_ok=True)
    classifier.save_pretrained(partial, eos_token_id=tokenizer.eot)
    tokenizer.save(partial, pads=True)
    for path in partial.iterdir():
        os.replace(path, directory / path.name)
    partial.rmdir()


def predict(args: argparse.Namespace) -> None:
    """Print {"text", "label", "probability"} for each row of a file, in its order."""
    import torch

    from data.tokenizer import load_tokenizer
    from device import find_device, find_dtype
    from heads import SequenceClassifier
    from weights import locate

    device = find_device(args.device, "--device")
    directory = locate(args.model)
    classifier = SequenceClassifier.from_pretrained(directory, dtype=torch.float32, device=device)
    texts = read_column(args.file, args.text_key)
    max_length = fitting_length(args, classifier.max_length)
    examples = encode(texts, [-1] * len(texts), load_tokenizer(directory), max_length)
    rows = logits_of(classifier, examples, args.batch_size, find_dtype(args.dtype, device))
    for text, logits in zip(texts, rows, strict=True):
        probability, index = logits.softmax(dim=-1).max(dim=-1)
        label = classifier.labels[int(index)]
        print(json.dumps({"text": text, "label": label, "probability": round(float(probability), 6)}))


def fitting_length(args: argparse.Namespace, longest: int) -> int:
    """--max-length, or as much as the model takes."""
    if args.max_length and args.max_length > longest:
        raise ValueError(f"--max-length {args.max_length} is above the {longest} tokens that the model takes")
    return args.max_length or longest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="classify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = parse_arguments(parser, arguments)
    with ending(parser):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("classify.py runs on one process: start it without torchrun")
        train(args) if args.command == "train" else predict(args)


if __name__ == "__main__":
    main()
