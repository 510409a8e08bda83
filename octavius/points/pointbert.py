"""Point-BERT: the points of one object → one vector (Yu et al. 2022, the form that ULIP, Xue et al. 2023, trains).

    groups: G centres by farthest-point sampling, the K nearest points of each, relative to it
    tokens = reduce_dim(mini-PointNet(groups))        pos = pos_embed(centres)
    x = norm(blocks([cls, tokens], + pos before every block))
    feature = [x_cls, max over tokens x]              [2 · width]

Names of the parameters are those of ULIP's checkpoints, which load by path.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import torch
from moe_lora import storage
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear

from octavius.assets import registry
from octavius.config import from_dict
from octavius.points.cloud import PointCloud

WEIGHTS = "pointbert.safetensors"
RECIPE = 2  # of the presets' training and its data: raise it whenever the same settings give another encoder
PREFIXES = ("module.", "point_encoder.")
UNREADABLE = (  # what torch and safetensors raise on files that are not there, cut short, hostile or another's
    OSError, EOFError, RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError,
    UnpicklingError, SafetensorError,
)  # fmt: skip
CHUNK = 64  # groups that go through the mini-PointNet at once when nothing is trained
SMALLEST = 0.01  # metres: thinner objects all count as this thin


@dataclass(frozen=True)
class PointBertConfig:
    """Sizes; the defaults are the paper's, PRESETS["small"] the embedded default's.

    channels: 3 reads xyz alone, 6 colours too; points: drawn from an object, whatever it has; metric: the class token's
    position also tells the object's size in metres, which the normalised coordinates do not.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    groups: int = 512
    group_size: int = 32
    patch_width: int = 256
    channels: int = 3
    points: int = 2048
    drop_path: float = 0.1
    metric: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (3, 6):
            raise ValueError(f"channels must be 3 (xyz) or 6 (xyz, rgb), got {self.channels}")
        if self.group_size > self.points or self.groups > self.points:
            raise ValueError(f"points must be at least groups and group_size, got {self}")


PRESETS = {
    "small": PointBertConfig(
        width=192,
        depth=3,
        heads=3,
        groups=32,
        group_size=16,
        patch_width=128,
        channels=6,
        points=512,
        drop_path=0.05,
        metric=True,
    ),
    "ulip": PointBertConfig(),
}


class PointBert(nn.Module):
    """Objects [B, n, channels] in metres → features [B, 2·width]."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.config = config
        self.encoder = MiniPointNet(config.channels, config.patch_width)
        self.reduce_dim = nn.Linear(config.patch_width, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, config.width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, config.width))
        if config.metric:
            self.size_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, config.width))
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(Block(config) for _ in range(config.depth))})
        self.norm = nn.LayerNorm(config.width)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_pos, std=0.02)

    @property
    def features(self) -> int:
        return 2 * self.config.width

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        points, size = normalise(points)
        groups, centres = group(points, self.config.groups, self.config.group_size)
        groups, centres, size = (tensor.to(self.cls_token.dtype) for tensor in (groups, centres, size))
        tokens = self.reduce_dim(self.encoder(groups))  # [B, G, width]
        batch = len(points)
        x = torch.cat((self.cls_token.expand(batch, -1, -1), tokens), 1)
        cls_pos = self.cls_pos.expand(batch, -1, -1)
        if self.config.metric:
            cls_pos = cls_pos + self.size_embed(size.clamp(min=SMALLEST).log())[:, None]
        pos = torch.cat((cls_pos, self.pos_embed(centres)), 1)
        for block in self.blocks["blocks"]:  # type: ignore[union-attr]
            x = block(x + pos)
        x = self.norm(x)
        return torch.cat((x[:, 0], x[:, 1:].amax(1)), -1)

    def save(self, folder: Path) -> None:
        """Write weights and sizes; `load_pointbert` reads them."""
        metadata = {"config": json.dumps(dataclasses.asdict(self.config))}
        with storage.staged(folder) as draft:
            save_file(self.state_dict(), draft / WEIGHTS, metadata=metadata)


class MiniPointNet(nn.Module):
    """Groups [B, G, K, channels] → [B, G, C] (Qi et al. 2017, as in Point-BERT's section 3.1)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        half, inner = width // 2, 2 * width
        self.first_conv = nn.Sequential(
            nn.Linear(channels, half), nn.BatchNorm1d(half), nn.ReLU(), nn.Linear(half, width)
        )
        self.second_conv = nn.Sequential(
            nn.Linear(inner, inner), nn.BatchNorm1d(inner), nn.ReLU(), nn.Linear(inner, width)
        )

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        flat = groups.flatten(0, 1)
        parts = [flat] if self.training else flat.split(CHUNK)  # what lies between the layers stays in the cache
        return torch.cat([self._pool(part) for part in parts]).unflatten(0, groups.shape[:2])

    def _pool(self, groups: torch.Tensor) -> torch.Tensor:  # [M, K, channels] → [M, C]
        first, norm, act, last = cast("Any", self.second_conv)
        local = self.first_conv(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])  # [M, K, C]
        whole = local.amax(1)
        of_whole, of_local = first.weight.split(local.shape[-1], 1)  # (whole, local) · W, whole's part once a group
        joint = linear(local, of_local) + linear(whole, of_whole, first.bias)[:, None]
        return last(act(norm(joint.flatten(0, 1)))).unflatten(0, groups.shape[:2]).amax(1)


class Block(nn.Module):
    """Pre-norm attention and MLP; in training a residual branch of an object is dropped now and then (drop path)."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.heads, self.drop_path = config.heads, config.drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + self._keep(self.attn["proj"](mixed))
        return x + self._keep(self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))))

    def _keep(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of [B, heads, n, C]; on a CPU in plain steps, which take half the time of PyTorch's fused kernel."""
    if q.device.type == "cpu":
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v)


