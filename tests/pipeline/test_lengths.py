"""The line about prompts that are cut, and how many calls of a tokenizer it takes."""

from __future__ import annotations

from typing import Any

from mini.tokenizers import t5_tokenizer
from rats.pipeline.lengths import AT_ONCE, Window, read_lengths

WORDS = "a red fox at night"


class Counting:
    """A tokenizer, and how many texts it was given at a time."""

    def __init__(self) -> None:
        self.tokenizer, self.calls = t5_tokenizer([WORDS]), list[int]()

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(len(texts))
        return self.tokenizer(texts, **options)


def test_many_prompts_are_a_few_calls_and_only_long_ones_are_cut():
    counting = Counting()
    prompts = [f"a fox {'red ' * (number % 7)}" + f"{number}" for number in range(2 * AT_ONCE + 3)]
    lengths = read_lengths([Window(counting, 9)], prompts)
    sizes = [len(counting.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    longer = [sum(size > 9 for size in sizes[start : start + AT_ONCE]) for start in range(0, len(sizes), AT_ONCE)]
    assert counting.calls == [
        count for pair in zip([AT_ONCE, AT_ONCE, 3], longer, strict=True) for count in pair if count
    ]
    assert lengths.cuts[0].prompts == sum(longer) and lengths.cuts[0].longest == max(sizes)


def text(prompts: list[str], negative: str | None = None, **window: Any) -> str:
    return read_lengths([Window(t5_tokenizer([WORDS]), 4, **window)], prompts, negative).text


def test_the_line_for_a_reader():
    fits, long, longer = "a red fox", "a red fox at", "a red fox at night night"
    assert text([fits]) == "all are read whole; the longest has 4 of 4 tokens"
    assert text([long]) == "the prompt is longer than max_sequence_length 4 (longest 5 tokens): the rest is not read"
    assert text(["a fox", longer], long) == (
        "1 of 2 prompts is longer than max_sequence_length 4 (longest 7 tokens), so is the negative prompt (5 tokens): "
        "the rest is not read"
    )
    assert text([fits, "fox"], long) == (
        "longer than max_sequence_length 4 is the negative prompt (5 tokens): the rest is not read"
    )
    assert text([fits, long, longer, "fox"], rest="that is it").endswith(
        "2 of 4 prompts are longer than max_sequence_length 4 (longest 7 tokens): that is it; "
        "2 of 4 prompts are read as the same tokens as another one"
    )


def test_prompts_are_alike_only_where_every_encoder_reads_them_so():
    short, whole = Window(t5_tokenizer([WORDS]), 3, "a", is_lost=False), Window(t5_tokenizer([WORDS]), 9, "b")
    prompts = ["a red fox", "a red night", "a red"]
    assert read_lengths([short], prompts).alike == 2
    both = read_lengths([short, whole], prompts)
    assert both.alike == 0 and [cut.limit for cut in both.cuts] == ["b", "a"]
