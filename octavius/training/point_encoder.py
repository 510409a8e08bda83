"""Contrastive training of the point encoder against frozen text and image features, as ULIP (Xue et al. 2023) does.

    loss = InfoNCE(point · W_text, text) + InfoNCE(point · W_image, image)        both ways, learned temperatures
           + cross entropy(point · W_text, the classes' names)                    of the models that have a class

Models of one text, or of one name, are each other's positives. Text: a sentence encoder on classes, names, colours and
sizes; image: the image tower on the catalogues' icons and on renderings of the points. Every class is drawn equally
often, as crops of rooms look. The encoder is the mean over the last steps. Test models and one catalogue are not seen.
"""

import copy
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe_lora import storage
from rich.progress import track
from torch import nn
from transformers import AutoModel, AutoTokenizer

from octavius.assets import registry
from octavius.data.scan2inst import furniture
from octavius.data.scan2inst.furniture import CLASSES, Furniture, article
from octavius.data.scan2inst.questions import describe
from octavius.data.scan2inst.relations import SceneObject, colour_name
from octavius.data.scan2inst.rooms import DENSITY, NOISE
from octavius.points.cloud import PointCloud
from octavius.points.pointbert import PRESETS, RECIPE, WEIGHTS, PointBert, default_folder, encode, prepare
from octavius.points.render import render
from octavius.vision.towers import load_tower

VIEWS = ((-30.0, 20.0), (40.0, 25.0))  # (yaw, pitch) of the renderings beside the icon
FOLLOW = 0.03  # share of the newest weights in their mean, step by step
SAME = 0.995  # cosine of two texts that are one
TEACHERS = "teachers.pt"
PROMPTS = ("a {}", "a point cloud of a {}", "a 3D model of a {}", "there is a {} in the room")


@dataclass(frozen=True)
class PretrainConfig:
    """One run. labelled: share of a batch that is drawn from the classes, each as often; the rest is of all models."""

    preset: str = "small"
    tower: str = "efficientnet-lite0"
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    labelled: float = 0.6
    smoothing: float = 0.1
    seed: int = 0


