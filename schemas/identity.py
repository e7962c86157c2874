"""Who a sample is: the normalised prompt and a noise index, and nothing about how it was made.

See docs/design.md#identity-of-a-sample.
"""

from __future__ import annotations

import hashlib
import unicodedata

KEY_PATTERN = r"^[a-z0-9_-]+$"
"""No dot: WebDataset splits a member's name at the first one and would merge samples without a word."""


def normalise(text: str) -> str:
    """The prompt as models see it: NFC, runs of white space as one space, ends stripped."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def prompt_id(text: str) -> str:
    """sha256 (64 hex digits) of the normalised prompt."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def sample_key(prompt_id: str, noise_index: int) -> str:
    """The sample's name in shards, indexes and logs: 96 bits of the prompt's id and the noise index."""
    return f"{prompt_id[:24]}-{noise_index:04d}"
