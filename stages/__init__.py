"""Which blocks, in which order, run where; the command line."""
