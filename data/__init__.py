"""Convert text to token ids, store them in files (shards), and read them as batches."""
