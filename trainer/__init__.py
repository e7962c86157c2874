"""The arithmetic of training. Stream and rewards are passed to the loop, which opens neither."""
