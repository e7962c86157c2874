"""Tokenizers for small vocabularies in the file formats of CLIP, T5 and BERT.

Each is a function of the texts alone (sorted, counted, no sampling), so that two builds give the same ids.
Words of the texts become single tokens; other words fall apart into pieces, down to characters (CLIP: bytes).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN2_END = "<|endoftext|>"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()-&"


def clip_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    """Byte-level BPE merges of the lower-cased texts, as CLIP splits them: most frequent first, ties by spelling.

    Written out because the merge order of `tokenizers.trainers.BpeTrainer` differs from run to run at ties.
    """
    return _byte_pair_merges(_clip_words(texts), vocab_size - 2 * 256 - 2)


def _byte_pair_merges(words: Counter[tuple[str, ...]], limit: int) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(symbols, best): count for symbols, count in words.items()})
    return merges


def _clip_words(texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    normalise = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found = (word for text in texts for word, _ in split.pre_tokenize_str(normalise.normalize_str(text)))
    return Counter((*word[:-1], word[-1] + "</w>") for word in found)


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        # A merged symbol can't equal pair[0] followed by pair[1] again: it is longer than pair[0].
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids as CLIP numbers them: bytes, bytes that end a word, merges, start, end (the largest id)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in merges), CLIP_START, CLIP_END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def clip_tokenizer(texts: Iterable[str], max_length: int = 77, vocab_size: int = 4096) -> CLIPTokenizer:
    """CLIP's tokenizer with merges learned from `texts`; `len(tokenizer)` is the vocabulary to give the model.

    The end token is also the padding, as in CLIP, and has the largest id.
    """
    merges = clip_merges(texts, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write_clip_files(Path(folder), merges, max_length)
        return CLIPTokenizer.from_pretrained(folder)


def write_clip_files(folder: Path, merges: list[tuple[str, str]], max_length: int) -> None:
    """`vocab.json`, `merges.txt` and `tokenizer_config.json`, which transformers 4 and 5 both read."""
    _write_byte_pairs(folder, clip_vocabulary(merges), merges)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "pad_token": CLIP_END,
        "unk_token": CLIP_END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_byte_pairs(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def save_clip(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Saves for both: `tokenizer.json`, which transformers 5 writes, and the two files that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    (file.parent / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")


def qwen2_tokenizer(texts: Iterable[str], special: Iterable[str] = ()) -> Qwen2Tokenizer:
    """Qwen2's tokenizer: byte-level BPE that keeps case and the space before a word, with merges from `texts`.

    `special`: tokens besides "<|endoftext|>" that are never split, such as "<|im_start|>".
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    merges = _byte_pair_merges(Counter(tuple(w) for text in texts for w, _ in split.pre_tokenize_str(text)), 4096)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), QWEN2_END]
    with tempfile.TemporaryDirectory() as folder:
        _write_byte_pairs(Path(folder), {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges)
        config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": QWEN2_END, "eos_token": QWEN2_END}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def t5_tokenizer(texts: Iterable[str], max_length: int = 512, extra_ids: int = 0) -> T5TokenizerFast:
    """T5's tokenizer: Unigram pieces, a word scored by its log frequency, characters far below all words."""
    # Stripped, so that "cat" and "cat," share a piece and the comma is one of its own.
    words = Counter(word for text in texts for part in text.split() if (word := part.strip(",.:;!?")))
    total, ordered = sum(words.values()), sorted(words, key=lambda w: (-words[w], w))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -15.0)]
    pieces += [("▁" + word, math.log(words[word] / total)) for word in ordered]
    pieces += [(c, -15.0) for c in sorted({*"".join(words), *CHARACTERS, *CHARACTERS.upper()})]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _from_backend(T5TokenizerFast, backend, pieces, model_max_length=max_length, extra_ids=extra_ids)


def bert_tokenizer(texts: Iterable[str], max_length: int = 512, first: Iterable[str] = ()) -> BertTokenizerFast:
    """BERT's uncased WordPiece tokenizer: special tokens, then the words, then characters and continuations."""
    split = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    characters = sorted({*"".join(words), *CHARACTERS})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *first]
    tokens += [*sorted(words, key=lambda w: (-words[w], w)), *characters, *("##" + c for c in characters)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": max_length}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return BertTokenizerFast.from_pretrained(folder)


def _from_backend(cls: type, backend: Tokenizer, pieces: list[tuple[str, float]], **settings: object):
    """T5's tokenizer: transformers 5 builds it from pieces, transformers 4 takes the finished backend."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return cls(vocab=pieces, **settings)
    return cls(tokenizer_object=backend, **settings)
