"""Model folders as people bring them: each entry of `BROKEN` spoils a copy of a tiny one in one way."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support.model_fuzz import replace

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
PAD = "tokenizer/tokenizer_config.json"

Break = Callable[[Path], None]


def remove(*names: str) -> Break:
    """Files that are not there."""

    def breaks(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return breaks


def fields(name: str, **changes: Any) -> Break:
    """A JSON file with other fields; a field of value `remove` is not there."""

    def breaks(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        kept = {field: value for field, value in content.items() if value is not remove}
        replace(folder / name, json.dumps(kept).encode())

    return breaks


def content(name: str, data: bytes) -> Break:
    """A file of other bytes."""
    return lambda folder: replace(folder / name, data)


def cut_off(name: str) -> Break:
    """A download that ended early."""
    return lambda folder: replace(folder / name, (folder / name).read_bytes()[:-100])


def moved(name: str, to: str) -> Break:
    """A folder or file under another's name."""
    return lambda folder: replace(folder / to, (folder / name).read_bytes())


def fewer_merges(folder: Path) -> None:
    """A tokenizer whose later merges are lost: its vocabulary keeps its size, and words fall apart."""
    path = folder / "tokenizer/tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = values["model"]["merges"][:7]
    replace(path, json.dumps(values).encode())


def four_pieces(folder: Path) -> None:
    """A tokenizer of four pieces, as transformers makes one for want of a vocabulary."""
    path = folder / "tokenizer_2/tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] = values["model"]["vocab"][:4]
    replace(path, json.dumps(values).encode())


def another_tensor(name: str, folder: Path) -> None:
    """A file of weights with one more tensor than its network has."""
    state = load_file(folder / name)
    state["blocks_of_another.weight"] = next(iter(state.values())).clone()
    (folder / name).unlink()
    save_file(state, folder / name, {"format": "pt"})


def pickled(folder: Path) -> None:
    """Weights that are a pickle, and a damaged one."""
    (folder / "text_encoder" / TEXT_WEIGHTS).unlink()
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"\x80\x04not a pickle")


