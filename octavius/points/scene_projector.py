"""Object-As-Scene, step 3: the objects of a scene → Q tokens of the LLM (Octavius, arXiv 2311.02684, section 3.2).

    k = v = h + f_PE(r)                          h [P, C] object features, r [P, 6] boxes, f_PE: 6 → 256 → C
    q = LN(MHCA(e, k, v; mask) + e)              e [Q, C] learned queries
    q = LN(MHSA(q) + q)
    z = LN(q W)                                  [Q, D]

Names of the parameters are those of upstream's checkpoints (`resampler_3d`, `pos_3d_proj`, `llama_proj_3d`).
"""

import torch
from torch import nn

from octavius.config import CloudConfig


class Attention(nn.Module):
    """Multi-head attention with output dropout, residual and post-norm, as upstream's.

    Rows of `mask` that hide everything give the residual alone, with zero gradient through the attention.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        names = ("fc_q", "fc_k", "fc_v", "fc_o")
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        for name in names:
            nn.init.xavier_uniform_(self.attention[name].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.attention[name].bias)  # type: ignore[arg-type]
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.heads = heads

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [N, Q, C], keys [N, P, C], mask [N, P] (True is seen) → [N, Q, C] and mean weights [N, Q, P]."""
        q, k, v = (
            self.attention[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, H, rows, C/H]
            for name, x in (("fc_q", queries), ("fc_k", keys), ("fc_v", keys))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [N, H, Q, P]
        if mask is not None:
            hidden = ~mask[:, None, None, :]
            # the lowest finite number, not -inf: a row without any object would be NaN
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        else:
            weights = scores.softmax(-1)
        mixed = self.attention["fc_o"]((weights @ v).transpose(1, 2).flatten(2))
        if mask is not None:
            mixed = mixed * mask.any(1)[:, None, None]
        return self.layer_norm(queries + self.dropout(mixed)), weights.mean(1)


class Resampler3D(nn.Module):
    """Learned queries that read the objects, then each other."""

    def __init__(self, queries: int, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.query_embed = nn.Embedding(queries, width)
        self.cross_attn = nn.ModuleList(Attention(width, heads, dropout) for _ in range(layers))
        self.self_attn = nn.ModuleList(Attention(width, heads, dropout) for _ in range(layers))

    def forward(self, objects: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.query_embed.weight.expand(len(objects), -1, -1)
        weights = objects.new_zeros(len(objects), x.shape[1], objects.shape[1])
        for cross, own in zip(self.cross_attn, self.self_attn, strict=True):
            x, weights = cross(x, objects, mask)
            x, _ = own(x, x)
        return x, weights


class SceneProjector(nn.Module):
    """Objects of a batch of scenes → the LLM's tokens, and the two markers around them.

    Args:
        width: C of the object features.
        dim: D of the LLM.
        mean, std: of the LLM's embeddings; the markers start at one, the tokens at the size of the other.
        config: queries, heads, layers and dropout of the resampler.
    """

    def __init__(self, width: int, dim: int, mean: torch.Tensor, std: float, config: CloudConfig):
        super().__init__()
        self.features = width
        self.pos_3d_proj = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, width))
        self.resampler_3d = Resampler3D(config.queries, width, config.heads, config.layers, config.dropout)
        self.llama_proj_3d = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        nn.init.constant_(self.llama_proj_3d[1].weight, std)  # type: ignore[arg-type]
        self.markers = nn.Parameter(mean.repeat(2, 1))  # <Pcl>, </Pcl>: [2, D]

    def forward(
        self, features: torch.Tensor, boxes: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, P, C], boxes [N, P, 6] in metres, mask [N, P] → tokens [N, Q, D], attention [N, Q, P]."""
        dtype = self.resampler_3d.query_embed.weight.dtype
        objects = features.to(dtype) + self.pos_3d_proj(boxes.to(dtype))
        queries, weights = self.resampler_3d(objects, mask)
        return self.llama_proj_3d(queries), weights
