"""The miniature FLUX: flow matching on cached VAE latents, text encoders trained along with it.

Guidance is embedded as in FLUX.1-dev: half of each batch of the later steps learns, at a random scale, what
classifier-free guidance of the averaged network predicts (Meng et al., arXiv 2210.03142, stage one).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mini.resume import load_state, save_state
from mini.tokenizers import save_clip
from rats.pipeline.solver import guide

MAX_LENGTH = 10
"""Text tokens, for both encoders."""

LARGEST_GUIDANCE = 6.0
"""The embedded guidance is learned for scales from 1, which is none, to this one."""

GUIDED_FROM = 0.53
"""Share of the steps after which half of each batch learns guidance; before, the network has nothing to teach."""


def build_transformer() -> FluxTransformer2DModel:
    """3 double and 4 single blocks of width 192: 16 image tokens of 64 channels; guidance changes nothing yet."""
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        guidance_embeds=True,
        axes_dims_rope=(8, 20, 20),
    )
    last = network.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


def build_clip(tokenizer) -> CLIPTextModel:
    """Pooled prompt embedding, 96 wide, two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer) -> T5EncoderModel:
    """Prompt tokens, 96 wide, two layers."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return T5EncoderModel(config)


class Miniature(nn.Module):
    """Transformer and both text encoders, as one module to train."""

    def __init__(self, clip_tokenizer, t5_tokenizer):
        super().__init__()
        self.transformer = build_transformer()
        self.clip = build_clip(clip_tokenizer)
        self.t5 = build_t5(t5_tokenizer)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_LENGTH, 3), persistent=False)

    def forward(self, x_BTC: Tensor, sigma_B: Tensor, scale_B: Tensor, clip_BL: Tensor, t5_BL: Tensor) -> Tensor:
        """Velocity (B, 16, 64) at the embedded guidance `scale_B`."""
        return self.transformer(
            hidden_states=x_BTC,
            timestep=sigma_B,
            guidance=scale_B,
            pooled_projections=self.clip(clip_BL).pooler_output,
            encoder_hidden_states=self.t5(t5_BL)[0],
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


@dataclass
class Captions:
    """All prompts of training, tokenized once; `rows[drawing]` are (probability, caption id) lists."""

    clip: Tensor
    t5: Tensor
    choices: list[Tensor] = field(default_factory=list)
    nothing: int = 0
    """Row of the empty caption."""

    def empty(self) -> tuple[Tensor, Tensor]:
        """The empty caption, (1, L) for either encoder: what guidance leads away from."""
        return self.clip[self.nothing : self.nothing + 1], self.t5[self.nothing : self.nothing + 1]

    def pick(self, drawing_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A caption for each drawing, uniformly from its list (the list repeats what is frequent)."""
        draws = torch.rand(len(drawing_B), generator=generator).tolist()
        ids = [self.choices[d][int(r * len(self.choices[d]))] for d, r in zip(drawing_B.tolist(), draws, strict=True)]
        rows = torch.stack(ids)
        return self.clip[rows], self.t5[rows]


