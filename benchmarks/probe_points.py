"""What a linear layer reads from the point encoder's features of objects cut out of rooms: class, colour, height.

    python benchmarks/probe_points.py --encoder small --size demo

Trained on the objects that the classification records of mini-Scan2Inst's training rooms ask about, scored on those of
the test rooms, whose models are other ones, and on the catalogue that is kept for the zero-shot rooms. Beside the
features: the box alone, which the LLM gets through a position encoding, and raw geometry (an occupancy grid, 8³).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from octavius.assets import registry
from octavius.data.scan2inst import rooms
from octavius.data.scan2inst.relations import colour_name
from octavius.points.cloud import PointCloud, read_cloud
from octavius.points.pointbert import PointBert, encode, load_encoder
from octavius.points.proposals import boxes_within, objects_of
from octavius.training.point_encoder import occupancy

REGULAR = 0.01  # C of the logistic regressions: fixed, not chosen on the test rooms


def objects(folder: Path, side: str) -> tuple[list[PointCloud], np.ndarray, np.ndarray]:
    """Crops, boxes [n, 6] and classes [n] of the objects that classification records ask about."""
    clouds, boxes, labels = [], [], []
    for record in json.loads((folder / f"{side}.json").read_text()):
        if record["benchmark"] == "mini-classification3d":
            path = folder / record["pcl"]
            kept, found = objects_of(read_cloud(path), boxes_within(path))
            row = kept.names.index(str(record["object_id"]))
            clouds.append(found[row])
            boxes.append(kept.boxes[row])
            labels.append(record["label"])
    return clouds, np.stack(boxes), np.array(labels)


def inputs(encoder: PointBert, clouds: list[PointCloud], boxes: np.ndarray) -> dict[str, np.ndarray]:
    """What the probes read, [n, any]; the box as two corners, its sides, and their logarithms."""
    sides = boxes[:, 3:] - boxes[:, :3]
    box = np.concatenate((boxes, sides, np.log(sides.clip(0.02))), 1)
    features = encode(encoder, clouds, dtype=torch.bfloat16).numpy()
    grids = torch.stack([occupancy(cloud) for cloud in clouds]).numpy()
    return {
        "box": box,
        "raw geometry": grids,
        "raw geometry and box": np.concatenate((grids, box), 1),
        "features": features,
        "features and box": np.concatenate((features, box), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--size", choices=rooms.PRESETS, default="demo")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = rooms.build(registry.default_cache() / "mini-scan2inst" / args.size, args.size)
    encoder = load_encoder(args.encoder)
    sides = {side: objects(folder, side) for side in rooms.SPLITS}
    read = {side: inputs(encoder, clouds, boxes) for side, (clouds, boxes, _) in sides.items()}
    colours = {
        side: np.array([colour_name(cloud.channels(True)[:, 3:]) for cloud in found[0]])
        for side, found in sides.items()
    }
    heights = {side: np.log([np.ptp(cloud.xyz[:, 2]) for cloud in found[0]]) for side, found in sides.items()}
    classes = len(set(sides["train"][2]))
    print(f"{args.encoder}, {args.size}: {[len(found[2]) for found in sides.values()]} objects, {classes} classes")
    print("train, test and zero-shot rooms; accuracy of class and of colour, error of height in percent (median)")
    for name in read["train"]:
        cells = []
        for truth in ({side: found[2] for side, found in sides.items()}, colours):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=REGULAR, max_iter=500))
            probe.fit(read["train"][name], truth["train"])
            cells += [f"{(probe.predict(read[side][name]) == truth[side]).mean():.3f}" for side in rooms.SPLITS[1:]]
        ridge = make_pipeline(StandardScaler(), Ridge(100.0)).fit(read["train"][name], heights["train"])
        wrong = [np.abs(ridge.predict(read[side][name]) - heights[side]) for side in rooms.SPLITS[1:]]
        cells += [f"{100 * np.median(errors):.0f}" for errors in wrong]
        print(f"{name:22s} class {cells[0]} {cells[1]}  colour {cells[2]} {cells[3]}  height {cells[4]} {cells[5]}")


if __name__ == "__main__":
    main()
