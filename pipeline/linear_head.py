"""Five linear layers without activations between them: what ImageReward and LAION's aesthetic predictor end in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

POSITIONS = (0, 2, 4, 6, 7)
"""Upstream's numbers: dropouts lie at 1, 3 and 5, which do nothing in eval mode."""


def head_widths(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """The head's widths, its input first and 1 last, read from its tensors. Raises KeyError when one is missing."""
    weights = [state[f"{prefix}{position}.weight"] for position in POSITIONS]
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]


class LinearHead(nn.ModuleDict):
    """The layers under upstream's numbers."""

    def __init__(self, widths: Sequence[int]) -> None:
        """`widths`: six, as `head_widths` gives them."""
        pairs = zip(POSITIONS, widths[:-1], widths[1:], strict=True)
        super().__init__({str(position): nn.Linear(a, b) for position, a, b in pairs})

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Scores (B,)."""
        for layer in self.values():
            hidden_BD = layer(hidden_BD)
        return hidden_BD[:, 0]
