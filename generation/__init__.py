"""Generate text with a GPT: greedy decoding, sampling, beam search, streaming.

The arguments of `generate` that also exist in transformers' method `generate` have the same meaning there.

    options.py      GenerationOptions and GenerateOutput: what `generate` takes and returns
    prompts.py      prompts -> a checked batch of token ids and its mask
    decode.py       generate
    sampling.py     greedy decoding and sampling, Gumbel-softmax samples
    beam_search.py  beam search and beam sampling
    forward.py      code shared by sampling and beam search: cached forward pass, stop conditions, recorded outputs
    fixed_step.py   a decoding step whose shapes never change, so that CUDA can replay the step as a graph
    numpy_step.py   a decoding step in NumPy, for a single row on a CPU in float32
    processors.py   changes to the scores of the next token: penalties, bans, temperature, top-k, top-p
    packed.py       pack_weights: a memory layout of the weights that makes decoding faster
    text.py         stream and generate_text: strings instead of token ids
    terminal.py     the work of sample.py: it reads prompts, generates text and prints it
    interactive.py  sample.py --interactive

Letters in the shapes of this package (model.py explains C, D and H): B is the number of prompts, K the number of beams
of each prompt, N the number of rows (B * K in beam search, otherwise B * num_return_sequences), T the number of tokens
that each row has so far, including prompt and padding, and V the size of the vocabulary.
"""

from generation.decode import generate
from generation.options import GenerateOutput, GenerationOptions
from generation.packed import pack_weights
from generation.sampling import gumbel_softmax
from generation.text import Completion, StreamedToken, generate_text, stream

__all__ = [
    "Completion",
    "GenerateOutput",
    "GenerationOptions",
    "StreamedToken",
    "generate",
    "generate_text",
    "gumbel_softmax",
    "pack_weights",
    "stream",
]
