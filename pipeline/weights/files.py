"""Which files hold a component's weights, and how what is no such folder becomes one. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rats.pipeline.bounds import bounded_file
from rats.pipeline.weights.hashes import read_json
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import ModelParams

NAMES = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
"""What diffusers and transformers call weights: stem and ending. Those that come first are read first."""
COPIES = (None, "fp32", "bf16", "fp16")
"""Variants: copies in another dtype, such as model.fp16.safetensors. One is read where there is none before it."""
SETTINGS = (
    *("config.json", "generation_config.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
)
"""What diffusers and transformers read beside weights. They add a text encoder's adapters by themselves."""
TOKENIZER = "tokenizer"
VOCABULARY = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "tokenizer.*.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""Patterns of what transformers reads of a tokenizer. `vocabulary.check_files` refuses a class that reads more."""
ONE_FILE = (".safetensors", ".sft", ".ckpt", ".gguf")
"""Endings of a whole model in one file, as ComfyUI and the first releases of models have it."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that `from_pretrained(folder, variant=variant)` reads, in order."""

    paths: tuple[Path, ...]
    variant: str | None = None
    index: Path | None = None
    """What says which shard holds which weight."""

    @property
    def are_safe(self) -> bool:
        """Whether they are no pickles."""
        return self.paths[0].suffix == ".safetensors"

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(path.stat().st_size for path in self.paths)


def find_weights(folder: Path) -> WeightFiles | None:
    """The files of a component's weights, whole or in shards; None where there are none.

    Raises:
        ConfigError: a file that the index of the shards names is missing.
        DataError: a damaged index.
    """
    for variant in COPIES:
        for stem, ending in NAMES:
            dot = f".{variant}" if variant else ""
            whole, index = folder / f"{stem}{dot}.{ending}", folder / f"{stem}.{ending}.index{dot}.json"
            # of both, diffusers reads the shards and transformers the whole file
            if whole.is_file() and not (stem == NAMES[0][0] and index.is_file()):
                return WeightFiles((whole,), variant)
            if index.is_file():
                return WeightFiles(_shards(index), variant, index)
    return None


def opened_files(folder: Path, name: str) -> list[Path]:
    """The files that are read to open the component `name`: settings and the weights that are chosen, or a vocabulary.

    What else lies there, such as a README or weights that are not chosen, changes nothing. Raises as `find_weights`.
    """
    if name.startswith(TOKENIZER):
        return [path for pattern in VOCABULARY for path in folder.glob(pattern)]
    found = find_weights(folder)
    weights = [*found.paths, *([found.index] if found.index else [])] if found else []
    return [*weights, *(path for pattern in SETTINGS for path in folder.glob(pattern))]


def weight_files(folder: Path) -> WeightFiles:
    """The same. Raises ConfigError where there are none."""
    if found := find_weights(folder):
        return found
    if other := next(_single_files(folder), None):
        raise ConfigError(
            f"no weights in {folder} under a name of diffusers or transformers ({NAMES[0][0]}.safetensors, "
            f"{NAMES[1][0]}.safetensors): take {other.name} away, and fetch or export the component again"
        )
    raise ConfigError(f"no weights (.safetensors or .bin) in {folder}: fetch or export the model again")


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{index} names no files of weights (weight_map): fetch or export it again")
    paths = tuple(index.parent / name for name in sorted(set(names.values())))
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"no file {path}, which {index.name} names: fetch the model again")
    return paths


def check_layout(model: ModelParams, class_name: str) -> None:
    """Raises ConfigError for one file of weights, or a folder with nothing else, in place of a diffusers folder.

    `class_name`: of the family's network, which the command in the error calls.
    """
    for place in map(Path, filter(None, (model.path, model.transformer))):
        if place.is_file():
            raise ConfigError(_one_file(place, class_name, "rats reads folders in diffusers' format, and"))
        if place.is_dir() and not [*place.glob("config.json"), *place.glob("*/config.json")]:
            for file in _single_files(place):
                raise ConfigError(_one_file(file, class_name, f"no diffusers pipeline in {place}, and"))


def _single_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*")) if path.suffix in ONE_FILE and path.is_file())


def _is_lora(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    with suppress(OSError, ValueError, SafetensorError), safe_open(bounded_file(file), "np") as opened:
        return any("lora_" in name for name in opened.keys())  # noqa: SIM118
    return False  # a damaged one is no LoRA either


def _one_file(file: Path, class_name: str, before: str) -> str:
    """One line about a file of weights, with the command that makes a network's folder of it.

    `config`: without it, diffusers asks the hub for the configuration of the model that it takes the file for.
    """
    if _is_lora(file):
        return f"{before} {file} is a LoRA: name a pipeline's folder, and the LoRA under model.loras"
    dtype, then = "torch_dtype=torch.bfloat16", ""
    if file.suffix == ".gguf":  # with the package gguf
        dtype += ", quantization_config=d.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)"
        then = ".dequantize()"
    return (
        f'{before} {file} is one file of weights: write its network as a folder by `python -c "import torch, diffusers '
        f"as d; d.{class_name}.from_single_file('{file}', config='PIPELINE', subfolder='transformer', {dtype}){then}"
        ".save_pretrained('NETWORK')\"`, where PIPELINE is a diffusers folder of the same model; then set "
        "model.path=PIPELINE and model.transformer=NETWORK"
    )
