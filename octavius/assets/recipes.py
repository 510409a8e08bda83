"""From package files to what the libraries read: GGUF and ONNX weights to Hugging Face folders, a .deb to files.

Imports nothing of octavius. ONNX is read by a few lines of protobuf wire format, so that the `onnx` package is no
dependency.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


def gguf_to_llama(file: Path, folder: Path) -> None:
    """Dequantise a GGUF Llama once and save config, tokenizer and bfloat16 weights.

    The file stores rms_norm_eps in float32; the config gets the 1e-5 that was meant.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where, name = str(file.parent), file.name
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # a model that knows it was quantised is not saved
        config.pop(key, None)
    config["rms_norm_eps"] = 1e-5
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.bfloat16().save_pretrained(folder)


def onnx_to_dinov2(file: Path, folder: Path) -> None:
    """Save the ViT-S/14 backbone of the saliency model as a Dinov2Model.

    Named tensors keep their names. A MatMul's weight has none: it takes the name of the bias that is added next. The
    position embeddings are two constants, class token and grid.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    tensors, nodes = read_onnx(file)
    after = {name: node for node in nodes for name in node.inputs}
    prefix = "backbone."
    weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    for node in nodes:
        if node.op != "MatMul" or node.inputs[1] not in tensors:
            continue
        following = after[node.outputs[0]]
        biases = [name for name in following.inputs if name.startswith(prefix) and name.endswith(".bias")]
        if following.op == "Add" and biases:
            name = biases[0][len(prefix) :].removesuffix("bias") + "weight"
            weights[name] = tensors[node.inputs[1]].T
    token, grid = (value for value in _positions(tensors))
    weights["embeddings.position_embeddings"] = np.concatenate([token, grid], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    renamed = {
        _rename(name): torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in weights.items()
    }
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14, mlp_ratio=4
        )
    )
    model.load_state_dict(renamed, strict=True)
    model.save_pretrained(folder)


def _positions(tensors: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The unnamed constants of the position embeddings: class token [1, 1, 384] and grid [1, 1369, 384]."""
    for shape in ((1, 1, 384), (1, 37 * 37, 384)):
        match = [v for name, v in tensors.items() if v.shape == shape and not name.startswith("backbone.")]
        assert len(match) == 1, f"expected one unnamed tensor of shape {shape}, found {len(match)}"
        yield match[0]


def _rename(name: str) -> str:
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


@dataclass(frozen=True)
class Node:
    """One operation of an ONNX graph."""

    op: str
    inputs: list[str]
    outputs: list[str]


def read_onnx(file: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """Float32 initialisers by name and the nodes of an ONNX file.

    Field numbers are those of onnx.proto: ModelProto.graph 7; GraphProto.node 1, initializer 5; NodeProto.input 1,
    output 2, op_type 4; TensorProto.dims 1, data_type 2 (1 is float32), name 8, raw_data 9.
    """
    graph = Message(Message(memoryview(file.read_bytes())).data[7][0])
    nodes = []
    for view in graph.data[1]:
        node = Message(view)
        nodes.append(Node(node.texts(4)[0], node.texts(1), node.texts(2)))
    tensors = {}
    for view in graph.data[5]:
        tensor = Message(view)
        if tensor.numbers[2] == [1]:
            shape = tensor.numbers[1] or [n for packed in tensor.data[1] for n in _varints(packed)]
            tensors[tensor.texts(8)[0]] = np.frombuffer(tensor.data[9][0], dtype="<f4").reshape(shape)
    return tensors, nodes


class Message:
    """The fields of one protobuf message by number: whole numbers, and byte strings as views of the file."""

    def __init__(self, view: memoryview) -> None:
        self.numbers: defaultdict[int, list[int]] = defaultdict(list)
        self.data: defaultdict[int, list[memoryview]] = defaultdict(list)
        at = 0
        while at < len(view):
            key, at = _varint(view, at)
            number, wire = key >> 3, key & 7
            if wire == 0:
                value, at = _varint(view, at)
                self.numbers[number].append(value)
                continue
            assert wire in (1, 2, 5), f"unexpected protobuf wire type {wire}"
            length, at = _varint(view, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            self.data[number].append(view[at : at + length])
            at += length

    def texts(self, number: int) -> list[str]:
        return [bytes(view).decode() for view in self.data[number]]


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(view: memoryview) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value


def deb_files(file: Path, inside: str, endings: tuple[str, ...], folder: Path) -> None:
    """Extract the files under `inside` of a Debian package that have one of the endings; needs no Debian tools.

    A .deb is an `ar` archive: an 8-byte magic, then members with a 60-byte header (name 16, ..., size at 48) padded
    to even offsets; `data.tar.xz` holds the files.
    """
    with file.open("rb") as stream:
        assert stream.read(8) == b"!<arch>\n", f"{file.name} is no Debian package"
        while header := stream.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name == "data.tar.xz":
                break
            stream.seek(size + size % 2, io.SEEK_CUR)
        else:
            raise ValueError(f"{file.name} holds no data.tar.xz")
        folder.mkdir(parents=True)
        with lzma.open(stream) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
            for member in tar:
                if not member.isfile() or not member.name.startswith(inside):
                    continue
                if member.name.endswith(endings):
                    source = tar.extractfile(member)
                    assert source is not None
                    target = folder / member.name.removeprefix(inside)
                    assert ".." not in target.parts, f"{member.name} leaves the folder"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read())
