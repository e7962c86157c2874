"""The miniature FLUX: flow matching on cached VAE latents, text encoders trained along with it.

Three phases, each with a number of steps of its own: `plain` and `guided` at a constant rate, `decay` with a falling
one (warm-up, stable, decay: arXiv 2404.06395), so that the first can be made longer while it runs. From `guided` on
half of each batch learns, at a random scale, what classifier-free guidance of the averaged network predicts (Meng et
al., arXiv 2210.03142, stage one): guidance is embedded as in FLUX.1-dev.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mini.resume import Saver, load_state
from mini.tokenizers import save_clip

MAX_LENGTH = 8
"""Text tokens, for both encoders: our longest caption. Each costs as much as an image token."""

LARGEST_GUIDANCE = 6.0
"""The embedded guidance is learned for scales from 1, which is none, to this one."""

SIGMA_MEAN, SIGMA_SPREAD = 0.4, 1.1
"""Of the normal variable whose sigmoid is sigma (arXiv 2403.03206, section 3.1). The mean is above zero because
four times the pixels carry a shape through more noise."""

PEAK, WARM_UP = 1e-3, 300
EMA_DECAY = 0.9995


def build_transformer() -> FluxTransformer2DModel:
    """2 double and 6 single blocks of width 256: 64 image tokens of 64 channels; guidance changes nothing yet."""
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
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
        image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_LENGTH, 3), persistent=False)

    def forward(self, x_BTC: Tensor, sigma_B: Tensor, scale_B: Tensor, clip_BL: Tensor, t5_BL: Tensor) -> Tensor:
        """Velocity (B, 64, 64) at the embedded guidance `scale_B`."""
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
    """All prompts of training, tokenized once; `choices` (drawings, 40) are rows of `clip` and `t5`."""

    clip: Tensor
    t5: Tensor
    choices: Tensor
    nothing: int
    """Row of the empty caption: what guidance leads away from."""

    def pick(self, drawing_B: Tensor, generator: torch.Generator) -> Tensor:
        """A caption's row for each drawing, uniformly from its list (the list repeats what is frequent)."""
        draws = torch.randint(self.choices.shape[1], drawing_B.shape, generator=generator, device=drawing_B.device)
        return self.choices[drawing_B, draws]

    def to(self, device: str) -> Captions:
        """The same on another device."""
        return Captions(self.clip.to(device), self.t5.to(device), self.choices.to(device), self.nothing)


@dataclass(frozen=True)
class Schedule:
    """Steps of the three phases."""

    plain: int
    guided: int
    decay: int

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.plain + self.guided + self.decay

    def phase(self, step: int) -> str:
        """The phase of a step, "done" after the last."""
        ends = {"plain": self.plain, "guided": self.plain + self.guided, "decay": self.total}
        return next((name for name, end in ends.items() if step < end), "done")

    def rate(self, step: int) -> float:
        """Learning rate: warm-up, constant, then linear to 1 % over the decay."""
        left = (self.total - step) / max(self.decay, 1)
        return PEAK * min(1, (step + 1) / WARM_UP) * min(1, max(0.01, left))


@dataclass
class Trainee:
    """The network in training and its running average."""

    model: Miniature
    average: Miniature
    autocast: bool

    def velocity(self, network: Miniature, *arguments: Tensor) -> Tensor:
        """One of the two, in bf16 where that pays, as float32."""
        with torch.autocast(arguments[0].device.type, torch.bfloat16, enabled=self.autocast):
            return network(*arguments).float()

    @torch.no_grad()
    def guided(self, x: Tensor, sigma: Tensor, scale: Tensor, rows: Tensor, captions: Captions) -> Tensor:
        """Classifier-free guidance of the average, v_u + scale (v_c - v_u)."""
        rows = torch.cat([rows, torch.full_like(rows, captions.nothing)])
        scales = torch.ones(len(rows), device=x.device)
        clip, t5 = captions.clip[rows], captions.t5[rows]
        both = self.velocity(self.average, x.repeat(2, 1, 1), sigma.repeat(2), scales, clip, t5)
        conditional, unconditional = both.chunk(2)
        return unconditional + scale[:, None, None] * (conditional - unconditional)


def sigmas(size: int, generator: torch.Generator) -> Tensor:
    """Logit-normal noise levels, one from each of `size` equally likely strata: less noise in the gradient."""
    jitter = torch.rand(size, generator=generator, device=generator.device)
    strata = (torch.randperm(size, generator=generator, device=generator.device) + jitter) / size
    normal = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))
    return torch.sigmoid(SIGMA_MEAN + SIGMA_SPREAD * normal)


