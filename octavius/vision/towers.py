"""Image towers: an image → P tokens of width C, frozen, in float32.

CLIP ViT-L/14 (the paper's) and other Hugging Face ViTs by name or folder; EfficientNet-Lite0 and a ViT-S/14 from
`octavius assets`; others that a program adds with `register_tower`, or an installed package through the entry points of
the group `octavius.towers`.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import AutoConfig, AutoModel, CLIPVisionModel

from octavius.assets import registry
from octavius.inputs.images import upright
from octavius.registry import Registry

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class ImageTower(nn.Module):
    """What all towers share: `tokens` P, `width` C, `size` of the square image in pixels, and the normalisation.

    `grid` says how the tokens lie over the image, (rows, columns) from the top left, row by row. It is None where they
    lie in no grid; such a tower trains, without what `projector_init` learns from places.
    """

    tokens: int
    width: int
    size: int = 224
    grid: tuple[int, int] | None = None
    mean_std = IMAGENET

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """An image as [3, size, size], squashed to the square, so that fractions of its sides stay fractions."""
        square = upright(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        array = np.asarray(square, np.float32)
        mean, std = np.array(self.mean_std, np.float32)
        return torch.from_numpy((array / 255 - mean) / std).permute(2, 0, 1)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [N, 3, size, size] of any device → tokens [N, P, C] float16, on the tower's."""
        weight = next(self.parameters())
        return self(pixels.to(weight.device, weight.dtype)).half()

    def fingerprint(self) -> str:
        """Names the function that this tower computes, for caches of its output."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.tokens} {self.width} {self.extra_repr()}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.double().sum().item():.9e}".encode())
        return digest.hexdigest()[:16]


class EfficientNetTower(ImageTower):
    """EfficientNet-Lite0 at 224 px: 7×7 tokens of 1280 channels (stride 32) beside the 2×2 cells of 112 (stride 16).

    The deep channels say what is there, the shallower ones where. [N, 3, 224, 224] → [N, 49, 1280 + 4·112].
    """

    tokens, width, grid = 49, 1280 + 4 * 112, (7, 7)

    def __init__(self, weights: Path):
        super().__init__()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
        self.stem, self.head = fuse_conv_bn_eval(net._conv_stem, net._bn0), fuse_conv_bn_eval(net._conv_head, net._bn1)
        for block in cast("Iterable[Any]", net._blocks):
            if hasattr(block, "_expand_conv"):
                block._expand_conv, block._bn0 = fuse_conv_bn_eval(block._expand_conv, block._bn0), nn.Identity()
            block._depthwise_conv, block._bn1 = fuse_conv_bn_eval(block._depthwise_conv, block._bn1), nn.Identity()
            block._project_conv, block._bn2 = fuse_conv_bn_eval(block._project_conv, block._bn2), nn.Identity()
        self.blocks = net._blocks
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        middle = x
        for block in self.blocks:
            x = block(x)
            if x.shape[-1] == self.size // 16:
                middle = x  # the last one at stride 16: [N, 112, 14, 14]
        deep = nn.functional.relu6(self.head(x))  # [N, 1280, 7, 7]
        return torch.cat((deep, nn.functional.pixel_unshuffle(middle, 2)), 1).flatten(2).transpose(1, 2)


class ViTTower(ImageTower):
    """A Hugging Face ViT (CLIP, DINOv2, ...): one hidden state's patch tokens, class token dropped.

    Args:
        source: name or folder.
        layer: index into the hidden states; -1 the last layer's, without the final norm, as upstream.
        merge: join merge×merge neighbouring tokens into one of merge² times the width.
    """

    def __init__(self, source: str, layer: int = -2, merge: int = 1):
        super().__init__()
        config = AutoConfig.from_pretrained(source)
        if config.model_type in ("clip", "clip_vision_model"):
            self.net, self.mean_std = CLIPVisionModel.from_pretrained(source), CLIP
        else:
            self.net = AutoModel.from_pretrained(source)
        config: Any = self.net.config
        if not all(hasattr(config, key) for key in ("patch_size", "hidden_size", "num_hidden_layers")):
            raise ValueError(
                f"tower must be EfficientNet-Lite0 or a ViT with patches, got {config.model_type} of {source}"
            )
        self.size = config.image_size if config.model_type == "clip_vision_model" else 224
        self.layer, self.merge, self.side = layer, merge, self.size // config.patch_size
        if self.side % merge:
            raise ValueError(f"tower_merge must divide the {self.side} tokens of a side, got {merge}")
        if not -config.num_hidden_layers - 1 <= layer <= config.num_hidden_layers:
            raise ValueError(
                f"tower_layer must be a hidden state of {source}, {-config.num_hidden_layers - 1} to "
                f"{config.num_hidden_layers}, got {layer}"
            )
        self.grid = (self.side // merge, self.side // merge)
        self.tokens, self.width = self.grid[0] * self.grid[1], config.hidden_size * merge**2

    def extra_repr(self) -> str:
        return f"layer={self.layer}, merge={self.merge}"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.net(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        grid = hidden[:, -(self.side**2) :].transpose(1, 2).unflatten(2, (self.side, self.side))  # [N, C, side, side]
        return nn.functional.pixel_unshuffle(grid, self.merge).flatten(2).transpose(1, 2)


TowerBuilder = Callable[[int, int], ImageTower]  # (layer, merge) of the configuration → the tower


def _check(name: str, build: TowerBuilder) -> None:
    if not callable(build):
        raise TypeError(f"the tower {name!r} must be a function (layer, merge) -> ImageTower, got {build!r:.80}")


TOWERS: Registry[TowerBuilder] = Registry("tower", "octavius.towers", _check)


def register_tower(name: str, build: TowerBuilder) -> None:
    """Let `model.tower: NAME` use a tower.

    Args:
        name: of the tower in configurations.
        build: gets `model.tower_layer` and `model.tower_merge` and returns the tower, in evaluation mode or not.
    Raises:
        TypeError, ValueError: it is no function, or the name is taken.
    """
    TOWERS.register(name, build)


register_tower("efficientnet-lite0", lambda layer, merge: EfficientNetTower(registry.need("efficientnet-lite0")))
register_tower("vit-s14", lambda layer, merge: ViTTower(str(registry.need("vit-s14")), layer, merge))


def load_tower(name: str, layer: int = -2, merge: int = 1) -> ImageTower:
    """A frozen tower in evaluation mode: a registered one, or a Hugging Face ViT by name or folder.

    Raises:
        ValueError: a registered tower is not what it says it is, or the ViT cannot be used.
    """
    tower = checked_tower(name, TOWERS[name](layer, merge)) if name in TOWERS else ViTTower(name, layer, merge)
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def checked_tower(name: str, tower: ImageTower) -> ImageTower:
    """The tower, if a blank image gives the tokens that it promises and its grid holds them all.

    Raises:
        ValueError: it does not; the message says what it gave.
    """
    where = f"the tower {name!r}"
    if not isinstance(tower, ImageTower):
        raise ValueError(f"{where} must be an octavius.vision.towers.ImageTower, got {type(tower).__name__}")
    if tower.grid is not None and tower.grid[0] * tower.grid[1] != tower.tokens:
        raise ValueError(
            f"{where} must have grid (rows, columns) with rows by columns making {tower.tokens} tokens, or None where "
            f"its tokens form no grid; got {tower.grid}"
        )
    seen = tower.eval()(tower.pixels(Image.new("RGB", (tower.size, tower.size)))[None])
    if seen.shape != (1, tower.tokens, tower.width):
        raise ValueError(f"{where} must give [N, {tower.tokens}, {tower.width}], got {list(seen.shape)} for one image")
    return tower
