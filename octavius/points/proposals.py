"""Object-As-Scene, step 1: regions of interest of a scene, as boxes (xmin, ymin, zmin, xmax, ymax, zmax) in metres.

They are given (ground truth, or a detector's, in upstream's layout of 8×3 corners per object), or proposed here:
planes that carry much of the scene (floor, ceiling, walls) are taken away by RANSAC, the rest is clustered.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree
from sklearn.cluster import DBSCAN

from octavius.inputs.arrays import read_array, read_arrays
from octavius.inputs.documents import read_json
from octavius.points.cloud import DAMAGED, PointCloud

MIN_POINTS = 8  # an object with fewer in its box is no object
MAX_OBJECTS = 64
VOXEL = 0.04  # metres, of the grid that is clustered
SINGLE = 2.5  # metres: a shorter cloud is not a room
PLANES, TRIES = 6, 400  # planes taken away at most, and candidates for each


@dataclass(frozen=True)
class Boxes:
    """boxes: [P, 6] float32; names: of the objects, "" where unknown."""

    boxes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.boxes)


def read_boxes(path: str | Path) -> Boxes:
    """Boxes of one scene.

    Args:
        path: a folder of `{id}-{name}.npy` files, each 8×3 corners or 6 numbers (upstream's layout; ids in their
            order, everything after the first `-` is the name); an .npy file [P, 6] or [P, 8, 3]; or a .json list of
            {"bbox": 6 numbers or 8 corners, "name": optional}.
    Raises:
        ValueError: another layout, no box, a box that is not finite or has no extent.
    """
    path = Path(path)
    names: list[str] = []
    try:
        if path.is_dir():
            files = sorted(path.glob("*.npy"), key=lambda file: (len(file.stem.partition("-")[0]), file.stem))
            names = [file.stem.partition("-")[2] for file in files]
            raw = [read_array(file) for file in files]
        elif path.suffix == ".json":
            items = read_json(path)
            names, raw = [str(item.get("name", "")) for item in items], [item["bbox"] for item in items]
        else:
            raw = list(read_array(path))
        boxes = [_extent(np.asarray(box, np.float64)) for box in raw]
    except DAMAGED as error:
        raise ValueError(f"{path}: cannot be read as boxes: {error}") from error
    if not boxes:
        raise ValueError(f"{path}: must hold at least one box")
    return Boxes(np.stack(boxes), names or [""] * len(boxes))


def boxes_within(path: Path, data: bytes | None = None) -> Boxes | None:
    """The boxes that an .npz cloud carries, `boxes` [P, 6] or [P, 8, 3]; their names are its `ids` [P], else 0, 1 ...

    Args:
        path: of the file.
        data: what the file holds; None reads it.
    Raises:
        ValueError: they are not boxes, or not one whole number for each.
    """
    arrays = read_arrays(path, ("boxes", "ids"), data)
    if "boxes" not in arrays:
        return None
    try:
        boxes = np.stack([_extent(np.asarray(box, np.float64)) for box in arrays["boxes"]])
        ids = arrays.get("ids", np.arange(len(boxes)))
    except DAMAGED as error:
        raise ValueError(f"{path}: its boxes cannot be read: {error}") from error
    if ids.shape != (len(boxes),) or ids.dtype.kind not in "iu" or len(set(ids.tolist())) < len(ids):
        raise ValueError(f"{path}: ids must be {len(boxes)} different whole numbers, got {ids.shape} {ids.dtype}")
    return Boxes(boxes, [str(number) for number in ids])


def _extent(box: np.ndarray) -> np.ndarray:
    """6 numbers or 8×3 corners → (min, max)."""
    if box.shape == (8, 3):
        box = np.concatenate((box.min(0), box.max(0)))
    if box.shape != (6,) or not np.isfinite(box).all() or (box[3:] < box[:3]).any() or (box[3:] <= box[:3]).all():
        raise ValueError(f"a box must be 8 corners or (xmin, ymin, zmin, xmax, ymax, zmax), got {box.tolist()}")
    return box.astype(np.float32)


def crop(cloud: PointCloud, boxes: np.ndarray, margin: float = 0.01) -> list[PointCloud]:
    """The points inside every box, grown by `margin` metres; empty clouds where a box holds none."""
    objects = []
    order = np.argsort(cloud.xyz[:, 0], kind="stable")
    x = cloud.xyz[order, 0]
    for box in boxes:  # only the slab of the box's x range is looked at
        slab = order[np.searchsorted(x, box[0] - margin) : np.searchsorted(x, box[3] + margin, "right")]
        rest = cloud.xyz[slab, 1:]
        inside = ((rest >= box[1:3] - margin) & (rest <= box[4:] + margin)).all(1)
        objects.append(cloud[slab[inside]])
    return objects


def objects_of(cloud: PointCloud, boxes: Boxes | None = None) -> tuple[Boxes, list[PointCloud]]:
    """Boxes that hold at least MIN_POINTS points, and the points; proposals where no boxes are given.

    Raises:
        ValueError: none of the boxes does: most likely they are of another scene or in another unit.
    """
    found = propose(cloud) if boxes is None else boxes
    clouds = crop(cloud, found.boxes)
    kept = [row for row, points in enumerate(clouds) if len(points) >= MIN_POINTS]
    if not kept:
        raise ValueError(
            f"none of the {len(found)} boxes holds {MIN_POINTS} points of the scene, which spans "
            f"{np.round(cloud.box, 2).tolist()}; are the boxes of this scene, and in metres?"
        )
    return Boxes(found.boxes[kept], [found.names[row] for row in kept]), [clouds[row] for row in kept]


def propose(cloud: PointCloud, seed: int = 0) -> Boxes:
    """Boxes of the things that stand in a scene, the largest first, at most MAX_OBJECTS.

    Large planes go, then DBSCAN (Ester et al. 1996) joins what is nearer than three cells, or, in a thin cloud, than
    one and a half times the usual distance to the fourth neighbour. Things that touch are one. A cloud no longer than
    SINGLE, or in which nothing is found, is one object.
    """
    if (cloud.box[3:] - cloud.box[:3]).max() <= SINGLE:
        return Boxes(cloud.box[None], [""])
    rng = np.random.default_rng(seed)
    size = max(VOXEL, float((cloud.box[3:] - cloud.box[:3]).max()) / 400)
    rest = remove_planes(voxels(cloud.xyz, size), voxels(cloud.xyz, 2.5 * size), 1.5 * size, rng)
    boxes = []
    if len(rest) >= MIN_POINTS:
        fourth = KDTree(rest).query(rest, 5)[0][:, 4]
        eps = max(3 * size, 1.5 * float(np.median(fourth)))
        labels = DBSCAN(eps=eps, min_samples=4).fit_predict(rest)
        fewest = max(MIN_POINTS, len(rest) // 500)
        for label in range(labels.max() + 1):
            points = rest[labels == label]
            if len(points) >= fewest:
                boxes.append(np.concatenate((points.min(0) - size / 2, points.max(0) + size / 2)))
    boxes.sort(key=lambda box: -float(np.prod(box[3:] - box[:3])))
    found = np.stack(boxes[:MAX_OBJECTS]) if boxes else cloud.box[None]
    return Boxes(found.astype(np.float32), [""] * len(found))


def voxels(xyz: np.ndarray, size: float) -> np.ndarray:
    """One point, the mean, for every occupied cell of a grid."""
    cells = np.floor((xyz - xyz.min(0)) / size).astype(np.int64)
    keys = cells @ (1, 1 << 20, 1 << 40)
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(inverse, xyz[:, axis]) for axis in range(3)], 1)
    return (sums / counts[:, None]).astype(np.float32)


def remove_planes(
    xyz: np.ndarray, coarse: np.ndarray, thickness: float, rng: np.random.Generator, share: float = 0.06
) -> np.ndarray:
    """The points away from large upright or level planes at the rim of the scene (RANSAC, Fischler and Bolles 1981).

    Candidates go through one point (level) or two (upright). A plane goes if it carries at least `share` of the coarse
    cells and at most a twentieth of them lie beyond it: table tops and cupboard doors stay.

    Args:
        xyz: points to thin out.
        coarse: cells of about even density, in which planes are looked for.
        thickness: metres to both sides of a plane.
    """
    total, left = len(coarse), coarse
    for _ in range(PLANES):
        if len(left) < MIN_POINTS:
            break
        pairs = left[rng.integers(0, len(left), (TRIES, 2))]
        across = (pairs[:, 1] - pairs[:, 0])[:, [1, 0, 2]] * (1, -1, 0)  # at right angles to the pair, and level
        across[: TRIES // 4] = (0, 0, 1)
        length = np.linalg.norm(across, axis=1)
        normals, origins = (across / np.maximum(length, 1e-9)[:, None])[length > 1e-6], pairs[length > 1e-6, 0]
        few = left if len(left) <= 4000 else left[rng.choice(len(left), 4000, replace=False)]
        distance = few @ normals.T - np.einsum("pc,pc->p", origins, normals)  # [n, planes]
        on = (np.abs(distance) < thickness).mean(0)
        beyond = np.minimum((distance > thickness).mean(0), (distance < -thickness).mean(0))
        value = np.where(beyond < 0.05, on, 0)
        if not value.size or value.max() * len(left) < share * total:
            break
        normal, origin = normals[value.argmax()], origins[value.argmax()]
        xyz = xyz[np.abs((xyz - origin) @ normal) >= thickness]
        left = left[np.abs((left - origin) @ normal) >= thickness]
    return xyz
