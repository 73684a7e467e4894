"""Sample text from a GPT-2: a run of train.py, a checkpoint, a Hugging Face directory or a model on the hub.

python sample.py --prompt "To be"                             continue a prompt with the newest run in runs/
python sample.py --model gpt2 --interactive                   ask for prompts and print the text as it is generated
python sample.py --file prompts.txt --num-samples 4 --json    print one JSON object for each sample
python sample.py --model gpt2 --serve                         serve a page to try the model, and OpenAI's protocol
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from command import CommandParser, add_device_options, add_model_options, at_least_one, ending, port_number
from data.plain_text import read_escapes

SERVER_OPTIONS = {"model", "checkpoint", "serve", "host", "port", "dtype", "device"}
HOST, PORT = "127.0.0.1", 8000  # default address of the server
DEFAULT_NEW_TOKENS = 200  # fewer if they do not fit into block_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_options(add)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        help="text to continue (default: the text that is piped to this command, or else start from <|endoftext|>)",
    )
    source.add_argument(
        "--file", type=Path, help='one prompt per line; in a .jsonl file, each line is an object with a "prompt"'
    )
    source.add_argument("--serve", action="store_true", help="serve a page to try the model, and OpenAI's protocol")
    source.add_argument("--interactive", action="store_true", help="ask for prompts; typing :help lists the commands")
    add("--host", help=f"address of --serve (default: {HOST}, only this machine)")
    add("--port", type=port_number, help=f"port of --serve; 0: any free one (default: {PORT})")
    add("--num-samples", type=int, default=1, metavar="N", help="samples of each prompt (default: 1)")
    add("--batch-size", type=int, default=8, metavar="N", help="samples (beam search: prompts) in a batch (default: 8)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate (default: {DEFAULT_NEW_TOKENS}, or fewer if the longest prompt leaves less room)",
    )
    add("--temperature", type=float, help="below 1 favors probable tokens, above 1 improbable ones (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens (default: from all)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most probable tokens whose probabilities sum to P (default: 0.95)",
    )
    add("--greedy", action="store_true", help="always choose the most probable token")
    add("--num-beams", type=int, default=1, metavar="N", help="use beam search with N beams instead of sampling")
    add(
        "--stop",
        action="append",
        type=read_escapes,
        metavar="TEXT",
        help=r"end a sample after this text; \n is a line break. Repeat the option for several texts",
    )
    add("--sliding", action="store_true", help="allow more tokens than the model can see; it sees the last of them")
    add("--seed", type=int, help="the same seed gives the same text; in float32, with any batch size (default: random)")
    add("--stream", action="store_true", help="print text as it is generated")
    add("--json", action="store_true", help="print objects with prompt, text, tokens, logprobs and finish_reason")
    add("--show-probs", type=int, metavar="K", help="first print the K most probable next tokens")
    add_device_options(add, ". The weights are converted to the chosen precision too")


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Ends the process if a value is impossible, or if options cannot be combined."""
    add_arguments(parser)
    args = parser.parse_args(arguments)
    at_least_one(parser, args, "num_samples", "batch_size", "num_beams", "max_new_tokens", "show_probs")
    if args.serve:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        if others := [f"--{name.replace('_', '-')}" for name in given if name not in SERVER_OPTIONS]:
            parser.error(f"--serve cannot be combined with {', '.join(others)}: each request has its own options")
        args.host, args.port = args.host or HOST, PORT if args.port is None else args.port
    elif (args.host, args.port) != (None, None):
        parser.error("--host and --port are the address of the server: add --serve, or omit them")
    args.default_new_tokens = DEFAULT_NEW_TOKENS
    args.sampling = not args.greedy and args.num_beams == 1
    if not args.sampling and (args.temperature, args.top_k, args.top_p) != (None, None, None):
        parser.error("--temperature, --top-k and --top-p affect only sampling: omit them with --greedy or --num-beams")
    if args.greedy and args.num_beams > 1:
        parser.error("--greedy and --num-beams cannot be combined: omit one of them")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        parser.error(f"--temperature must be above 0, got {args.temperature}: --greedy chooses the most probable token")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    if args.top_k is not None and args.top_k < 0:
        parser.error(f"--top-k must be at least 1, or 0 for all tokens, got {args.top_k}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be in 0..2^63 - 1, got {args.seed}")
    if 1 < args.num_beams < args.num_samples:
        parser.error(f"--num-beams {args.num_beams} is too small: it must be at least --num-samples {args.num_samples}")
    if args.greedy and args.num_samples > 1:
        parser.error("--greedy has one result per prompt: it cannot be combined with --num-samples")
    if "" in (args.stop or ()):
        parser.error("--stop needs a text that is not empty")
    if (args.stream or args.interactive) and args.num_beams > 1:
        parser.error("beam search has no text before it ends: it cannot be combined with --stream or --interactive")
    if args.json and (args.stream or args.interactive or args.show_probs):
        parser.error("--json cannot be used with --stream, --interactive or --show-probs")
    return args


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_arguments(parser, arguments)
    with ending(parser, needs_reader=True):
        # imported after the arguments are checked: importing torch takes seconds
        if args.serve:
            try:
                from serve.app import run
            except ModuleNotFoundError as error:
                parser.exit(2, f"sample.py: --serve needs {error.name}: pip install starlette uvicorn\n")
        elif args.interactive:
            from generation.interactive import run
        else:
            from generation.terminal import run
        run(args)


if __name__ == "__main__":
    main()
