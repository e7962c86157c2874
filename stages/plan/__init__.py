"""`rats plan`: samples, bytes, FLOPs, memory, hours and cost before anything runs."""
