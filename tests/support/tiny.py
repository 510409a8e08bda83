"""Small real parts: a trained tokenizer, a random Llama, a random CLIP tower, drawn images, LAMM-format records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from moe_lora import MoELoRAConfig, MoELoRALinear
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from octavius.config import DataConfig, GateConfig, ModelConfig
from octavius.data.batches import Collator, InstructionData
from octavius.data.records import Record, read_records
from octavius.model.octavius import Octavius
from octavius.vision.features import FeatureStore

COLOURS = ("red", "green", "blue", "orange", "purple")
LORA = MoELoRAConfig(num_experts=4, top_k=2, rank=3, alpha=6, dropout=0.0)
TEXTS = (
    "### Human: What colour is the square?\n### Assistant: red",
    "### Human: List every object with its box.\n### Assistant: A circle at [0.12, 0.34, 0.56, 0.78].",
    "Answer the question about the image. Describe it, please. Which of these is it? (A) one (B) two",
)


class Parts(NamedTuple):
    """Folders of the parts, and the data file."""

    llm: Path
    tower: Path
    data: Path


def save_parts(root: Path) -> Parts:
    parts = Parts(root / "llm", root / "tower", root / "data" / "train.json")
    save_llm(parts.llm)
    save_tower(parts.tower)
    parts.data.parent.mkdir()
    for index in range(len(COLOURS)):
        draw(parts.data.parent / f"{index}.png", index)
    parts.data.write_text(json.dumps(lamm()))
    return parts


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llm(folder: Path) -> None:
    """A Llama of width 64, its embeddings tied as SmolLM2's are."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_tower(folder: Path, patch: int = 14) -> None:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=patch,
        initializer_range=0.5,
    )
    CLIPVisionModel(config).save_pretrained(folder)


def draw(path: Path, index: int) -> None:
    """A square of its own colour and place, on an odd-sized image."""
    image = Image.new("RGB", (37 + index, 29), "white")
    corner = 3 + 4 * index
    ImageDraw.Draw(image).rectangle((corner, 2 + index, corner + 11, 14 + index), COLOURS[index])
    image.save(path)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def lamm() -> list[dict]:
    """Records of four task types and of unequal lengths, in upstream's form with mini-LAMM's truth."""
    box = '<Root><Item x1="0.5" y1="0.25" x2="0.75" y2="1" cls="square"/></Root>'
    truth = [{"label": "square", "bbox": [0.5, 0.25, 0.75, 1.0]}]
    names = list(COLOURS)
    return [
        {"id": "d0", "image": "0.png", "task_type": "detection", "benchmark": "mini-detection", "labels": ["square"]}
        | {"object": truth, "conversations": turns("List every object with its box.", box)},
        {"id": "c1", "image": "1.png", "task_type": "classification", "benchmark": "mini-classification"}
        | {"label": "green", "labels": names, "conversations": turns("<image>\nWhat colour is it?", "green")},
        {"id": "v2", "image": "2.png", "task_type": "VQA", "benchmark": "mini-vqa", "gt_choice": 1}
        | {"gt_choices": ["one", "two"], "conversations": turns("How many? (A) one (B) two", "(A) one")},
        {"id": "m3", "image": "3.png", "task_type": "conversation", "benchmark": "mini-caption"}
        | {"sentences": ["an orange square"]}
        | {"conversations": turns("Describe it.", "An orange square.", "Where is it, please?", "On the right.")},
        {"id": "c4", "image": "4.png", "task_type": "classification", "benchmark": "mini-classification"}
        | {"label": "purple", "labels": names, "conversations": turns("Which colour has the square here?", "purple")},
        {"id": "v5", "image": "0.png", "task_type": "VQA", "benchmark": "mini-vqa", "gt_choice": "B"}
        | {"gt_choices": ["left", "right"], "conversations": turns("Where? (A) left (B) right", "(B) right")},
        {"id": "c6", "image": "2.png", "task_type": "classification", "benchmark": "mini-classification"}
        | {"label": "blue", "labels": names, "conversations": turns("Colour?", "blue")},
    ]


def model_config(parts: Parts, **changes) -> ModelConfig:
    settings = {"llm": str(parts.llm), "tower": str(parts.tower), "dtype": "float32", "lora": LORA} | changes
    return ModelConfig(**settings)


def gate(**changes) -> GateConfig:
    return replace(GateConfig(), **changes)


def make(parts: Parts, seed: int = 0, **changes) -> Octavius:
    """A model whose experts, positions and markers all have something to say."""
    torch.manual_seed(seed)
    model = Octavius.from_config(model_config(parts, **changes))
    for module in model.modules():
        if isinstance(module, MoELoRALinear):
            nn.init.normal_(module.lora_b, std=0.2)
    nn.init.normal_(model.projector.positions, std=0.2)
    nn.init.normal_(model.markers, std=0.2)
    return model.eval()


def records(parts: Parts) -> list[Record]:
    return read_records(parts.data)


def batch(model: Octavius, chosen: list[Record], answer: bool = True, max_tokens: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded with answers, as for training; left-padded without them, as for generation."""
    store = FeatureStore(model.tower[0])
    data = InstructionData(chosen, model.conversation, store.tower.tokens, max_tokens, answer)
    collate = Collator(model.conversation.eos, store, left=not answer)
    made = collate([data[index] for index in range(len(data))])
    made["features"] = store.tower.features(made.pop("pixels"))
    if not answer:
        made.pop("labels")
    return made


def data_config(parts: Parts, **changes) -> DataConfig:
    return DataConfig(**({"root": str(parts.data.parent), "cache_features": False} | changes))
