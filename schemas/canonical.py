"""Canonical JSON: one value has one spelling, so the bytes that are hashed are the bytes on disk."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; NaN and infinities raise ValueError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(data: bytes) -> str:
    """Hex digest: the hash of identities (blake3 is the hash of verification)."""
    return hashlib.sha256(data).hexdigest()
