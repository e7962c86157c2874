"""What a sample meets: prompts, noise, solver, and a folder each for families, rewards, weights, store and files."""
