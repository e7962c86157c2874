"""The official packages' environment: pytest 7.2, transformers 4.55, and no hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import rats.pipeline  # noqa: F401  # before transformers: it mends a torchvision that does not fit this torch
