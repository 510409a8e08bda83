"""From the tower's tokens to the LLM's."""

import torch
from torch import nn


class Projector(nn.Module):
    """Tower tokens [N, P, C] → LLM tokens [N, P, D]: linear (the paper's) or two-layer MLP, and learned positions.

    `calibrate` makes it see standardised channels; without, it is the plain projection.
    """

    mean: torch.Tensor
    std: torch.Tensor
    limit: torch.Tensor

    def __init__(self, tokens: int, width: int, dim: int, kind: str, std: float):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("limit", torch.tensor(float("inf")))
        layers: list[nn.Module] = [] if kind == "linear" else [nn.Linear(width, dim), nn.GELU()]
        last = nn.Linear(dim if layers else width, dim)
        nn.init.normal_(last.weight, std=std / last.in_features**0.5)  # start at the size of the text's embeddings
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)
        self.positions = nn.Parameter(torch.zeros(tokens, dim))

    @torch.no_grad()
    def calibrate(self, features: torch.Tensor) -> None:
        """Take every channel's mean and standard deviation from features [n, P, C] of the training images.

        Channels of a tower differ in scale by orders of magnitude; standardised, they learn at one rate. Values are cut
        at 5 standard deviations, since channels that are almost always 0 would reach hundreds.
        """
        features = features.float()
        self.mean.copy_(features.mean((0, 1)))
        self.std.copy_(features.std((0, 1)) + 1e-2)
        self.limit.fill_(5.0)

    def standard(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the first layer sees them, in float32."""
        return ((features.float() - self.mean) / self.std).clamp(-self.limit, self.limit)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.net(self.standard(features).to(self.positions.dtype)) + self.positions
