"""The blocks a sample passes through, one file each: model families, rewards, solver, store."""
