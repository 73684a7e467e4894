"""The amount of work in one run of each benchmark. It is the same for all programs that are compared."""

# The batch of a training step on each device: number of sequences, and tokens in each sequence.
BATCH = {"cpu": (4, 512), "cuda": (16, 1024)}
PROMPT_TOKENS, NEW_TOKENS = 8, 256  # in decoding: tokens of each prompt, and tokens that are generated after it
# The batch sizes of decoding on each device: numbers of sequences that are decoded together.
DECODED = {"cpu": (1, 8), "cuda": (1, 8, 64)}
QUESTIONS = 32  # number of questions of HellaSwag
VOCAB = 50257  # size of GPT-2's vocabulary
PARAMETERS = 124_439_808  # number of parameters of GPT-2 124M
LOADER_BATCHES, LOADER_BATCH_TOKENS = 10, 524288  # batches that the loader reads, and tokens in each batch
# In the benchmark of attention: the kinds of attention, and the lengths of the sequence in tokens.
ATTENTIONS, ATTENTION_TOKENS = ("full", "window", "lsh"), (1024, 4096, 16384, 65536)