@torch.no_grad()
def guided_velocity(network: Miniature, x: Tensor, sigma: Tensor, scale: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
    """Classifier-free guidance of `network`, v_u + scale (v_c - v_u); `clip` and `t5` end with the empty caption."""
    count = len(x)
    rows = torch.cat([torch.arange(count), torch.full((count,), len(clip) - 1)])
    both = network(x.repeat(2, 1, 1), sigma.repeat(2), torch.ones(2 * count), clip[rows], t5[rows])
    conditional, unconditional = both.chunk(2)
    return guide(conditional, unconditional, scale[:, None, None])


@dataclass
class Batch:
    """Clean latents (B, 16, 64), their captions and the empty caption; the first `guided` rows learn guidance."""

    x0: Tensor
    clip: Tensor
    t5: Tensor
    empty: tuple[Tensor, Tensor]
    guided: int


def losses_of(model: Miniature, average: Miniature, batch: Batch, generator: torch.Generator) -> Tensor:
    """Squared error of each row: flow matching with logit-normal sigmas (arXiv 2403.03206, section 3.1) or guidance."""
    n, x0 = batch.guided, batch.x0
    sigma = torch.sigmoid(torch.randn(len(x0), generator=generator))
    eps = torch.randn(x0.shape, generator=generator)
    x = (1 - sigma)[:, None, None] * x0 + sigma[:, None, None] * eps
    target, scale = eps - x0, torch.ones(len(x0))
    if n:
        scale[:n] += (LARGEST_GUIDANCE - 1) * torch.rand(n, generator=generator)
        clip, t5 = torch.cat([batch.clip[:n], batch.empty[0]]), torch.cat([batch.t5[:n], batch.empty[1]])
        target[:n] = guided_velocity(average, x[:n], sigma[:n], scale[:n], clip, t5)
    return (model(x, sigma, scale, batch.clip, batch.t5) - target).square().mean((1, 2))


def draw(latents_DVTC: Tensor, captions: Captions, size: int, guided: int, generator: torch.Generator) -> Batch:
    """`size` random variants of random drawings, with captions of theirs."""
    d, v = (torch.randint(count, (size,), generator=generator) for count in latents_DVTC.shape[:2])
    return Batch(latents_DVTC[d, v], *captions.pick(d, generator), captions.empty(), guided)


def learning_rate(step: int, fraction: float, peak: float) -> float:
    """Warm-up over 200 steps, constant, then linear to 2 % over the last third."""
    return peak * min(1, (step + 1) / 200) * min(1, max(0.02, 3 * (1 - fraction)))


def train(
    model: Miniature,
    latents_DVTC: Tensor,
    captions: Captions,
    path: Path,
    steps: int,
    batch: int = 32,
    peak: float = 1e-3,
    until: int | None = None,
) -> Miniature:
    """Trains to step `until` of `steps`, over restarts; latents are (drawings, variants, 16, 64). Returns the EMA."""
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01)
    ema = EMAModel(model.parameters(), decay=0.9985, use_ema_warmup=True, power=0.75)
    state = load_state(path, model, optimizer)
    until = steps if until is None else until
    if "ema" in state:
        ema.load_state_dict(state.pop("ema"))
    average = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(2 + state["step"])
    plain, guidance = 1.0, 1.0
    while state["step"] < until:
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"], state["step"] / steps, peak)
        guided = batch // 2 if state["step"] >= GUIDED_FROM * steps else 0
        if guided and state["step"] % 10 == 0:
            ema.copy_to(average.parameters())
        losses = losses_of(model, average, draw(latents_DVTC, captions, batch, guided, generator), generator)
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        plain += 0.01 * (losses[guided:].mean().item() - plain)
        guidance += 0.01 * (losses[:guided].mean().item() - guidance) if guided else 0
        state["step"] += 1
        state["seconds"] += time.time() - start
        if state["step"] % 200 == 0:
            print(
                f"teacher step {state['step']} of {steps}, loss {plain:.4f}, guidance {guidance:.4f}, "
                f"{state['seconds']:.0f} s",
                flush=True,
            )
            save_state(path, model, optimizer, state | {"ema": ema.state_dict()})
    save_state(path, model, optimizer, state | {"ema": ema.state_dict()})
    ema.copy_to(model.parameters())
    return model.eval()


def save_pipeline(folder: Path, model: Miniature, vae, clip_tokenizer, t5_tokenizer) -> FluxPipeline:
    """The folder that `FluxPipeline.from_pretrained` loads; weights in fp16, to stay small."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=t5_tokenizer,
        transformer=model.transformer,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    save_clip(clip_tokenizer, folder / "tokenizer")
    # transformers 5 writes its own name of the class; this one is read by 4 and 5.
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    return pipe
