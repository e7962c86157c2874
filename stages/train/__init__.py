"""`rats stage train`: opens what the trainer is handed, takes a run up again, and writes what it leaves."""
