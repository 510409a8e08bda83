"""Upstream's tree at small width: a sharded LLaMA with a SentencePiece tokenizer, a whole CLIP folder, meta files."""

import json
import pickle
from pathlib import Path

import sentencepiece
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig, LlamaForCausalLM

from tests.support import tiny

WIDTH = 768  # of the objects' features
WORDS = ("What", "colour", "is", "the", "square", "chair", "table", "lamp", "red", "green", "blue", "list", "every")


def save_tree(root: Path, sharded: str = "bin") -> Path:
    """Write `weights/{vicuna-13b-v0,clip-vit-large-patch14}` and `data/Octavius/{2D,3D}_Instruct` below `root`."""
    save_vicuna(root / "weights/vicuna-13b-v0", sharded)
    save_clip(root / "weights/clip-vit-large-patch14")
    save_images(root / "data/Octavius/2D_Instruct")
    save_pickle(root / "data/Octavius/3D_Instruct")
    return root


def save_vicuna(folder: Path, sharded: str) -> None:
    """A LLaMA of width 64 as Vicuna v0 lies on disk: `tokenizer.model` alone, weights in shards with an index."""
    folder.mkdir(parents=True)
    texts = [*tiny.TEXTS, *(f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:3])]
    (folder / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    for name in ("corpus.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    torch.manual_seed(1)
    llama = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(llama)
    if sharded == "safetensors":
        model.save_pretrained(folder, max_shard_size="200KB")
        return
    llama.save_pretrained(folder)
    names = list(state := model.state_dict())
    half, places = len(names) // 2, {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name].half() for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    total = sum(2 * value.numel() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_clip(folder: Path) -> None:
    """Both towers, as openai/clip-vit-large-patch14 has them."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 224, "patch_size": 56}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def save_images(folder: Path) -> None:
    """LAMM v2's meta file beside the images that it names."""
    (folder / "meta_file").mkdir(parents=True)
    (folder / "coco_images").mkdir()
    for index in range(len(tiny.COLOURS)):
        tiny.draw(folder / f"coco_images/{index}.png", index)
    items = [item | {"image": f"coco_images/{item['image']}", "src_image": "coco2017"} for item in tiny.lamm()]
    (folder / "meta_file/octavius_2d_train_293k.json").write_text(json.dumps(items * 3))


def save_pickle(folder: Path) -> None:
    """`scan2inst_train.pickle`: parallel lists, one entry a record."""
    folder.mkdir(parents=True)
    rows: dict = {name: [] for name in (
        "caption_list", "task_type_list", "vision_embeds_3d_ref_list", "vision_embeds_3d_scene_prop_list",
        "vision_pos_3d_ref_list", "vision_pos_3d_scene_prop_list", "scene_id_list",
    )}  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for number in range(12):
        task = ("classification3d", "description3d", "VQA3D")[number % 3]
        count = 2 + number % 4
        low = torch.rand(count, 3, generator=generator)
        boxes = torch.cat((low, low + 0.5), 1).half()
        rows["caption_list"].append(tiny.turns("<pcl>\nWhat is it?", ("chair", "a table", "a lamp")[number % 3]))
        rows["task_type_list"].append(task)
        rows["vision_embeds_3d_ref_list"].append(torch.randn(WIDTH, generator=generator).half())
        rows["vision_embeds_3d_scene_prop_list"].append(torch.randn(count, WIDTH, generator=generator).half())
        rows["vision_pos_3d_ref_list"].append(boxes[0])
        rows["vision_pos_3d_scene_prop_list"].append(boxes)
        rows["scene_id_list"].append(f"scene{number // 3:04d}_00")
    with open(folder / "scan2inst_train.pickle", "wb") as file:
        pickle.dump(rows | {"max_proposal_num": 5}, file)
    (folder / "scan2inst_train.json").write_text("[]")
