"""The blocks a sample passes through, one file each: model families, rewards, solver, store."""

from rats.pipeline.torchvision_guard import mend_torchvision

mend_torchvision()
