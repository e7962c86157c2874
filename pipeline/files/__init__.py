"""Files: local folders and buckets, atomic writes, verified reads, and a cache of remote data."""
