"""A shard set on disk: plans, shards, index, scores, embeddings, snapshots, and what is published of it."""
