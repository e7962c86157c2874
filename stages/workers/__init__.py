"""Where tasks run: in this process, in local workers, on a cluster (the only place with dask)."""