def losses_of(trainee: Trainee, x0: Tensor, rows: Tensor, captions: Captions, n: int, generator: torch.Generator):
    """Squared error of each row (B,): flow matching, or guidance for the first `n` rows."""
    device = x0.device
    sigma = sigmas(len(x0), generator)
    eps = torch.randn(x0.shape, generator=generator, device=device)
    x = torch.lerp(x0, eps, sigma[:, None, None])
    target, scale = eps - x0, torch.ones(len(x0), device=device)
    if n:
        scale[:n] += (LARGEST_GUIDANCE - 1) * torch.rand(n, generator=generator, device=device)
        target[:n] = trainee.guided(x[:n], sigma[:n], scale[:n], rows[:n], captions)
    predicted = trainee.velocity(trainee.model, x, sigma, scale, captions.clip[rows], captions.t5[rows])
    return (predicted - target).square().mean((1, 2))


class Log:
    """Running means of both losses, a line every `every` steps."""

    def __init__(self, schedule: Schedule, every: int):
        self.schedule, self.every, self.start, self.steps = schedule, every, time.time(), 0
        self.plain = self.guidance = float("nan")

    def step(self, step: int, losses: Tensor, guided: int) -> None:
        """Takes the losses of one step in."""
        self.steps += 1
        if self.steps % 5 == 0 or self.steps == 1:
            self.plain = _running(self.plain, losses[guided:])
            self.guidance = _running(self.guidance, losses[:guided]) if guided else self.guidance
        if step % self.every == 0:
            seconds = time.time() - self.start
            print(
                f"teacher step {step} of {self.schedule.total} ({self.schedule.phase(step)}), loss {self.plain:.4f}, "
                f"guidance {self.guidance:.4f}, {seconds:.0f} s, {self.steps * len(losses) / seconds:.1f} samples/s",
                flush=True,
            )


def _running(mean: float, losses: Tensor) -> float:
    now = losses.mean().item()
    return now if mean != mean else mean + 0.04 * (now - mean)


def fast_attention(device: str) -> contextlib.AbstractContextManager:
    """On a CPU torch's flash attention is a tenth slower than plain products at these lengths (its backward)."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()


@dataclass(frozen=True)
class Settings:
    """How fast and where: nothing here says what is learned, except the batch."""

    batch: int = 48
    device: str = "cpu"
    autocast: bool = True
    save_every: float = 300.0
    """Seconds."""
    log_every: int = 50


def train(
    model: Miniature, latents_DVTC: Tensor, captions: Captions, path: Path, schedule: Schedule, settings: Settings
) -> Miniature:
    """Trains through the schedule, over restarts; latents are (drawings, variants, 64, 64). Returns the average.

    The state at the end of `plain` and of `guided` is kept beside `path`, so that the phase can be made longer later.
    """
    device = settings.device
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = EMAModel(model.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    state = load_state(path, model, optimizer)
    if "ema" in state:
        ema.load_state_dict(state["ema"])
    ema.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    ema.copy_to(average.parameters())
    trainee, captions = Trainee(model, average, settings.autocast), captions.to(device)
    generator = torch.Generator(device).manual_seed(2 + state["step"])
    saver, log = Saver(path, settings.save_every), Log(schedule, settings.log_every)
    with fast_attention(device):
        while state["step"] < schedule.total:
            phase, step = schedule.phase(state["step"]), state["step"]
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            guided = settings.batch // 2 if phase != "plain" else 0
            if guided and step % 10 == 0:
                ema.copy_to(average.parameters())
            d, v = (
                torch.randint(count, (settings.batch,), generator=generator, device=device)
                for count in latents_DVTC.shape[:2]
            )
            x0 = latents_DVTC[d.to(latents_DVTC.device), v.to(latents_DVTC.device)].to(device).float()
            losses = losses_of(trainee, x0, captions.pick(d, generator), captions, guided, generator)
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.step(model.parameters())
            state["step"] += 1
            log.step(state["step"], losses.detach(), guided)
            state["ema"] = ema.state_dict()
            saver.offer(model, optimizer, state)
            if schedule.phase(state["step"]) != phase:
                saver.save(model, optimizer, state)
                shutil.copyfile(path, path.with_stem(f"{path.stem}-{phase}"))
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
