"""The random generators with a state: torch's, numpy's and Python's global ones.

The random numbers of `rats` itself follow from (seed, step, place in the batch). Rewards and networks may use these.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rats.schemas.errors import DataError, reason


def generator(seed: int, step: int, purpose: str = "augment", index: int = 0) -> torch.Generator:
    """A generator for one purpose at one place of the run. It depends on the arguments alone."""
    digest = hashlib.sha256(f"{purpose} {seed} {step} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_all(seed: int) -> None:
    """Seeds the global generators of a rank at the start of a run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, Tensor]:
    """The global generators' states by name; "cuda.0" and so on where there is CUDA."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    return states | {f"cuda.{i}": state for i, state in enumerate(_cuda_states())}


def restore(states: Mapping[str, Tensor]) -> None:
    """Restores what `capture` gave. Raises DataError if the state of a generator is missing or damaged."""
    missing = sorted(capture().keys() - states.keys())
    if missing:
        raise DataError(f"the checkpoint has no state of the generator {missing[0]}: start over with --force")
    try:
        _put(states)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"the checkpoint's generators are damaged ({reason(error)}): start over with --force"
        ) from error


def _put(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy.rest"].tolist()
    keys = states["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, *words = states["python.words"].tolist()
    random.setstate((version, tuple(words), next(iter(states["python.gauss"].tolist()), None)))
    for i in range(len(_cuda_states())):
        torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
