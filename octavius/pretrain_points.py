"""Contrastive training of the point encoder against frozen text and image features, as ULIP (Xue et al. 2023) does.

    loss = InfoNCE(point · W_text, text) + InfoNCE(point · W_image, image)        both ways, learned temperatures

Models of one name are each other's positives. Text: a sentence encoder on names, categories and sizes; image: the
image tower on the catalogues' icons and on renderings of the points. Test models and one catalogue are never seen.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import nn
from transformers import AutoModel, AutoTokenizer

from octavius import assets, furniture
from octavius.encoders import load_tower
from octavius.furniture import CLASSES, Furniture, article
from octavius.pointbert import PRESETS, PointBert, encode, load_pointbert, prepare
from octavius.points import PointCloud
from octavius.render import render

VIEWS = ((-30.0, 20.0), (40.0, 25.0))  # (yaw, pitch) of the renderings beside the icon
PROMPTS = ("a {}", "a point cloud of a {}", "a 3D model of a {}", "there is a {} in the room")


@dataclass(frozen=True)
class PretrainConfig:
    """One run; the defaults take about four minutes on one core."""

    preset: str = "small"
    tower: str = "efficientnet-lite0"
    epochs: int = 24
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


class Heads(nn.Module):
    """From the point feature to the text's and the image's space, with the temperatures of the two losses."""

    def __init__(self, features: int, text: int, image: int):
        super().__init__()
        self.text, self.image = nn.Linear(features, text, bias=False), nn.Linear(features, image, bias=False)
        self.scales = nn.Parameter(torch.full((2,), np.log(1 / 0.07)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.normalize(self.text(x), dim=-1), nn.functional.normalize(self.image(x), dim=-1)


def pretrain(output: Path, config: PretrainConfig, cache: Path | None = None) -> dict[str, Any]:
    """Train, score on held-out models, write `pointbert.safetensors` and `pretrain.json` into `output`.

    Returns:
        {"config", "seconds", "loss": [per epoch], "test": scores, "zeroshot": scores, "baseline": scores}
    """
    torch.manual_seed(config.seed)
    cache = cache or assets.default_cache() / "points"
    folder = assets.need("furniture")
    models = furniture.catalogue(folder)
    clouds = furniture.load_points(folder, models, cache)
    names, texts, images = _teachers(folder, models, clouds, config, cache)
    index = {model.id: row for row, model in enumerate(models)}
    rows = {side: [index[model.id] for model in members] for side, members in furniture.split(models).items()}
    mean = images[rows["train"]].mean((0, 1))
    images = nn.functional.normalize(images - mean, dim=-1)  # a tower's pooled features share most of their length
    model = PointBert(PRESETS[config.preset])
    heads = Heads(model.features, texts.shape[-1], images.shape[-1])
    start = time.perf_counter()
    losses = _fit(model, heads, [clouds[i] for i in rows["train"]], _side(rows["train"], models, texts, images), config)
    report: dict[str, Any] = {"config": asdict(config), "seconds": time.perf_counter() - start, "loss": losses}
    features = {side: encode(model, [clouds[i] for i in members]) for side, members in rows.items()}
    for side in ("test", "zeroshot"):
        held = _side(rows[side], models, texts, images)
        report[side] = _scores(heads, features[side], held, names)
        report[side] |= _neighbours(rows["train"], rows[side], models, clouds, features["train"], features[side])
    model.save(output)
    (output / "pretrain.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@dataclass(frozen=True)
class Side:
    """What the teachers say of some models: text [n, T, C], image [n, V, C], their names and classes."""

    text: torch.Tensor
    image: torch.Tensor
    names: list[str]
    labels: list[str]


def _side(rows: list[int], models: list[Furniture], texts: torch.Tensor, images: torch.Tensor) -> Side:
    return Side(texts[rows], images[rows], [models[i].name for i in rows], [models[i].label for i in rows])


def load_encoder(name: str) -> PointBert:
    """A frozen point encoder: `small`, pre-trained into the cache if it is not there yet, a folder, or a .pt file."""
    if name not in PRESETS:
        return load_pointbert(name)
    folder = assets.default_cache() / "points" / name
    if not (folder / "pointbert.safetensors").exists():
        with torch.random.fork_rng():  # the caller draws the same numbers whether the encoder was there or not
            pretrain(folder, PretrainConfig(preset=name))
    return load_pointbert(folder)


def embed_texts(texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """Sentence embeddings of length 1, [n, 384]: the mean over tokens of all-MiniLM-L6-v2."""
    source = assets.need("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            hidden = model(**batch).last_hidden_state
            rows.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows).clone()


def _teachers(
    folder: Path, models: list[Furniture], clouds: list[PointCloud], config: PretrainConfig, cache: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the classes [classes, 384], texts [models, 2, 384] and pictures [models, 3, C], kept in `cache`."""
    file = cache / f"teachers-{config.tower}-{len(models)}.pt"
    if not file.exists():
        prompts = [prompt.format(label) for label in CLASSES for prompt in PROMPTS]
        names = embed_texts(prompts).view(len(CLASSES), len(PROMPTS), -1).mean(1)
        texts = embed_texts([text for model in models for text in (article(model.name), model.text())])
        tower, images = load_tower(config.tower), []
        with torch.inference_mode():
            for model, cloud in track(list(zip(models, clouds, strict=True)), "pictures"):
                views = [furniture.icon(folder, model), *(render(cloud, tower.size, *view) for view in VIEWS)]
                images.append(tower(torch.stack([tower.pixels(view) for view in views])).mean(1))
        partial = file.with_suffix(".partial")
        torch.save(
            [nn.functional.normalize(names, dim=-1), texts.view(len(models), 2, -1), torch.stack(images)], partial
        )
        partial.rename(file)
    names, texts, images = torch.load(file, weights_only=True)
    return names, texts, images


