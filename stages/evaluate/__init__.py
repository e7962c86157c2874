"""`rats stage evaluate`: student, teacher and untrained base on the same prompts and noises."""
