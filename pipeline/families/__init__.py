"""Model families: one class for each published architecture, and the models that are opened through it.

A family in a package of its own needs these three names (docs/families.md).
"""

from rats.pipeline.families.base import PATCH, Family, PatchFamily

__all__ = ["PATCH", "Family", "PatchFamily"]
