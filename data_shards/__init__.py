"""Programs that build, import, verify and show shard sets: `python -m data_shards --help`."""
