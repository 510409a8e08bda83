"""The multimodal model: tokens of images, point clouds and text through one frozen LLM whose linears carry experts.

z = projector(tower(image))                         P tokens of the LLM's width D
z = scene(objects of the cloud, their boxes)          Q tokens of the same width
routing = gate(mean of the question's embeddings)     once per instance, for all layers and all tokens
answer = LLM([... <Img> z </Img> question ...] | routing)
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_lora
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from octavius.config import ModelConfig, from_dict
from octavius.language.llm import answer_logits, check_logits, load_llm
from octavius.language.prompts import IGNORE, ConversationFormat
from octavius.points.pointbert import PointBert, load_encoder, load_pointbert
from octavius.points.scene_projector import SceneProjector
from octavius.vision.projector import Projector
from octavius.vision.towers import ImageTower, load_tower

CONFIG, WEIGHTS = "octavius.json", "octavius.safetensors"


@dataclass(frozen=True)
class Routed:
    """What the gate chose for a batch.

    routing: for the experts; logits: [N, E], or [N·L, E] of a token gate, whose real tokens `mask` [N·L] marks.
    """

    routing: moe_lora.Routing
    logits: torch.Tensor
    mask: torch.Tensor | None

    def weights(self, instances: int) -> torch.Tensor:
        """The weight of every expert in each of N instances, [N, E]; a token gate's is the mean over real tokens."""
        dense = torch.zeros_like(self.logits).scatter_add(1, self.routing.experts.long(), self.routing.gates)
        if self.mask is None:
            return dense.detach()
        mask = self.mask.view(instances, -1, 1)
        return ((dense.detach().view(instances, mask.shape[1], -1) * mask).sum(1) / mask.sum(1)).detach()

    def share(self) -> torch.Tensor:
        """[E], the share of the choices that fell on each expert."""
        return moe_lora.expert_share(self.routing.experts, self.logits.shape[1], self.mask)