class Heads(nn.Module):
    """From the point feature to the text's and the image's space, with the temperatures of the three losses."""

    def __init__(self, features: int, text: int, image: int):
        super().__init__()
        self.text, self.image = nn.Linear(features, text, bias=False), nn.Linear(features, image, bias=False)
        self.scales = nn.Parameter(torch.full((3,), np.log(1 / 0.07)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.normalize(self.text(x), dim=-1), nn.functional.normalize(self.image(x), dim=-1)


def pretrain(output: Path, config: PretrainConfig, cache: Path | None = None) -> dict[str, Any]:
    """Train, score on held-out models, write `pointbert.safetensors` and `pretrain.json` into `output`.

    Returns:
        {"config", "seconds" of training, "all_seconds", "loss": [means of ten parts], "test": scores, "zeroshot":
        scores}
    """
    begin = time.perf_counter()
    torch.manual_seed(config.seed)
    cache = cache or registry.default_cache() / "points"
    folder = registry.need("furniture")
    models = furniture.catalogue(folder)
    clouds = furniture.load_points(folder, models, cache)
    names, texts, images = _teachers(folder, models, clouds, config, cache)
    index = {model.id: row for row, model in enumerate(models)}
    rows = {split: [index[model.id] for model in members] for split, members in furniture.split(models).items()}
    mean = images[rows["train"]].mean((0, 1))
    images = nn.functional.normalize(images - mean, dim=-1)  # a tower's pooled features share most of their length
    model = PointBert(PRESETS[config.preset])
    both = nn.ModuleList((model, Heads(model.features, texts.shape[-1], images.shape[-1])))
    start = time.perf_counter()
    train = _teachers_of(rows["train"], models, texts, images)
    losses = _fit(both, [clouds[i] for i in rows["train"]], train, names, config)
    heads = both[1]
    assert isinstance(heads, Heads)
    report: dict[str, Any] = {"config": asdict(config), "seconds": time.perf_counter() - start, "loss": losses}
    features = {split: encode(model, [clouds[i] for i in members]) for split, members in rows.items()}
    for split in ("test", "zeroshot"):
        held = _teachers_of(rows[split], models, texts, images)
        report[split] = _scores(heads, features[split], held, names)
        report[split] |= _neighbours(rows["train"], rows[split], models, clouds, features["train"], features[split])
    report["all_seconds"] = time.perf_counter() - begin
    model.save(output)
    storage.write_file(output / "pretrain.json", json.dumps(report, indent=1) + "\n")
    return report


@dataclass(frozen=True)
class Teachers:
    """What the teachers say of some models: text [n, T, C], image [n, V, C], their names and classes."""

    text: torch.Tensor
    image: torch.Tensor
    names: list[str]
    labels: list[str]


def _teachers_of(rows: list[int], models: list[Furniture], texts: torch.Tensor, images: torch.Tensor) -> Teachers:
    return Teachers(texts[rows], images[rows], [models[i].name for i in rows], [models[i].label for i in rows])


def ensure_encoder(name: str) -> None:
    """Train the point encoder of a preset into the cache, if it is not there yet."""
    if name not in PRESETS or _whole(default_folder(name)):
        return
    with registry.filling(), torch.random.fork_rng():  # the caller draws the same numbers whether it was there or not
        if not _whole(default_folder(name)):  # another process may have trained it meanwhile
            pretrain(default_folder(name), PretrainConfig(preset=name))


def _whole(folder: Path) -> bool:
    try:
        storage.check(folder, (WEIGHTS,))
    except storage.DamagedError:
        return False
    return True


def embed_texts(texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """Sentence embeddings of length 1, [n, 384]: the mean over tokens of all-MiniLM-L6-v2."""
    source = registry.need("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    once = sorted(set(texts), key=len)  # texts of like length share a batch, and none is read twice
    rows = []
    with torch.inference_mode():
        for start in range(0, len(once), batch_size):
            batch = tokenizer(once[start : start + batch_size], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            hidden = model(**batch).last_hidden_state
            rows.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    places = {text: place for place, text in enumerate(once)}
    return torch.cat(rows)[[places[text] for text in texts]].clone()


def _teachers(
    folder: Path, models: list[Furniture], clouds: list[PointCloud], config: PretrainConfig, cache: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the classes [classes, 384], texts [models, 4, 384] and images [models, 3, C], kept in `cache`.

    Models that are held out are not rendered: of them the icon alone is compared with.
    """
    file = cache / f"teachers-{config.tower}-{len(models)}-{RECIPE}"
    if not file.exists():
        prompts = [prompt.format(label) for label in CLASSES for prompt in PROMPTS]
        names = embed_texts(prompts).view(len(CLASSES), len(PROMPTS), -1).mean(1)
        said = [text for model, cloud in zip(models, clouds, strict=True) for text in descriptions(model, cloud)]
        texts = embed_texts(said).view(len(models), -1, names.shape[-1])
        tower, images = load_tower(config.tower), []
        known = {model.id for model in furniture.split(models)["train"]}
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for model, cloud in track(list(zip(models, clouds, strict=True)), "images"):
                views = [furniture.icon(folder, model)]
                if model.id in known:
                    views += [render(cloud, tower.size, *view) for view in VIEWS]
                seen = tower(torch.stack([tower.pixels(view) for view in views])).float().mean(1)
                images.append(seen.expand(1 + len(VIEWS), -1) if len(seen) == 1 else seen)
        with storage.staged(file) as draft:
            torch.save([nn.functional.normalize(names, dim=-1), texts, torch.stack(images)], draft / TEACHERS)
    names, texts, images = torch.load(storage.check(file) / TEACHERS, weights_only=True)
    return names, texts, images


def descriptions(model: Furniture, cloud: PointCloud) -> tuple[str, ...]:
    """A model in four sentences: its name, its class, class with colour and height, name with room and size."""
    name = model.label or model.name
    seen = SceneObject(0, name, (0.0, 0.0, 0.0, *model.size), colour_name(cloud.rgb)) if cloud.rgb is not None else None
    return article(model.name), article(name), describe(seen) if seen else article(name), model.text()


def _fit(
    both: nn.ModuleList, clouds: list[PointCloud], split: Teachers, names: torch.Tensor, config: PretrainConfig
) -> list[float]:
    """Train encoder and heads; in the end they hold the mean of their weights over the last steps."""
    rng = np.random.default_rng(config.seed)
    model, heads, mean = both[0], both[1], copy.deepcopy(both)
    assert isinstance(model, PointBert) and isinstance(heads, Heads)
    optimizer = torch.optim.AdamW(both.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.1)
    odds, losses = _odds(split.labels, config.labelled), []
    both.train()
    for step in track(range(config.steps), "point encoder"):
        rows = rng.choice(len(clouds), config.batch_size, replace=False, p=odds)
        points = prepare([augment(clouds[row], rng) for row in rows], model.config, rng)
        with torch.autocast("cpu", torch.bfloat16):
            features = model(points)
        loss = _loss(heads, features.float(), split, rows, names, rng, config.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for average, value in zip(mean.state_dict().values(), both.state_dict().values(), strict=True):
                if average.is_floating_point():
                    average.lerp_(value, max(FOLLOW, 1 / (step + 1)))
        losses.append(loss.item())
    both.load_state_dict(mean.state_dict())
    return [float(np.mean(part)) for part in np.array_split(losses, min(10, config.steps))]


def _loss(
    heads: Heads,
    features: torch.Tensor,
    split: Teachers,
    rows: np.ndarray,
    names: torch.Tensor,
    rng: np.random.Generator,
    smoothing: float,
) -> torch.Tensor:
    """Loss of one batch of the models `rows`; one text and one image of each are drawn."""
    text, image = heads(features)
    scales, batch = heads.scales.exp().clamp(max=100), np.arange(len(rows))
    said = split.text[rows][batch, rng.integers(0, split.text.shape[1], len(rows))]
    seen = split.image[rows][batch, rng.integers(0, split.image.shape[1], len(rows))]
    named = np.array(split.names)[rows]
    loss = contrast(text, said, scales[0], said @ said.T > SAME)
    loss = loss + contrast(image, seen, scales[1], torch.from_numpy(named[:, None] == named))
    classes = torch.tensor([_class(split.labels[row]) for row in rows])
    logits = scales[2] * text @ names.T
    return loss + nn.functional.cross_entropy(logits, classes, ignore_index=-1, label_smoothing=smoothing)


def _class(label: str) -> int:
    """The number of a class; -1 for none."""
    return list(CLASSES).index(label) if label else -1


def _odds(labels: list[str], share: float) -> np.ndarray:
    """How likely each model is drawn: `share` is spread evenly over the classes, the rest over all models."""
    members = Counter(label for label in labels if label)
    odds = [(1 - share) / len(labels) + (share / len(members) / members[label] if label else 0) for label in labels]
    return np.array(odds) / sum(odds)


def contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways between rows of length 1; `same` [n, n] marks the positives, which share the target evenly."""
    logits = scale * a @ b.T
    target = same.float() / same.sum(1, keepdim=True)  # symmetric in `same`, so it serves both ways
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def augment(cloud: PointCloud, rng: np.random.Generator) -> PointCloud:
    """The object as a room's crop shows it: thinned out to the scan's density, stretched, mirrored, turned by quarters
    or freely, seen in part, with some of the floor or of a wall beside it, with noise, in other light.
    """
    assert cloud.rgb is not None
    scale = rng.uniform(0.75, 1.25, 3)
    if rng.random() < 0.3:  # so that the form must tell, too, and not the size alone
        scale *= np.exp(rng.uniform(-0.7, 0.7))
    w, d, h = np.ptp(cloud.xyz, 0) * scale
    area = 2 * (w * d + w * h + d * h)
    drawn = rng.integers(0, len(cloud), int(np.clip(DENSITY * area * rng.uniform(0.5, 2), 120, 1000)))
    scale[0] *= rng.choice((-1, 1))
    angle = rng.integers(4) * np.pi / 2 + (rng.uniform(0, 2 * np.pi) if rng.random() < 0.25 else rng.normal(0, 0.05))
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    xyz, rgb = cloud.xyz[drawn] * scale @ turn.T, cloud.rgb[drawn]
    if rng.random() < 0.25:  # one side is hidden
        side = xyz @ rng.normal(size=3)
        kept = side > np.quantile(side, rng.uniform(0, 0.35))
        xyz, rgb = xyz[kept], rgb[kept]
    low, high = xyz.min(0), xyz.max(0)
    for axis, chance in enumerate((0.1, 0.1, 0.7)):
        if rng.random() < chance:
            face = float(np.prod(np.delete(high - low, axis)))
            plane = rng.uniform(low, high, (int(np.clip(DENSITY / 2 * face * rng.uniform(0.5, 1.5), 0, 300)), 3))
            plane[:, axis] = low[axis] if axis == 2 or rng.random() < 0.5 else high[axis]
            colour = rng.uniform(0.3, 1) + rng.normal(0, 0.05, 3)
            xyz, rgb = np.concatenate((xyz, plane)), np.concatenate((rgb, np.broadcast_to(colour, plane.shape)))
    xyz = xyz + rng.normal(0, NOISE * rng.uniform(0.5, 2), xyz.shape)
    light = rgb * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3)
    return PointCloud(xyz.astype(np.float32), light.clip(0, 1).astype(np.float32))


@torch.inference_mode()
def _scores(heads: Heads, features: torch.Tensor, split: Teachers, names: torch.Tensor) -> dict[str, Any]:
    """Zero-shot classification by the names of the classes; retrieval of the model's own text and icon among all."""
    text, image = heads(features)
    labelled = [row for row, label in enumerate(split.labels) if label]
    truth = torch.tensor([_class(split.labels[row]) for row in labelled])
    guess = (text[labelled] @ names.T).argmax(1)
    result: dict[str, Any] = {"models": len(features), "labelled": len(labelled)}
    result["zero_shot_acc"] = (guess == truth).float().mean().item()
    result["zero_shot_chance"] = 1 / len(CLASSES)
    for name, queries, gallery in (("text", text, split.text[:, 0]), ("image", image, split.image[:, 0])):
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
