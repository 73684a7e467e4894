"""Make datasets: everything from a source of text to token shards. The command is `python -m data.prepare`."""
