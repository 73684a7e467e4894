"""Make datasets: everything between a source of text and token shards. The command is `python -m data.prepare`."""
