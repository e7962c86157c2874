"""`rats shards`: list, verify, compare, exchange and clean up shard sets."""
