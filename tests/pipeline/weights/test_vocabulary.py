"""Tokenizers in every published layout open; one without its vocabulary never does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

from mini.tokenizers import clip_tokenizer, qwen2_tokenizer, save_clip, t5_tokenizer
from rats.pipeline.weights.loading import load_tokenizer
from rats.pipeline.weights.vocabulary import check_files
from rats.schemas.errors import DataError
from tests.support.tiny import PROMPTS


class Encoder:
    """What a check reads of a CLIP encoder's configuration."""

    model_type = "clip_text_model"
    max_position_embeddings = 9

    def __init__(self, rows: int, end: int) -> None:
        self.vocab_size, self.eos_token_id = rows, end


def clip_in_three_files(folder: Path) -> Encoder:
    """As in FLUX.1 and SD3: vocab.json, merges.txt, tokenizer_config.json. Returns its encoder."""
    tokenizer = clip_tokenizer(PROMPTS, Encoder.max_position_embeddings)
    save_clip(tokenizer, folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    return Encoder(len(tokenizer), tokenizer.eos_token_id)


def test_vocab_and_merges_alone_are_a_whole_tokenizer(tmp_path: Path) -> None:
    encoder = clip_in_three_files(tmp_path)
    assert load_tokenizer(CLIPTokenizer, tmp_path, encoder).tokenize("a red fox") == ["a</w>", "red</w>", "fox</w>"]
    encoder.eos_token_id = 2  # as in CLIP's published configurations
    load_tokenizer(CLIPTokenizer, tmp_path, encoder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_vocabulary_is_none(name: str, tmp_path: Path) -> None:
    encoder = clip_in_three_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"no vocabulary in .* needs tokenizer.json or vocab.json and merges.txt"):
        load_tokenizer(CLIPTokenizer, tmp_path, encoder)


def test_merges_that_end_early_are_missed(tmp_path: Path) -> None:
    encoder, merges = clip_in_three_files(tmp_path), tmp_path / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(DataError, match="3 of its pieces are made by no merge"):
        load_tokenizer(CLIPTokenizer, tmp_path, encoder)


def test_the_vocabulary_has_the_size_of_the_encoder_s_embeddings_or_a_little_less(tmp_path: Path) -> None:
    encoder = clip_in_three_files(tmp_path)
    pieces = encoder.vocab_size
    encoder.vocab_size = pieces + 30  # rows are often rounded up: 32128 for T5's 32100 pieces
    load_tokenizer(CLIPTokenizer, tmp_path, encoder)
    for rows in (pieces - 1, 3 * pieces):
        encoder.vocab_size = rows
        with pytest.raises(DataError, match=f"it has {pieces} pieces, and its text encoder {rows} embeddings"):
            load_tokenizer(CLIPTokenizer, tmp_path, encoder)


def test_one_file_alone_is_a_whole_tokenizer(tmp_path: Path) -> None:
    for cls, tokenizer in (
        (T5TokenizerFast, t5_tokenizer(PROMPTS)),
        (Qwen2Tokenizer, qwen2_tokenizer(PROMPTS, ("<|im_start|>", "<|im_end|>"))),
    ):
        folder = tmp_path / cls.__name__
        tokenizer.save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
        assert len(load_tokenizer(cls, folder)) == len(tokenizer)


def test_a_turn_s_token_that_is_away_is_missed(tmp_path: Path) -> None:
    qwen2_tokenizer(PROMPTS, ("<|im_start|>", "<|im_end|>")).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] != "<|im_start|>"]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"numbers '<.im_end.>' \d+, and it is \d+"):
        load_tokenizer(Qwen2Tokenizer, tmp_path)


def test_sentencepiece_alone_is_a_vocabulary_of_t5_and_of_no_other(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"read by sentencepiece")
    check_files(T5TokenizerFast, tmp_path)
    with pytest.raises(DataError, match="no vocabulary"):
        check_files(Qwen2Tokenizer, tmp_path)
