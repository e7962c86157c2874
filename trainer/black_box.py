"""The gradient of a reward that has none, estimated at the student's final latent (docs/design.md, equation 15).

The student's last step ends in x. Around it lies a Gaussian policy N(x, s^2 I), s = `spread`, whose expected reward

    J(x) = E R(decode(x + s e)),  e ~ N(0, I)

is smooth in x for any R. Its gradient is the score-function estimator (REINFORCE; with a Gaussian over a point,
evolution strategies): grad J = E[R(decode(x + s e)) e] / s. Each e is used with its mirror image -e,

    g = 1/P sum_p [R(decode(x + s e_p)) - R(decode(x - s e_p))] / (2 s) e_p,

which is still unbiased, since e and -e are equally likely. It needs no baseline: what both rewards have in common
cancels. For a linear R, and for a quadratic one, E[g] is the gradient of R(decode(x)) itself; in general it is
that of R smoothed over s. Its relative error falls with sqrt(elements / pairs), so steps are averaged by batch and
optimizer.

g is then backpropagated through the student's last steps like any reward's gradient. It needs neither the likelihood of
a long chain nor a denoising loss, both of which blur few-step students.

Salimans et al. 2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"; Nesterov and
Spokoiny 2017, "Random Gradient-Free Minimization of Convex Functions"; Williams 1992 for the score function.
B samples, T latent tokens, C channels, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rats.schemas.train_params import BlackBoxParams
from rats.trainer.scoring import Scored

Decode = Callable[[Tensor], Tensor]
Score = Callable[[Tensor, list[str]], Scored]


def with_estimated_gradient(
    decode: Decode,
    score: Score,
    center: Scored,
    final_BTC: Tensor,
    prompts: Sequence[str],
    settings: BlackBoxParams,
    randoms: Sequence[torch.Generator],
) -> Scored:
    """The scores of `center`, with an estimated gradient to `final_BTC`.

    Args:
        decode: Latents (B, T, C) to images (B, 3, H, W) in [0, 1].
        score: `trainer.scoring.score` of one reward.
        center: What `score` gives for the decoded `final_BTC`; its own gradient, if it has one, is not used.
        final_BTC: The student's final latents.
        prompts: One for each sample.
        settings: Pairs for each sample, and the perturbation's standard deviation. Each pair decodes and scores two
            pictures.
        randoms: One generator for each sample, so that its perturbations do not depend on the micro-batch.

    A pair with a failed score is dropped. Without any good pair, a sample has its score and no gradient.
    """
    gradient_BTC = estimate_gradient(decode, score, final_BTC.detach().float(), prompts, settings, randoms)
    along_B = (gradient_BTC * final_BTC.float()).flatten(1).sum(1)
    # the value of the centre, the gradient of a linear function whose slope is the estimate
    values_B = center.scores_B.detach() + (along_B - along_B.detach())
    return Scored(torch.where(center.good_B, values_B, 0.0), center.good_B)


@torch.no_grad()
def estimate_gradient(
    decode: Decode,
    score: Score,
    x_BTC: Tensor,
    prompts: Sequence[str],
    settings: BlackBoxParams,
    randoms: Sequence[torch.Generator],
) -> Tensor:
    """The estimate g (B, T, C) from above, averaged over each sample's good pairs; 0 without any."""
    total_BTC = torch.zeros_like(x_BTC)
    good_B11 = x_BTC.new_zeros(len(x_BTC), 1, 1)
    for _ in range(settings.pairs):
        noise_BTC = perturbations(x_BTC, randoms)
        up = score(decode(x_BTC + settings.spread * noise_BTC), list(prompts))
        down = score(decode(x_BTC - settings.spread * noise_BTC), list(prompts))
        both_B = (up.good_B & down.good_B).to(x_BTC)
        slope_B = both_B * (up.scores_B - down.scores_B).to(x_BTC) / (2 * settings.spread)
        total_BTC += slope_B.view(-1, 1, 1) * noise_BTC
        good_B11 += both_B.view(-1, 1, 1)
    return total_BTC / good_B11.clamp(min=1)  # without a good pair the sum is 0


def perturbations(like_BTC: Tensor, randoms: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of the shape of `like_BTC`, by one generator for each sample, drawn on its device."""
    shape = like_BTC.shape[1:]
    noises = [torch.randn(shape, generator=random, device=random.device) for random in randoms]
    return torch.stack(noises).to(like_BTC)
