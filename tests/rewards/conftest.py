"""The official packages' environment: pytest 7.2, transformers 4.55, and no hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.torchvision_guard import mend_torchvision

mend_torchvision()  # before transformers is imported: it looks for torchvision
