"""The identity of a sample: its normalised prompt and a noise index. How it was made is no part of it.

See docs/design.md#identity-of-a-sample.
"""

from __future__ import annotations

import hashlib
import unicodedata

LARGEST_SEED = 2**63 - 1
"""Seeds are 0 to this. torch takes -(2**63) to 2**64 - 1, numpy nothing below 0, and each rank adds its number."""
KEY_PATTERN = r"^[a-z0-9_-]+$"
"""No dot is allowed: WebDataset splits a member's name at the first dot and would silently merge samples."""


def normalise(text: str) -> str:
    """The prompt as models see it: NFC, runs of white space as one space, ends stripped."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def prompt_id(text: str) -> str:
    """sha256 (64 hex digits) of the normalised prompt."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def sample_key(prompt_id: str, noise_index: int) -> str:
    """The sample's name in shards, indexes and logs: 96 bits of the prompt's id and the noise index."""
    return f"{prompt_id[:24]}-{noise_index:04d}"
