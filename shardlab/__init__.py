"""shardlab: what a sharding plan costs, read from the compiled program."""