def normalise(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [B, n, channels] centred and in the unit sphere, and the objects' width, depth and height [B, 3]."""
    xyz = points[..., :3] - points[..., :3].mean(1, keepdim=True)
    radius = xyz.norm(dim=-1).amax(1).clamp(min=1e-6)
    size = xyz.amax(1) - xyz.amin(1)
    return torch.cat((xyz / radius[:, None, None], points[..., 3:]), -1), size


def farthest_points(xyz: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [B, count] of points [B, n, 3], each the farthest from those before it; the first point is the first."""
    axes = xyz.permute(2, 0, 1).contiguous()  # each coordinate in a row: several times faster than rows of three
    chosen = torch.zeros(len(xyz), count, dtype=torch.long, device=xyz.device)
    nearest = torch.full_like(axes[0], torch.inf)
    for step in range(1, count):
        last = chosen[:, step - 1, None]
        x, y, z = ((axis - axis.gather(1, last)).square_() for axis in axes)
        nearest = torch.minimum(nearest, x.add_(y).add_(z))
        chosen[:, step] = nearest.argmax(1)
    return chosen


def group(points: torch.Tensor, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [B, n, channels] → groups [B, count, size, channels], xyz from the centre, and centres.

    With fewer points than a group has, the nearest are repeated.
    """
    xyz = points[..., :3]
    centres = xyz.gather(1, farthest_points(xyz, count)[..., None].expand(-1, -1, 3))
    distance = torch.cdist(centres, xyz)  # [B, count, n]
    near = distance.topk(min(size, xyz.shape[1]), largest=False).indices
    if near.shape[-1] < size:
        near = near[..., torch.arange(size, device=near.device) % near.shape[-1]]
    first = xyz.shape[1] * torch.arange(len(points), device=points.device)[:, None, None]
    groups = nn.functional.embedding(near + first, points.flatten(0, 1))
    groups[..., :3] -= centres[:, :, None]
    return groups, centres


def prepare(clouds: list[PointCloud], config: PointBertConfig, rng: np.random.Generator) -> torch.Tensor:
    """Objects as the encoder's input [B, points, channels]: drawn points, in metres.

    Of an object with fewer points than `points` all are taken and some are drawn again.
    """
    rows = []
    for cloud in clouds:
        have, want = len(cloud), config.points
        chosen = rng.permutation(have)[:want]
        if have < want:
            chosen = np.concatenate((chosen, rng.integers(0, have, want - have)))
        rows.append(cloud.channels(config.channels == 6)[chosen].astype(np.float32))
    return torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def encode(
    model: PointBert, clouds: list[PointCloud], batch_size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Features [len(clouds), 2·width] in float32; memory goes with `batch_size`, not with the number of objects."""
    if not clouds:
        return torch.zeros(0, model.features)
    model.eval()
    device, state = model.cls_token.device, model.state_dict()
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    chunks = []
    for start in range(0, len(clouds), batch_size):
        objects = [(cloud, np.random.default_rng([seed, len(cloud)])) for cloud in clouds[start : start + batch_size]]
        points = torch.cat([prepare([cloud], model.config, rng) for cloud, rng in objects]).to(device)
        chunks.append(functional_call(model, state, (points,)).float().cpu())
    return torch.cat(chunks)


def default_folder(preset: str) -> Path:
    """Where the cache keeps the encoder of a preset: that of this recipe."""
    return registry.default_cache() / "points" / f"{preset}-{RECIPE}"


def load_encoder(name: str) -> PointBert:
    """A frozen point encoder: that of a preset, from the cache, a folder, or a .pt file.

    Raises:
        ValueError: unreadable, or the preset's encoder was not trained yet.
    """
    if name not in PRESETS:
        return load_pointbert(name)
    folder = default_folder(name)
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"the point encoder {name} must be in {folder}, got none: run octavius pretrain-points --preset {name}"
        )
    return load_pointbert(folder)


def load_pointbert(path: str | Path, config: PointBertConfig | None = None) -> PointBert:
    """A frozen encoder from what `save` wrote (a folder), or from a ULIP or Point-BERT checkpoint (a .pt file).

    Args:
        path: a .pt file is read with `weights_only`, never unpickled into objects.
        config: of a .pt file; the paper's when None.
    Raises:
        ValueError: unreadable, or its tensors do not fit.
    """
    path = Path(path)
    file = storage.check(path, (WEIGHTS,)) / WEIGHTS if path.is_dir() else path
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                config = from_dict(PointBertConfig, json.loads(opened.metadata()["config"]), str(file))
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            found = _ulip(loaded.get("state_dict", loaded.get("base_model", loaded)))
    except UNREADABLE as error:
        raise ValueError(f"{file}: cannot be read as a Point-BERT checkpoint: {error}") from error
    model = PointBert(config or PointBertConfig())
    own = model.state_dict()
    for name in sorted(own.keys() | found.keys()):
        want, have = own.get(name), found.get(name)
        if want is None or have is None or want.shape != have.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (want, have)]
            raise ValueError(f"{file}: {name} must be {shapes[0]} for this encoder, got {shapes[1]}")
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)


def _ulip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without prefixes, 1×1 convolutions as linears; ULIP's other parts left out."""
    whole = any("point_encoder." in name for name in state)
    found = {}
    for name, tensor in state.items():
        if (whole and "point_encoder." not in name) or not isinstance(tensor, torch.Tensor):
            continue
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        found[name] = tensor.squeeze(-1) if "_conv." in name and tensor.ndim == 3 else tensor
    return found
