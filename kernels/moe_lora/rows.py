"""Whose rows a layer gets: the batch that the model was called with, and the check of every layer's x against it.

A routing without offsets says only how many instances there are; a layer trusts its rows only if they fit the batch:
its first dimension is the batch, or its rows are all tokens flattened. Rows of images, picked rows or those of another
batch are refused, or have their own map to instances.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.routing import Routing

_TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_MEDIA = re.compile(r"pixel|image|video|audio|input_features|input_values|speech")
_TOWER = re.compile(
    r"vision|visual|image|video|audio|speech|pixel|multi_modal|mm_|projector|connector|qformer|resampler"
)


@dataclass(eq=False)
class Batch:
    """What one call of the model brings.

    Args:
        size: B, entries of its main input; None if there is none.
        lengths: L of its token inputs.
        copies: whether an instance may have several adjacent entries, as in generation with beams.
        media: whether images, video or audio come beside the text.
        images: [M], the instance of each of M images, or None.
    """

    size: int | None
    lengths: frozenset[int] = frozenset()
    copies: bool = False
    media: bool = False
    images: Tensor | None = None
    routings: dict[Routing, Routing] = field(default_factory=dict)  # of the images

    def check(self, routing: Routing) -> None:
        """Raises ValueError unless the routing is of this batch."""
        N, B = routing.experts.shape[0], self.size
        if B is None or routing.offsets is not None or N == B or (self.copies and N and B % N == 0):
            return
        if any(N == B * L for L in self.lengths):  # every token an instance
            return
        raise ValueError(
            f"the routing must be of the batch that the model is called with, got {N} instances for a batch of {B}; "
            "route this batch, repeat the routing by its expand(), or give it offsets if the batch is packed"
        )

    def routing_of(self, x: Tensor, routing: Routing, tower: bool) -> Routing:
        """The routing of x's rows; raises ValueError if they are nobody's."""
        if self.size is None:
            return routing
        if tower and self.media:
            return self._of_images(x, routing)
        if routing.offsets is not None:
            return routing
        lead, B = x.shape[:-1], self.size
        if routing.experts.shape[0] not in (B, 0) and not self.copies:
            fits = lead.numel() == routing.experts.shape[0]
        elif len(lead) > 1 and lead[0] == B:
            fits = not self.media or len(lead) > 2 or lead[1] in self.lengths or lead[1] == 1
        else:
            fits = len(lead) == 1 and (lead[0] == B or any(lead[0] == B * L for L in self.lengths))
        if fits:
            return routing
        raise ValueError(
            f"a layer's rows must be the batch's {B} entries in their order, or all their tokens, got x "
            f"{tuple(x.shape)}; rows of images or picked rows are nobody's: take this layer out of target_modules, or "
            "say whose images they are by route(..., images=[instance of each image])"
        )

    def _of_images(self, x: Tensor, routing: Routing) -> Routing:
        if self.images is None or routing.offsets is not None:
            raise ValueError(
                "an image tower's layer needs to know whose each image is: route with images=[instance of each image], "
                f"or take the tower out of target_modules; got x {tuple(x.shape)}"
            )
        M, lead = self.images.shape[0], x.shape[:-1]
        if not M or not (lead[0] == M or (len(lead) == 1 and lead[0] % M == 0)):
            raise ValueError(f"an image tower's rows must be {M} images in their order, got x {tuple(x.shape)}")
        if routing not in self.routings:
            index = self.images.to(routing.experts.device)
            self.routings[routing] = Routing(routing.experts[index], routing.gates[index])
        return self.routings[routing]


def batch_of(model: nn.Module, inputs: dict[str, Any], copies: bool, images: Any = None) -> Batch:
    """The batch of a call.

    Args:
        model: what is called.
        inputs: its arguments by name.
        copies: whether it is a step of generation.
        images: the instance of each image, if the caller said so.
    """
    text = [inputs[name] for name in _TEXT if isinstance(inputs.get(name), Tensor) and inputs[name].dim() > 1]
    main = getattr(model, "main_input_name", "input_ids")
    first = inputs.get(main) if isinstance(inputs.get(main), Tensor) else None
    if first is None:
        first = text[0] if text else next((value for value in inputs.values() if isinstance(value, Tensor)), None)
    if first is None or first.dim() == 0:
        return Batch(None)
    lengths = {tensor.shape[1] for tensor in text}
    for name in ("labels", "encoder_hidden_states"):
        if isinstance(inputs.get(name), Tensor) and inputs[name].dim() > 1:
            lengths.add(inputs[name].shape[1])
    encoded = inputs.get("encoder_outputs")
    if encoded is not None and isinstance(encoded[0], Tensor):
        lengths.add(encoded[0].shape[1])
    kept = inputs.get("logits_to_keep")
    if isinstance(kept, int) and kept > 0:
        lengths |= {min(kept, length) for length in set(lengths)}
    elif isinstance(kept, Tensor) and kept.dim() == 1:
        lengths.add(kept.shape[0])
    media = bool(text) and any(
        isinstance(value, Tensor) and value.is_floating_point() and name != main and _MEDIA.search(name)
        for name, value in inputs.items()
    )
    owners = _owners(model, inputs, images, first.shape[0]) if media else None
    if not text and first.dim() > 2:
        lengths.add(first.shape[1])
    return Batch(first.shape[0], frozenset(lengths), copies, media, owners)


def _owners(model: nn.Module, inputs: dict[str, Any], images: Any, size: int) -> Tensor | None:
    """[M], the instance of each image: what the caller said, or what the image tokens of each row say."""
    if images is not None:
        return torch.as_tensor(images, dtype=torch.int64)
    pixels, ids, config = inputs.get("pixel_values"), inputs.get("input_ids"), getattr(model, "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not isinstance(ids, Tensor) or token is None:
        return None
    counts, M = (ids == token).sum(1), pixels.shape[0]
    total = int(counts.sum())
    if not M or total % M or not total:
        return None
    each = total // M  # tokens of an image
    if bool((counts % each != 0).any()):
        return None
    return torch.arange(size, device=counts.device).repeat_interleave(counts // each)


def is_tower(root: nn.Module, name: str) -> bool:
    """Whether the linear of this name belongs to the image, video or audio tower of a model that reads text."""
    main = getattr(root, "main_input_name", None)
    if main != "input_ids":
        return False
    module = root
    for part in name.split("."):
        if _TOWER.search(part):
            return True
        module = module.get_submodule(part)
        own = getattr(module, "main_input_name", main)
        if isinstance(own, str) and _MEDIA.search(own):
            return True
    return False
