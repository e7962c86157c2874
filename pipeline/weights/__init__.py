"""Weights: where they lie, what they hash to, how they are loaded, and adapters (LoRA)."""