def slow_only(folder: Path) -> None:
    """A vocabulary of SentencePiece alone, whose package is not installed here, or which is damaged where it is."""
    (folder / "tokenizer_2/tokenizer.json").unlink()
    (folder / "tokenizer_2/spiece.model").write_bytes(b"\x0a\x0e\x0a\x05")


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 256}
SHALLOW = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
BROKEN: dict[str, tuple[str, Break, str]] = {
    # tokenizers
    "flux: CLIP without vocabulary": ("flux", remove("tokenizer/tokenizer.json"), "tokenizer needs|no vocabulary"),
    "flux: T5 without vocabulary": ("flux", remove("tokenizer_2/tokenizer.json"), "tokenizer_2: a T5Tokenizer"),
    "sd3: T5 without vocabulary": ("sd3", remove("tokenizer_3/tokenizer.json"), "no vocabulary in .*tokenizer_3"),
    "sd3: CLIP-G without vocabulary": ("sd3", remove("tokenizer_2/tokenizer.json"), "no vocabulary in .*tokenizer_2"),
    "qwen: without vocabulary": ("qwen-image", remove("tokenizer/tokenizer.json"), "no vocabulary in .*tokenizer"),
    "flux2: without vocabulary": ("flux2", remove("tokenizer/tokenizer.json"), "no vocabulary in .*tokenizer"),
    "wan: without vocabulary": ("wan", remove("tokenizer/tokenizer.json"), "no vocabulary in .*tokenizer"),
    "a vocabulary of four pieces": ("flux", four_pieces, "has 4 pieces, and its text encoder 92 embeddings"),
    "merges lost": ("flux", fewer_merges, "are made by no merge"),
    "no tokenizer_config.json": ("flux", remove("tokenizer/tokenizer_config.json"), "tokenizer"),
    "no padding token": ("qwen-image", fields(PAD, pad_token=None), "no padding token"),
    "CLIP of another length": ("flux", fields(PAD, model_max_length=7), "model_max_length is 7, .* 8 positions"),
    "a made-up end token": ("flux", fields(PAD, eos_token="fox"), "eos_token 'fox' is no special token"),
    "SentencePiece alone": ("flux", slow_only, "tokenizer_2 .*sentencepiece|tokenizer_2 does not load"),
    "no chat template": ("flux2", remove("tokenizer/chat_template.jinja"), "chat_template|chat template"),
    "another chat template": ("flux2", content("tokenizer/chat_template.jinja", b"{{ messages }}"), "not Qwen3's"),
    # weights that are not the configuration's
    "fewer single blocks": ("flux", fields("transformer/config.json", num_single_layers=0), "has no place for|no pos"),
    "more blocks": ("flux", fields("transformer/config.json", num_layers=2), "lacks .* weights"),
    "fewer blocks": ("sd3", fields("transformer/config.json", num_layers=1), "has no place for|another shape|weights"),
    "fewer layers of Qwen3": ("flux2", fields("text_encoder/config.json", **SHALLOW), "has 5 layers"),
    "a tensor too many": ("wan", partial(another_tensor, f"transformer/{WEIGHTS}"), "1 weights .*blocks_of_another"),
    "a cut network": ("flux", cut_off(f"transformer/{WEIGHTS}"), f"transformer/{WEIGHTS} does not load"),
    "a cut encoder": ("flux", cut_off(f"text_encoder_2/{TEXT_WEIGHTS}"), f"text_encoder_2/{TEXT_WEIGHTS} does not"),
    "an error page for weights": ("flux", content(f"vae/{WEIGHTS}", b"<html>404</html>"), f"vae/{WEIGHTS} does not"),
    "another part's weights": ("flux", moved(f"vae/{WEIGHTS}", f"transformer/{WEIGHTS}"), "transformer"),
    "a damaged pickle": ("flux", pickled, "no weights|pytorch_model.bin does not load as CLIPTextModel"),
    "no weights": ("flux", remove(f"vae/{WEIGHTS}"), "no weights|vae does not load"),
    "NF4": ("flux", fields("transformer/config.json", quantization_config=BNB), "quantized weights .'bitsandbytes'"),
    # configurations
    "no configuration": ("flux", remove("text_encoder/config.json"), "no file .*text_encoder/config.json"),
    "a configuration cut off": ("flux", cut_off("vae/config.json"), "vae/config.json is not readable as JSON"),
    "a list for a configuration": ("flux", content("transformer/config.json", b"[]"), "must hold a JSON object"),
    "no heads": ("flux", fields("text_encoder/config.json", num_attention_heads=0), "text_encoder"),
    "CLIP that states no end": ("sd3", fields("text_encoder/config.json", eos_token_id=remove), "its end token is"),
    "words for a width": ("flux", fields("transformer/config.json", attention_head_dim="wide"), "is 'wide', no pos"),
    "a VAE that states no scale": ("flux", fields("vae/config.json", scaling_factor=remove), "lacks scaling_factor"),
    # parts that do not fit each other
    "a T5 of another width": ("flux", fields("text_encoder_2/config.json", d_model=24), "hidden_size is 24"),
    "a VAE of 16 channels": ("flux", fields("vae/config.json", latent_channels=16), "in_channels is 16, 4 x vae's"),
    "rotary axes of another width": ("flux", fields("transformer/config.json", axes_dims_rope=[4, 4, 4]), "is 12, "),
    "a tiny autoencoder": ("flux", fields("vae/config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "another network": ("sd3", fields("transformer/config.json", _class_name="FluxTransformer2DModel"), "not a SD3"),
    "UMT5 for T5": ("flux", fields("text_encoder_2/config.json", model_type="umt5"), "model_type 'umt5'"),
    "a VAE without a mean": ("wan", fields("vae/config.json", latents_mean=[0.1, 0.2]), "latents_mean is 2, "),
    "guidance as an input": (
        "flux2",
        fields("transformer/config.json", guidance_embeds=True),
        "guidance_embeds is true",
    ),
    # scheduler and index
    "another sampler": ("flux", fields("scheduler/scheduler_config.json", _class_name="DDIM"), "scheduler is DDIM"),
    "a scheduler without shift": ("flux", fields("scheduler/scheduler_config.json", shift=remove), "lacks shift"),
    "words for a shift": ("flux", fields("scheduler/scheduler_config.json", shift="three"), "scheduler"),
    "equal lengths of a shift": ("flux", fields("scheduler/scheduler_config.json", **DYNAMIC), "are both 256, between"),
    "another pipeline": ("flux", fields("model_index.json", _class_name="ZImagePipeline"), "draws as a ZImagePipeline"),
    "an index of nothing": ("flux", fields("model_index.json", _class_name=remove), "names no pipeline"),
    "an index cut off": ("flux", cut_off("model_index.json"), "model_index.json is not readable as JSON"),
}
"""By description: the family, what spoils its folder, and what the refusal says."""
