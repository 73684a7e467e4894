"""Upload a checkpoint of a run to the Hugging Face hub, with a model card:

    python -m scripts.publish runs/gpt2-124m --repo NAME/gpt2-124m --dry-run > card.md     # no network; edit the card
    python -m scripts.publish runs/gpt2-124m --repo NAME/gpt2-124m --card card.md

The checkpoint is the newest one, or the best one if eval.patience ended the run. The optimizer state is not uploaded.
Without --card, the card is made from the files of the run, with the evaluations of this checkpoint in RUN/*.json
(`eval.run --json`). Evaluations of another step, or of a run with another directory name, are left out. Choose a
license with --license: without one, nobody else may use the model. Before the first upload, store your token with
`hf auth login`.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.publish")

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from checkpoints import MANIFEST, read_state
from command import CommandParser, ending
from data.tokenizer import load_tokenizer
from model import GPTConfig
from pretrained import resolve_model
from report.run_log import RunLog, read_run_log
from training.estimate import count_parameters
from weights import open_model


def published_files(checkpoint: Path) -> list[Path]:
    """Return the model's files in a checkpoint: those in its manifest, without the training state in a subdirectory."""
    names = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return [checkpoint / name for name in sorted(names) if "/" not in name]


def model_card(log: RunLog, checkpoint: Path, repo: str, license: str | None) -> str:
    """Return README.md for a checkpoint of the run that `log` describes."""
    config = GPTConfig(**open_model(checkpoint).config_arguments())
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    metadata += [f"license: {license}"] if license else []
    name = repo.rpartition("/")[2]
    example = f'pipeline("text-generation", model="{repo}")("Once upon a time", max_new_tokens=50)'
    parts = [
        "---\n" + "\n".join(metadata) + "\n---",
        f"# {name}",
        "A GPT-2 that was trained from scratch."
        if log.config["model"]["init_from"] == "scratch"
        else f"A GPT-2 that was fine-tuned from {escape(log.config['model']['init_from'])}.",
        f"```python\nfrom transformers import pipeline\n\nprint({example})\n```",
        "## Model",
        table(("", ""), architecture(config, load_tokenizer(checkpoint).kind).items()),
        "## Training",
        table(("", ""), training(log, read_state(checkpoint)).items()),
        "The command of the last start:",
        f"```\n{command(log)}\n```",
    ]
    if rows := [evaluation(row) for row in log.evaluations if is_of_checkpoint(row, checkpoint)]:
        parts += ["## Evaluation", table(("task", "convention", "metric", "value"), rows)]
    parts += ["## License", license or "The author has not chosen a license yet."]
    return "\n\n".join(parts) + "\n"


def architecture(config: GPTConfig, tokenizer: str) -> dict[str, str]:
    """Return the rows of the card about the model."""
    return {
        "parameters": f"{count_parameters(config):,}",
        "layers, heads, channels": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "context": f"{config.block_size:,} tokens",
        "tokenizer": f"{tokenizer}, {config.vocab_size:,} tokens",
    }


def training(log: RunLog, state: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the card about the data, the recipe and the losses, for the checkpoint with this state."""
    data, optim, start = log.config["data"], log.config["optim"], log.provenance[-1] if log.provenance else {}
    rate = f"{optim['lr']:g}"
    if optim["name"] == "muon":  # which updates the matrices; AdamW updates everything else with `lr`
        rate = f"{optim['muon_lr']:g} (AdamW: {rate})"
    rows = {
        "data": log.source,
        "steps": f"{state['step']:,} of {optim['steps']:,}",
        "tokens": f"{state['step'] * data['batch_tokens']:,}, in batches of {data['batch_tokens']:,}",
        "optimizer": f"{optim['name']}, learning rate {rate}, {optim['schedule']}",
        "precision": start.get("dtype", "").removeprefix("torch."),
        "code": f"commit {start['git_commit']}" if start.get("git_commit") else "",
    }
    val = log.splits["val"]
    for step, loss, bits in zip(val["step"], val["loss"], val["bits_per_byte"], strict=True):
        if step <= state["step"]:  # at the end, `rows` has the last of these validations
            rows["validation loss"] = f"{loss:.4f} nats per token after step {step:,.0f}, on {log.validation}"
            rows["bits per byte"] = f"{bits:.4f}"
    return {name: value for name, value in rows.items() if value}


def command(log: RunLog) -> str:
    """Return the command of the run's last start, with `python` instead of the path of the Python interpreter."""
    arguments = log.provenance[-1]["command"][1:] if log.provenance else []
    return shlex.join(["python", *arguments])


def is_of_checkpoint(row: dict[str, Any], checkpoint: Path) -> bool:
    """Return whether the row of an evaluation belongs to this checkpoint. True if the row names no checkpoint.

    The end of the path, RUN/checkpoints/STEP, has to be the same. The rest may differ, because a run may be moved.
    """
    step = int(checkpoint.name.removeprefix("step-"))
    evaluated = row.get("checkpoint")
    if evaluated in (None, f"step {step}"):
        return True
    return Path(evaluated).resolve().parts[-3:] == checkpoint.resolve().parts[-3:]


def evaluation(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the evaluation table from a result of eval.run."""
    error = f" ± {row['stderr']:.4f}" if row.get("stderr") else ""
    return row["task"], row.get("convention", ""), row["metric"], f"{row['value']:.4f}{error}"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *(tuple(map(escape, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Return text, such as a file name, on one line, with a backslash before each special character of Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m scripts.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run of train.py")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="repository on the hub; created if missing")
    parser.add_argument("--license", metavar="ID", help="license of the model for the card, such as mit")
    parser.add_argument("--card", type=Path, metavar="FILE", help="README.md to upload instead of the generated card")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the card, and on stderr the files; upload nothing"
    )
    args = parser.parse_args(arguments)
    if args.card and args.license:
        parser.error("--license is written into the card made here: with --card, write it into that file")
    with ending(parser):
        publish(args)


def publish(args: argparse.Namespace) -> None:
    """Upload a checkpoint of a run and its card. With --dry-run, only print what would be uploaded."""
    log = read_run_log(args.run, args.run.name)
    checkpoint = Path(resolve_model(str(args.run)))
    files = published_files(checkpoint)
    if args.card is None:
        card = model_card(log, checkpoint, args.repo, args.license)
    else:
        card = args.card.read_text(encoding="utf-8")
    if args.dry_run:
        print(f"{checkpoint} -> https://huggingface.co/{args.repo}", file=sys.stderr)
        for path in files:
            print(f"{path.stat().st_size:>15,}  {path.name}", file=sys.stderr)
        print(f"{len(card.encode()):>15,}  README.md, below", file=sys.stderr)
        print(card, end="")
        return
    api = HfApi()
    api.create_repo(args.repo, private=args.private or None, exist_ok=True)
    operations = [CommitOperationAdd(path.name, path) for path in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    done = api.create_commit(args.repo, operations, commit_message=f"Upload {checkpoint.name} of {args.run.name}")
    print(f"uploaded {len(operations)} files: {done.commit_url}")


if __name__ == "__main__":
    main()
