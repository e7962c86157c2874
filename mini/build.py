"""One command trains everything below `assets/`: `python -m mini.build --cache DIR --work DIR`.

Each stage resumes from its checkpoint in the work folder; the seeds are fixed. `--scale 0.01` tries the whole
chain out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline

from mini import build_rewards, data, prompts, teacher, vae
from mini.concepts import CONCEPTS, STYLES, is_held_out
from mini.tokenizers import clip_tokenizer, t5_tokenizer

STEPS = {"vae": 1700, "teacher": 15000}


def load_pictures(cache: Path, work: Path) -> np.ndarray:
    """All variants, (concepts, styles, variants, 32, 32, 3) uint8, made once."""
    path = work / "pictures.npy"
    if not path.exists():
        np.save(path, data.pictures(data.load_drawings(data.fetch(cache))))
    return np.load(path, mmap_mode="r")


def load_keywords(cache: Path) -> dict[str, list[str]]:
    """Keyword prompts by concept name."""
    return prompts.keyword_prompts({k: e.get("tags", []) for k, e in data.load_labels(data.fetch(cache)).items()})


def build_vae(pictures: np.ndarray, work: Path, steps: int) -> AutoencoderKL:
    """Trains the autoencoder, then sets shift and scale so that latents have mean 0 and deviation 1."""
    flat = pictures.reshape(-1, *pictures.shape[3:])
    model = vae.train(flat, work, steps)
    latents = vae.encode(model, flat[::7])
    model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    print(f"vae PSNR {vae.psnr(model, flat[::97]):.2f} dB", flush=True)
    return model


def seen_drawings() -> list[tuple[int, int]]:
    """The (concept, style) pairs that the teacher learns from."""
    return [(c, s) for c in range(len(CONCEPTS)) for s in range(len(STYLES)) if not is_held_out(c, s)]


def packed_latents(model: AutoencoderKL, pictures: np.ndarray, work: Path) -> torch.Tensor:
    """Normalised latents of the seen drawings, (drawings, variants, 16, 64), made once."""
    path = work / "latents.pt"
    if not path.exists():
        seen = np.stack([pictures[c, s] for c, s in seen_drawings()])
        z = vae.encode(model, seen.reshape(-1, *seen.shape[2:]))
        z = (z - model.config.shift_factor) * model.config.scaling_factor
        packed = FluxPipeline._pack_latents(z, len(z), 16, 8, 8)
        torch.save(packed.reshape(*seen.shape[:2], 16, 64), path)
    return torch.load(path, weights_only=True)


def tokenize(captions: list[list[str]], clip, t5) -> teacher.Captions:
    """Every different caption once; each drawing's list points into them."""
    texts = sorted({text for texts in captions for text in texts})
    rows = {text: i for i, text in enumerate(texts)}
    arguments = {"padding": "max_length", "max_length": teacher.MAX_LENGTH, "truncation": True, "return_tensors": "pt"}
    choices = [torch.tensor([rows[text] for text in texts]) for texts in captions]
    ids = clip(texts, **arguments).input_ids, t5(texts, **arguments).input_ids
    return teacher.Captions(*ids, choices, rows[""])


def build(cache: Path, work: Path, assets: Path, scale: float) -> None:
    """VAE, two fifths of the teacher, the rewards (that teacher's samples are among the losers), the rest of it."""
    pictures, keywords = load_pictures(cache, work), load_keywords(cache)
    steps = {name: int(count * scale) for name, count in STEPS.items()}
    model_vae = build_vae(pictures, work, steps["vae"])
    captions = [prompts.captions_of(c, s, keywords) for c, s in seen_drawings()]
    texts = sorted({text for texts in captions for text in texts})
    clip, t5 = clip_tokenizer(texts, teacher.MAX_LENGTH), t5_tokenizer(texts)
    table, latents = tokenize(captions, clip, t5), packed_latents(model_vae, pictures, work)

    def draw(folder: Path, until: int) -> None:
        torch.manual_seed(1)
        model = teacher.Miniature(clip, t5)
        teacher.train(model, latents, table, work / "teacher.pt", steps["teacher"], until=until)
        teacher.save_pipeline(folder, model, model_vae, clip, t5)

    draw(work / "half-trained", steps["teacher"] * 2 // 5)
    build_rewards.build_all(pictures, work / "half-trained", keywords, work, assets, scale)
    draw(assets / "flux-mini", steps["teacher"])
    prompts.write_splits(assets / "prompts", keywords)
    build_rewards.write_judge(pictures, assets / "judge" / "real.safetensors")


def main() -> None:
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="npm packages are fetched here")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and cached latents")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    build(arguments.cache, arguments.work, arguments.assets, arguments.scale)


if __name__ == "__main__":
    main()
