"""Training of the miniature FLUX: flow matching on cached VAE latents.

Three phases, each with a number of steps of its own: `plain` and `guided` at a constant rate, `decay` with a falling
one (warm-up, stable, decay: arXiv 2404.06395), so that the first can be made longer while it runs. From `guided` on
half of each batch learns, at a random scale, what classifier-free guidance of the averaged network predicts (Meng et
al., arXiv 2210.03142, stage one): guidance is embedded as in FLUX.1-dev.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini.resume import Saver, load_state
from mini.teacher import Miniature

LARGEST_GUIDANCE = 6.0
"""The embedded guidance is learned for scales from 1, which is none, to this one."""

SIGMA_MEAN, SIGMA_SPREAD = 0.8, 1.1
"""Of the normal variable whose sigmoid is sigma (arXiv 2403.03206, section 3.1). The mean is above zero because six
of our 16 latent channels hold nearly all of the variance, so that a shape is seen through more noise."""

PEAK, WARM_UP = 1e-3, 300
EMA_DECAY = 0.9995


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
        count = self.choices.shape[1]
        draws = torch.randint(count, drawing_B.shape, generator=generator, device=drawing_B.device)
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


TEACHER = Schedule(plain=24000, guided=6000, decay=6000)


@dataclass(frozen=True)
class Settings:
    """How fast and where: nothing here says what is learned, except the batch."""

    batch: int = 48
    device: str = "cpu"
    autocast: bool = True
    save_every: float = 300.0
    """Seconds."""
    log_every: int = 50


def fast_attention(device: str) -> contextlib.AbstractContextManager:
    """On a CPU torch's flash attention is a tenth slower than plain products at these lengths (its backward)."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()


def sigmas(size: int, generator: torch.Generator) -> Tensor:
    """Logit-normal noise levels, one from each of `size` equally likely strata: less noise in the gradient."""
    device = generator.device
    jitter = torch.rand(size, generator=generator, device=device)
    strata = (torch.randperm(size, generator=generator, device=device) + jitter) / size
    normal = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))
    return torch.sigmoid(SIGMA_MEAN + SIGMA_SPREAD * normal)


@dataclass
class Networks:
    """The network in training and its running average."""

    model: Miniature
    average: Miniature
    autocast: bool

    def velocity(self, network: Miniature, *arguments: Tensor) -> Tensor:
        """Of one of the two, in bf16 where that pays, as float32 (B, 16, 128)."""
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

    def losses(self, x0: Tensor, rows: Tensor, captions: Captions, n: int, generator: torch.Generator) -> Tensor:
        """Squared error of each row (B,): flow matching, or guidance for the first `n` rows."""
        device = x0.device
        sigma = sigmas(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        x = torch.lerp(x0, eps, sigma[:, None, None])
        target, scale = eps - x0, torch.ones(len(x0), device=device)
        if n:
            scale[:n] += (LARGEST_GUIDANCE - 1) * torch.rand(n, generator=generator, device=device)
            target[:n] = self.guided(x[:n], sigma[:n], scale[:n], rows[:n], captions)
        predicted = self.velocity(self.model, x, sigma, scale, captions.clip[rows], captions.t5[rows])
        return (predicted - target).square().mean((1, 2))


class Log:
    """Running means of both losses, a line every `every` steps."""

    def __init__(self, name: str, schedule: Schedule, every: int):
        self.name, self.schedule, self.every = name, schedule, every
        self.start, self.samples = time.time(), 0
        self.plain = self.guidance = math.nan

    def step(self, step: int, losses: Tensor, guided: int) -> None:
        """Takes the losses of one step in; one in five, because reading them makes a GPU wait."""
        self.samples += len(losses)
        if step % 5 == 0:
            self.plain = running(self.plain, losses[guided:])
            self.guidance = running(self.guidance, losses[:guided]) if guided else self.guidance
        if step % self.every == 0:
            seconds = time.time() - self.start
            phase, rate = self.schedule.phase(step), self.samples / seconds
            print(
                f"{self.name} step {step} of {self.schedule.total} ({phase}), loss {self.plain:.4f}, guidance "
                f"{self.guidance:.4f}, {seconds:.0f} s, {rate:.1f} samples/s",
                flush=True,
            )


def running(mean: float, losses: Tensor) -> float:
    """A mean that forgets, over some 25 values."""
    now = losses.mean().item()
    return now if math.isnan(mean) else mean + 0.04 * (now - mean)


class Training:
    """One network on its way through a schedule; goes on from the checkpoint at `path` if there is one."""

    def __init__(
        self, model: Miniature, latents_DVTC: Tensor, captions: Captions, path: Path, schedule: Schedule, how: Settings
    ):
        self.model, self.path, self.schedule, self.how = model.to(how.device), path, schedule, how
        self.latents, self.captions = latents_DVTC, captions.to(how.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.ema = EMAModel(model.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75, foreach=True)
        self.state = load_state(path, model, self.optimizer)
        if "ema" in self.state:
            self.ema.load_state_dict(self.state["ema"])
        self.ema.to(how.device)
        self.networks = Networks(model, copy.deepcopy(model).requires_grad_(False), how.autocast)
        self.ema.copy_to(self.networks.average.parameters())
        self.generator = torch.Generator(how.device).manual_seed(2 + self.state["step"])

    def run(self) -> Miniature:
        """Trains to the end of the schedule and returns the average.

        The state at the end of `plain` and of `guided` stays beside `path`, so that either can be made longer later.
        """
        saver, log = Saver(self.path, self.how.save_every), Log(self.path.stem, self.schedule, self.how.log_every)
        with fast_attention(self.how.device):
            while self.state["step"] < self.schedule.total:
                phase = self.schedule.phase(self.state["step"])
                guided = self.how.batch // 2 if phase != "plain" else 0
                losses = self.step(guided)
                log.step(self.state["step"], losses, guided)
                saver.offer(self.model, self.optimizer, self.state)
                if self.schedule.phase(self.state["step"]) != phase:
                    saver.save(self.model, self.optimizer, self.state)
                    shutil.copyfile(self.path, self.path.with_stem(f"{self.path.stem}-{phase}"))
        self.ema.copy_to(self.model.parameters())
        return self.model.eval()

    def step(self, guided: int) -> Tensor:
        """One update, the first `guided` rows of which learn guidance; returns the losses of all (B,)."""
        step = self.state["step"]
        if guided and step % 10 == 0:
            self.ema.copy_to(self.networks.average.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        x0, rows = self.draw()
        losses = self.networks.losses(x0, rows, self.captions, guided, self.generator)
        self.optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.state |= {"step": step + 1, "ema": self.ema.state_dict()}
        return losses.detach()

    def draw(self) -> tuple[Tensor, Tensor]:
        """Random variants of random drawings (B, 16, 128), and a caption's row for each."""
        drawings, variants = (self._random(count) for count in self.latents.shape[:2])
        home = self.latents.device
        x0 = self.latents[drawings.to(home), variants.to(home)].to(self.how.device).float()
        return x0, self.captions.pick(drawings, self.generator)

    def _random(self, count: int) -> Tensor:
        return torch.randint(count, (self.how.batch,), generator=self.generator, device=self.how.device)
