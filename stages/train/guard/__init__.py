"""The guard against reward hacking: it validates a student during training, and can stop the run."""
