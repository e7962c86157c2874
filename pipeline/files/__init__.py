"""Files: local folders and buckets, atomic writes, verified reads, the cache of what was fetched."""
