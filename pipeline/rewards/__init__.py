"""Reward models: one adapter a file, their preprocessing, and rewards in another process."""
