"""`rats shards`: look at, verify, compare, exchange and clean up shard sets."""
