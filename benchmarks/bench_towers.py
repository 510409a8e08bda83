"""What the tokens of an image tower know: a linear probe per token, trained and tested on different photographs.

Every token is asked which category covers its centre (or none). Three figures on the test images: tokens right among
those on an object; category of the image (one object, the most frequent answer over its tokens); milliseconds a
image takes on one thread.

Usage: python benchmarks/bench_towers.py [--images 1000]
"""

import argparse
import json
import time

import torch
from rich.console import Console
from rich.table import Table

from octavius.data.loading import data_folder
from octavius.data.records import read_records
from octavius.vision.features import FeatureStore
from octavius.vision.towers import load_tower

TOWERS = (("efficientnet-lite0", -1, 1), ("vit-s14", -2, 1), ("vit-s14", -2, 2), ("vit-s14", -4, 2))


def token_labels(records, labels: list[str], side: int) -> torch.Tensor:
    """[images, side²] index of the category whose box covers the token's centre, 0 for none."""
    centres = (torch.arange(side) + 0.5) / side
    out = torch.zeros(len(records), side, side, dtype=torch.long)
    for row, record in enumerate(records):
        for item in record.truth["object"]:
            x1, y1, x2, y2 = item["bbox"]
            inside = ((centres >= y1) & (centres <= y2))[:, None] & ((centres >= x1) & (centres <= x2))
            out[row][inside] = labels.index(item["label"]) + 1
    return out.flatten(1)


def probe(x: torch.Tensor, y: torch.Tensor, classes: int) -> torch.nn.Linear:
    """Multinomial logistic regression on tokens x [n, C], y [n]."""
    torch.manual_seed(0)
    net = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    for step in range(600):
        rows = torch.randint(len(x), (2048,))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 600)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    images = parser.parse_args().images
    folder = data_folder("mini-lamm:demo")
    sides = [
        [r for r in read_records(folder / f) if r.truth["benchmark"] == "mini-detection"][:images]
        for f in ("train.json", "test.json")
    ]
    labels = sorted({item["label"] for side in sides for record in side for item in record.truth["object"]})
    table = Table(
        title=f"{torch.get_num_threads()} threads, float32, {len(sides[0])} train and {len(sides[1])} test images"
    )
    for column in ("tower", "layer", "merge", "tokens", "width", "tokens right", "images right", "ms an image"):
        table.add_column(column, justify="left" if column == "tower" else "right")
    for name, layer, merge in TOWERS:
        tower = load_tower(name, layer, merge)
        store, start = FeatureStore(tower), time.perf_counter()
        (x, y), (u, v) = [
            (
                torch.cat([store([r.image for r in s[i : i + 4] if r.image]) for i in range(0, len(s), 4)]).float(),
                token_labels(s, labels, int(tower.tokens**0.5)),
            )
            for s in sides
        ]
        seconds = (time.perf_counter() - start) / sum(map(len, sides))
        mean, std = x.mean((0, 1)), x.std((0, 1)) + 1e-3
        net = probe(((x - mean) / std).flatten(0, 1), y.flatten(), len(labels) + 1)
        with torch.inference_mode():
            logits = net((u - mean) / std)
        on = v > 0
        single = torch.tensor([len(r.truth["object"]) == 1 for r in sides[1]])
        votes = logits[single][..., 1:].softmax(-1).sum(1).argmax(-1) + 1
        right = (votes == v[single].max(1).values).float().mean().item()
        table.add_row(
            name,
            str(layer),
            str(merge),
            str(tower.tokens),
            str(tower.width),
            f"{(logits.argmax(-1) == v)[on].float().mean().item():.3f}",
            f"{right:.3f}",
            f"{1000 * seconds:.1f}",
        )
        Console().print(json.dumps({"tower": name, "layer": layer, "merge": merge, "images": right}))
    Console().print(table)


if __name__ == "__main__":
    main()
