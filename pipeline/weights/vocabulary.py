"""Checks of an opened tokenizer. transformers makes one of four pieces where a vocabulary is missing, and says nothing.

The rules hold for every published layout: tokenizer.json alone, spiece.model alone, vocab.json with merges.txt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rats.pipeline.weights.files import VOCABULARY
from rats.pipeline.weights.hashes import read_json
from rats.schemas.errors import ConfigError, DataError, RatsError, brief

FAST = "tokenizer.json"
"""Holds a whole tokenizer: with it no other file is needed."""
SETTINGS = "tokenizer_config.json"
LARGEST = 2
LEAST_USED = 0.5
"""Share of an encoder's embeddings that its vocabulary must use. Published ones use .997 and more."""
UNREACHABLE = 0.001
"""Share of the pieces that no merge may make. It is 0 in the published byte-level vocabularies (CLIP, Qwen2)."""


def check_files(cls: Any, folder: Path) -> None:
    """Raises DataError when the folder has no whole vocabulary for a tokenizer of `cls`, naming the files."""
    names = dict(getattr(cls, "vocab_files_names", None) or {})
    has_fast = names.pop("tokenizer_file", None) is not None or not names
    if unknown := sorted(set(names.values()) - set(VOCABULARY)):
        raise ConfigError(f"a {cls.__name__} reads {unknown[0]}, which is in no address: use another tokenizer")
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if (folder / FAST).is_file() or not missing and names:
        return
    others = " and ".join(names.values())
    wanted = " or ".join(part for part in (FAST if has_fast else "", others) if part)
    raise DataError(f"no vocabulary in {folder}: a {cls.__name__} needs {wanted}; fetch or export it again")


def check_vocabulary(tokenizer: Any, folder: Path, encoder: Any = None) -> None:
    """Checks that a tokenizer is whole and fits its text encoder.

    Args:
        tokenizer: It, opened.
        folder: Where it lies, for the error's text.
        encoder: The configuration of the text encoder, if there is one.

    Raises:
        DataError: Files, special tokens or merges are missing, or the size is not the encoder's.
    """
    check_files(type(tokenizer), folder)
    _check_special(tokenizer, folder)
    _check_merges(tokenizer, folder)
    if encoder is not None:
        if not (folder / SETTINGS).is_file():
            raise _refused(folder, f"there is no {SETTINGS}")
        _check_size(tokenizer, folder, encoder)
        if str(encoder.model_type).startswith("clip"):
            _check_clip(tokenizer, folder, encoder)


def _check_special(tokenizer: Any, folder: Path) -> None:
    """All families pad their prompts; a padding token that is none of the vocabulary's is made up by transformers."""
    if tokenizer.pad_token_id is None:
        raise _refused(folder, "it has no padding token")
    if not (folder / FAST).is_file():
        return
    known = {token["content"]: token["id"] for token in read_json(folder / FAST)["added_tokens"]}
    for content, number in known.items():
        # where one of them is away, those behind it move up
        if (found := tokenizer.convert_tokens_to_ids(content)) != number:
            raise _refused(folder, f"{FAST} numbers {brief(content)} {number}, and it is {found}")
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and token not in known:
            raise _refused(folder, f"its {name} {brief(token)} is no special token of {FAST}")


def _check_size(tokenizer: Any, folder: Path, encoder: Any) -> None:
    rows, pieces = int(encoder.vocab_size), len(tokenizer)
    if not LEAST_USED * rows <= pieces <= rows:
        raise _refused(folder, f"it has {pieces} pieces, and its text encoder {rows} embeddings")


def _check_clip(tokenizer: Any, folder: Path, encoder: Any) -> None:
    """CLIP's positions are learned, and the pipelines pad to the tokenizer's length: both must be equal.

    The pooled embedding is the end token's. Old configurations have 2 for it, by which transformers takes the largest.
    """
    if encoder.eos_token_id not in (LARGEST, tokenizer.eos_token_id):
        found = f"its end token is {tokenizer.eos_token_id}, and its text encoder's {encoder.eos_token_id}"
        raise _refused(folder, found)
    length, positions = tokenizer.model_max_length, encoder.max_position_embeddings
    if length != positions:
        raise _refused(folder, f"its model_max_length is {length}, and its text encoder has {positions} positions")


def _check_merges(tokenizer: Any, folder: Path) -> None:
    """In byte-level BPE every piece longer than a byte is made by a merge: without its merges words fall apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return
    suffix, special = model.get("end_of_word_suffix") or "", set(tokenizer.get_added_vocab())
    longer = {piece for piece in model["vocab"] if len(piece.removesuffix(suffix)) > 1} - special
    made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
    lost = longer - made
    if len(lost) > UNREACHABLE * len(model["vocab"]):
        raise _refused(folder, f"{len(lost)} of its pieces are made by no merge")


def _refused(folder: Path, what: str) -> RatsError:
    return DataError(f"{folder} is no whole tokenizer of this text encoder ({what}): fetch or export it again")