class Octavius(nn.Module):
    """LLM, encoders, projectors and gate; only the experts, the gate, the projectors and the marker rows train.

    Args:
        config: the parts.
        llm: a causal LM; it is changed in place (frozen, linears given experts).
        tokenizer: the LLM's.
        tower: the image tower; None for a model that reads no images.
        encoder: of point clouds' objects; None where the data bring their features.
    """

    accepts_loss_kwargs = True  # tells Trainer to pass num_items_in_batch
    balanced = True  # whether the load-balancing loss counts

    share: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        llm: Any,
        tokenizer: Any,
        tower: ImageTower | None,
        encoder: PointBert | None = None,
    ):
        super().__init__()
        if tower is None and config.clouds is None:
            raise ValueError("the model must read images or point clouds: give tower, clouds, or both")
        self.settings, self.tokenizer = config, tokenizer
        check_logits(llm)
        embedding = llm.get_input_embeddings()
        vocab, dim = embedding.weight.shape
        self.conversation = ConversationFormat(tokenizer, vocab, config.system, config.gate.input == "system+question")
        self.llm: Any = moe_lora.apply(llm, config.lora)
        self.tower, self.encoder = [tower], [encoder]  # in lists: neither trained nor saved with the model
        std = embedding.weight.float().std().item()
        mean = embedding.weight.float().mean(0)
        if tower is not None:
            self.projector = Projector(tower.tokens, tower.width, dim, config.projector, std)
            self.markers = nn.Parameter(mean.repeat(2, 1))  # <Img>, </Img>: [2, D]
        if clouds := config.clouds:
            width = clouds.width if encoder is None else encoder.features
            self.scene = SceneProjector(width, dim, mean, std, clouds)
        self.gate = moe_lora.InstanceGate(
            dim,
            config.lora.num_experts,
            config.lora.top_k,
            mode=config.gate.mode,
            include_padding=config.gate.include_padding,
            universal=config.gate.universal,
        )
        self.register_buffer("share", torch.full((config.lora.num_experts,), 1 / config.lora.num_experts))

    @classmethod
    def from_config(cls, config: ModelConfig, encoder: PointBert | None = None) -> "Octavius":
        """Load the frozen parts that `config` names, but for a point encoder that is given; what trains is new."""
        llm, tokenizer = load_llm(config)
        tower = load_tower(config.tower, config.tower_layer, config.tower_merge) if config.tower else None
        if encoder is None and config.clouds and config.clouds.encoder:
            encoder = load_encoder(config.clouds.encoder)
        return cls(config, llm, tokenizer, tower, encoder)

    def readers(self, device: torch.device | None = None) -> dict[str, Any]:
        """What loading data needs of the model: its tower, its point encoder, and whether it reads clouds.

        Both are put where the model runs, on a GPU in half precision.

        Args:
            device: where the model will run; where it is, when None.
        """
        device = device or self.device
        for reader in (self.tower[0], self.encoder[0]):
            if reader is not None:
                reader.to(device, torch.float16 if device.type == "cuda" else torch.float32)
        return {"tower": self.tower[0], "encoder": self.encoder[0], "clouds": self.settings.clouds is not None}

    @property
    def image_tokens(self) -> int:
        """P, tokens of an image; 0 if the model reads none."""
        return self.tower[0].tokens if self.tower[0] else 0

    @property
    def cloud_tokens(self) -> int:
        """Q, tokens of a point cloud; 0 if the model reads none."""
        return self.settings.clouds.queries if self.settings.clouds else 0

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Octavius":
        """Load what `save` wrote, with the frozen parts from where its config says, but the folder's point encoder."""
        folder = _checked(folder)
        config = _read_config(folder)
        encoder = load_pointbert(folder) if config.clouds and config.clouds.encoder else None
        model = cls.from_config(config, encoder)
        model.load(folder)
        return model

    def save(self, folder: str | Path) -> None:
        """Write what trains: the experts as `moe_lora.save` does; gate, projector, markers and config beside them.

        The point encoder, too: `small` is trained on each machine, and the weights read the features of this one.
        """
        with moe_lora.storage.staged(folder) as draft:
            self.write(draft)

    def write(self, draft: Path) -> None:
        """Write the files of `save` into a folder that the caller commits with others of its own."""
        moe_lora.save(self.llm, draft)
        if self.encoder[0] is not None:
            self.encoder[0].save(draft)
        save_file({name: value.contiguous() for name, value in self._own().items()}, draft / WEIGHTS)
        (draft / CONFIG).write_text(json.dumps(dataclasses.asdict(self.settings), indent=1) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote into this model; nothing changes unless all of it fits.

        Raises:
            ValueError: a damaged file, or one of another model.
        """
        folder = _checked(folder)
        self._check_settings(folder)
        self._check_encoder(folder)
        try:
            found = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / WEIGHTS}: cannot be read as safetensors: {error}") from error
        own = self._own()
        for name in sorted(own.keys() | found.keys()):
            have, want = found.get(name), own.get(name)
            if have is None or want is None or have.shape != want.shape:
                shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (want, have)]
                raise ValueError(f"{folder / WEIGHTS}: {name} must be {shapes[0]} for this model, got {shapes[1]}")
            if not have.is_floating_point():
                raise ValueError(f"{folder / WEIGHTS}: {name} must be floating point, got {have.dtype}")
        moe_lora.load(self.llm, folder)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])

    def _check_settings(self, folder: Path) -> None:
        """Raise ValueError if the folder's model computes another function with tensors of the same shapes."""
        found, own = _read_config(folder), self.settings
        trained_by = {key: getattr(own.gate, key) for key in ("kind", "load_balancing", "balance_bias")}
        found = dataclasses.replace(found, gate=dataclasses.replace(found.gate, **trained_by))
        for name in ("tower_layer", "tower_merge", "clouds", "system", "gate"):
            want, have = getattr(own, name), getattr(found, name)
            if want != have:
                raise ValueError(f"{folder / CONFIG}: {name} must be {want} for this model, got {have}")

    def _check_encoder(self, folder: Path) -> None:
        """Raise ValueError if the folder's point encoder is not this model's."""
        if (own := self.encoder[0]) is None:
            return
        found, state = load_pointbert(folder), own.state_dict()
        same = found.config == own.config
        if not same or not all(torch.equal(value, state[name].cpu()) for name, value in found.state_dict().items()):
            raise ValueError(
                f"{folder}: its point encoder must be this model's, got another; Octavius.from_folder reads both"
            )

    def activation_checkpointing_enable(self, **options) -> None:
        """Recompute the LLM's activations in backward; `Trainer` calls it, with the options of transformers' models."""
        self.llm.activation_checkpointing_enable(**options)

    def _own(self) -> dict[str, torch.Tensor]:
        """The trainable tensors outside the LLM."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("llm.")}

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        gate_mask: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **seen: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Training loss, the mean over answer tokens.

        Args:
            input_ids: [N, L], padded on the right.
            attention_mask: [N, L], 1 on real tokens. Causal attention from the left never reads the padding.
            gate_mask: [N, L], 1 on the tokens that the gate reads.
            labels: [N, L], IGNORE where no loss counts.
            num_items_in_batch: answer tokens to average over, when a step spans several batches.
            seen: what `embed` takes: features of the batch's images, objects of its clouds.

        Returns:
            `loss`; `balancing`, the part of it that balances the experts; `gates` [N, E], their mean weights.
        """
        embeds = self.embed(input_ids, **seen)
        with self.routed(embeds, gate_mask, attention_mask) as routed:
            hidden = self.llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # logits only where a label is
        logits = answer_logits(self.llm, hidden[rows, columns])
        loss = nn.functional.cross_entropy(logits, labels[rows, columns + 1], reduction="sum")
        items = max(rows.numel() if num_items_in_batch is None else num_items_in_batch, 1)
        loss = loss / items
        balancing = loss.new_zeros(())
        if self.training and torch.is_grad_enabled():
            self._observe(routed)
        weight = self.settings.gate.load_balancing if self.balanced else 0.0
        if weight:  # of several batches in a step each counts by its share of the items
            balancing = weight * self._balance(routed) * (rows.numel() / items)
        gates = routed.weights(len(input_ids))
        return {"loss": loss + balancing, "balancing": balancing.detach(), "gates": gates}

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        gate_mask: torch.Tensor,
        max_new_tokens: int = 128,
        features: torch.Tensor | None = None,
        objects: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        object_mask: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        **options,
    ) -> tuple[list[str], torch.Tensor]:
        """Answers to a batch of prompts padded on the left; greedy unless `options` of `transformers` say otherwise.

        `features`, `objects`, `boxes`, `object_mask` and `pixels` are `embed`'s.

        Returns:
            the answers, and [N, E] the weight of every expert.
        """
        embeds = self.embed(input_ids, features, objects, boxes, object_mask, pixels)
        eager = torch.compiler.set_stance("force_eager")  # compiled layers would compile anew for each length
        with eager, self.routed(embeds, gate_mask, attention_mask) as routed:
            ids = self.llm.generate(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.conversation.eos,
                eos_token_id=self.conversation.eos,
                **({"do_sample": False} | options),
            )
        return [self.conversation.decode(row) for row in ids.tolist()], routed.weights(len(input_ids))

    def embed(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        objects: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        object_mask: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids and what is seen as the LLM's input, [N, L, D] in the LLM's dtype.

        In training the branches that the batch does not need run on no rows, so that their gradients are zero and not
        None: ranks that see different modalities then reduce the same gradients.

        Args:
            input_ids: [N, L]; n of the instances hold an image's ids, m a cloud's.
            features: [n, P, C] tower output.
            objects, boxes, object_mask: [m, O, C], [m, O, 6] and [m, O], True on real objects.
            pixels: [n, 3, S, S] in place of features: the tower reads them here.
        """
        table = self.llm.get_input_embeddings()
        first = table.weight.shape[0]  # ids beyond the vocabulary: two markers and a token, of images and of clouds
        embeds = table(input_ids.clamp(max=first - 1))
        tower, learns = self.tower[0], self.training and torch.is_grad_enabled()
        if pixels is not None:
            assert tower is not None and features is None
            features = tower.features(pixels)
        if features is None and tower is not None and learns:
            features = embeds.new_zeros(0, tower.tokens, tower.width)
        if features is not None:
            tokens = self.projector(features.to(self.device))
            embeds = _place(embeds, input_ids - first, self.markers, tokens)
        if objects is None and self.settings.clouds is not None and learns:
            width = self.scene.features
            objects, boxes = embeds.new_zeros(0, 1, width), embeds.new_zeros(0, 1, 6)
            object_mask = torch.ones(0, 1, dtype=torch.bool, device=embeds.device)
        if objects is not None:
            assert boxes is not None and object_mask is not None
            tokens, _ = self.scene(*(tensor.to(self.device) for tensor in (objects, boxes, object_mask)))
            embeds = _place(embeds, input_ids - first - 3, self.scene.markers, tokens)
        return embeds

    @contextmanager
    def routed(self, embeds: torch.Tensor, gate_mask: torch.Tensor, attention_mask: torch.Tensor) -> Iterator["Routed"]:
        """Route the batch: every linear of the LLM that runs inside uses the gate's choice.

        A token gate also reads each token that generation adds.
        """
        if self.gate.mode == "token":
            *choice, logits = self.gate(embeds)
            routed = Routed(moe_lora.Routing(*choice), logits, attention_mask.flatten())

            def route_tokens(module, args, kwargs):
                inputs = kwargs.get("inputs_embeds")
                inputs = module.get_input_embeddings()(kwargs["input_ids"]) if inputs is None else inputs
                step.enter_context(moe_lora.route(self.llm, self.gate.routing(inputs)))

            with ExitStack() as step:
                step.enter_context(moe_lora.route(self.llm, routed.routing))
                # before the hooks of `apply`, which compare the routing with the tokens of this step of generation
                handle = self.llm.register_forward_pre_hook(route_tokens, with_kwargs=True, prepend=True)
                step.callback(handle.remove)
                yield routed
        else:
            padded = self.gate.include_padding
            question = (self._padded_questions(embeds, gate_mask),) if padded else (embeds, gate_mask)
            *choice, logits = self.gate(*question)
            routed = Routed(moe_lora.Routing(*choice), logits, None)
            with moe_lora.route(self.llm, routed.routing):
                yield routed

    def _padded_questions(self, embeds: torch.Tensor, gate_mask: torch.Tensor) -> torch.Tensor:
        """What upstream's gate averages: the questions alone, padded to the longest with the end token."""
        end = self.llm.get_input_embeddings().weight[self.conversation.eos]
        questions = [row[read] for row, read in zip(embeds, gate_mask != 0, strict=True)]
        longest = max(map(len, questions))
        return torch.stack([torch.cat((row, end.expand(longest - len(row), -1))) for row in questions])

    def _observe(self, routed: Routed) -> None:
        """Keep the experts' share over about the last fifty batches, and move the bias of the choice by it."""
        self.share.lerp_(routed.share(), 0.02)
        if self.settings.gate.balance_bias and self.balanced:
            self.gate.balance(self.share, self.settings.gate.balance_bias)

    def _balance(self, routed: Routed) -> torch.Tensor:
        """Load-balancing loss, with the share over many batches: one often holds one task."""
        return moe_lora.load_balancing_loss(routed.logits, routed.routing.experts, routed.mask, self.share)


def _place(embeds: torch.Tensor, extra: torch.Tensor, markers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Put the markers where `extra` [N, L] is 0 or 1, and the tokens [n, P, D] where it is 2, in their order."""
    at = ((extra == 0) | (extra == 1))[..., None]
    embeds = torch.where(at, markers.to(embeds.dtype)[extra.clamp(0, 1)], embeds)
    return embeds.masked_scatter((extra == 2)[..., None], tokens.to(embeds.dtype))


def _checked(folder: str | Path) -> Path:
    """Where to read a model's folder, once its files are the written ones."""
    if not (moe_lora.storage.whole(folder) / CONFIG).is_file():
        raise ValueError(f"{folder}: must be a folder that training wrote, but {CONFIG} is missing")
    return moe_lora.storage.check(folder, (WEIGHTS, CONFIG))


def _read_config(folder: Path) -> ModelConfig:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder}: must be a folder that training wrote, but {CONFIG} cannot be read: {error}"
        ) from error
    return from_dict(ModelConfig, values, str(folder / CONFIG))
