"""The amount of work in one run of each benchmark. It is the same for every contestant."""

ROWS, TOKENS = 4, 512  # the batch of a training step: sequences, and tokens in each
PROMPT_TOKENS, NEW_TOKENS = 8, 256  # of each sequence that is decoded
QUESTIONS = 32  # of HellaSwag
VOCAB = 50257  # GPT-2's
LOADER_BATCHES, LOADER_BATCH_TOKENS = 10, 524288
