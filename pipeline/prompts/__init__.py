"""Prompt files and tables: their bytes, rows and cells, which files count, and the draw from a table."""

from rats.pipeline.prompts.read import Prompt, planned_samples, read_prompts

__all__ = ["Prompt", "planned_samples", "read_prompts"]