def _fit(model: PointBert, heads: Heads, clouds: list[PointCloud], side: Side, config: PretrainConfig) -> list[float]:
    rng = np.random.default_rng(config.seed)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * (len(clouds) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, pct_start=0.1)
    positive = torch.tensor([[a == b for b in side.names] for a in side.names])
    losses = []
    model.train()
    for _ in track(range(config.epochs), "point encoder"):
        order, total = rng.permutation(len(clouds)), 0.0
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            rows = torch.from_numpy(order[start : start + config.batch_size])
            points = prepare([augment(clouds[row], rng) for row in rows.tolist()], model.config, rng)
            with torch.autocast("cpu", torch.bfloat16):
                features = model(points)
            pairs = heads(features.float())
            same = positive[rows][:, rows]
            loss = torch.zeros(())
            for scale, point, teacher in zip(heads.scales, pairs, (side.text[rows], side.image[rows]), strict=True):
                view = torch.from_numpy(rng.integers(0, teacher.shape[1], len(rows)))
                loss = loss + contrast(point, teacher[torch.arange(len(rows)), view], scale.exp().clamp(max=100), same)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / (len(order) // config.batch_size))
    return losses


def contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways between rows of length 1; `same` [n, n] marks the positives, which share the target evenly."""
    logits = scale * a @ b.T
    target = same.float() / same.sum(1, keepdim=True)  # symmetric in `same`, so it serves both ways
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def augment(cloud: PointCloud, rng: np.random.Generator) -> PointCloud:
    """The object turned about z, stretched, seen in part, in other light, with some of the floor or wall beside it."""
    cloud = cloud[rng.permutation(len(cloud))[: int(rng.integers(256, 2048))]]
    assert cloud.rgb is not None
    xyz, rgb = cloud.xyz, cloud.rgb
    if rng.random() < 0.3:  # one side is hidden
        side = (xyz - xyz.mean(0)) @ rng.normal(size=3)
        keep = side > np.quantile(side, rng.uniform(0, 0.4))
        xyz, rgb = xyz[keep], rgb[keep]
    if rng.random() < 0.4:  # a plane of a room along one face of the box
        count, axis = int(rng.integers(8, 96)), int(rng.integers(3))
        low, high = xyz.min(0), xyz.max(0)
        plane = rng.uniform(low, high, (count, 3))
        plane[:, axis] = low[axis] if axis == 2 or rng.random() < 0.5 else high[axis]
        xyz = np.concatenate((xyz, plane.astype(np.float32)))
        rgb = np.concatenate((rgb, np.broadcast_to(rng.uniform(0.2, 0.9, 3), (count, 3)).astype(np.float32)))
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    xyz = (xyz * rng.uniform(0.85, 1.15, 3)) @ turn.T
    xyz = xyz + rng.normal(0, 0.005 * np.ptp(xyz, 0).max(), xyz.shape)
    light = rng.uniform(0.8, 1.2) * rgb + rng.normal(0, 0.03, 3)
    return PointCloud(xyz.astype(np.float32), light.clip(0, 1).astype(np.float32))


@torch.inference_mode()
def _scores(heads: Heads, features: torch.Tensor, side: Side, names: torch.Tensor) -> dict[str, Any]:
    """Zero-shot classification by the names of the classes; retrieval of the model's own text and icon among all."""
    text, image = heads(features)
    labelled = [row for row, label in enumerate(side.labels) if label]
    truth = torch.tensor([list(CLASSES).index(side.labels[row]) for row in labelled])
    guess = (text[labelled] @ names.T).argmax(1)
    result: dict[str, Any] = {"models": len(features), "labelled": len(labelled)}
    result["zero_shot_acc"] = (guess == truth).float().mean().item()
    result["zero_shot_chance"] = 1 / len(CLASSES)
    for name, queries, gallery in (("text", text, side.text[:, 0]), ("image", image, side.image[:, 0])):
        similarity = queries @ gallery.T
        own = similarity.diagonal()[:, None]
        rank = (similarity > own).sum(1)  # models of the same text are never ahead of each other
        result |= {f"{name}_recall@{k}": (rank < k).float().mean().item() for k in (1, 5)}
        result |= {f"{name}_chance@{k}": k / len(features) for k in (1, 5)}
    return result


def _neighbours(
    train: list[int],
    test: list[int],
    models: list[Furniture],
    clouds: list[PointCloud],
    train_features: torch.Tensor,
    test_features: torch.Tensor,
) -> dict[str, float]:
    """Acc@1 of the nearest labelled training model: by our feature, and by raw geometry (an occupancy grid, 8³)."""
    known = [place for place, row in enumerate(train) if models[row].label]
    asked = [place for place, row in enumerate(test) if models[row].label]
    grids = {row: occupancy(clouds[row]) for row in (*(train[k] for k in known), *(test[a] for a in asked))}
    spaces = {
        "nearest_feature_acc": (train_features[known], test_features[asked]),
        "nearest_geometry_acc": (
            torch.stack([grids[train[k]] for k in known]),
            torch.stack([grids[test[a]] for a in asked]),
        ),
    }
    result = {}
    for name, (gallery, queries) in spaces.items():
        similarity = nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(gallery, dim=-1).T
        nearest = similarity.argmax(1).tolist()
        right = [models[test[a]].label == models[train[known[n]]].label for a, n in zip(asked, nearest, strict=True)]
        result[name] = sum(right) / max(len(right), 1)
    return result


def occupancy(cloud: PointCloud, cells: int = 8) -> torch.Tensor:
    """Share of the points in every cell of a cube around the object, square-rooted, [cells³]."""
    half = np.abs(cloud.xyz - (cloud.box[:3] + cloud.box[3:]) / 2).max() + 1e-6
    place = (cloud.xyz - (cloud.box[:3] + cloud.box[3:]) / 2) / half
    cell = ((place + 1) / 2 * cells).astype(int).clip(0, cells - 1)
    counts = np.bincount(cell @ (cells**2, cells, 1), minlength=cells**3)
    return torch.from_numpy(np.sqrt(counts / len(cloud))).float()
