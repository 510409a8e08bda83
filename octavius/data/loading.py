"""Loads the data of a run: embedded sets are built, formats detected, images and clouds encoded once."""

from pathlib import Path
from typing import NamedTuple

from octavius.assets import registry
from octavius.config import DataConfig
from octavius.data.mini_lamm import build
from octavius.data.records import Record, drop_unreadable, make_records, read_records
from octavius.data.scan2inst import rooms
from octavius.data.scan2inst.released import read_layout, read_pickle
from octavius.points.object_store import Objects, ObjectStore, Region
from octavius.points.pointbert import PointBert
from octavius.vision.features import FeatureStore
from octavius.vision.towers import ImageTower

Scenes = dict[Path, Objects]  # objects of clouds that the data bring along
EMBEDDED = {"mini-lamm": build, "mini-scan2inst": rooms}


class Stores(NamedTuple):
    """Features of images and objects of point clouds; None for what the model does not read."""

    images: FeatureStore | None = None
    scenes: ObjectStore | None = None

    def prepare(self, records: list[Record]) -> dict[Path | Region, str]:
        """Encode what the records show, once.

        Returns:
            the unreadable files and the objects that their clouds lack, each with the reason.
        """
        bad: dict[Path | Region, str] = {}
        if self.images:
            bad |= self.images.prepare([record.image for record in records if record.image])
        if self.scenes:
            regions = [record.cloud for record in records if record.cloud]
            bad |= self.scenes.prepare(region.cloud for region in regions)
            bad |= self.scenes.lacking(regions)
        return bad


def data_folder(root: str) -> Path:
    """The folder that a root names; embedded data is built there first if it is missing."""
    name, colon, size = root.partition(":")
    if not colon or name not in EMBEDDED:
        return Path(root)
    builder = EMBEDDED[name]
    with registry.filling():  # one process builds, the others find it ready
        return builder.build(registry.default_cache() / name / f"{size}-{builder.VERSION}", size=size)


def load_data(
    config: DataConfig,
    file: str,
    file_3d: str | None = None,
    *,
    tower: ImageTower | None = None,
    encoder: PointBert | None = None,
    clouds: bool = False,
) -> tuple[list[Record], Stores]:
    """Records whose images and clouds can be read, and the features of those.

    Args:
        file: records of images, under `config.root`.
        file_3d: records of clouds, under `config.root_3d`; named like the other when None.
        tower: the model's image tower; None for a model that reads no images.
        encoder: the model's point encoder; None where the data bring the objects' features.
        clouds: whether the model reads point clouds.
    """
    records, scenes = [], {}
    if config.root:
        records += read_records(data_folder(config.root) / file, config.images)
    if config.root_3d:
        of_clouds, scenes = read_scenes(data_folder(config.root_3d) / (file_3d or file))
        records += of_clouds
    stores = open_stores(scenes, config.cache_features, tower=tower, encoder=encoder, clouds=clouds)
    return drop_unreadable(records, stores.prepare(records)), stores


def open_stores(
    scenes: Scenes,
    cache: bool = True,
    *,
    tower: ImageTower | None = None,
    encoder: PointBert | None = None,
    clouds: bool = False,
) -> Stores:
    """Empty stores of what a model reads.

    Args:
        scenes: objects that the data bring along.
        cache: keep features on disk.
        tower, encoder, clouds: as `load_data`.
    """
    folder = registry.default_cache() / "features" if cache else None
    images = FeatureStore(tower, folder) if tower else None
    return Stores(images, ObjectStore(encoder, folder, scenes) if clouds else None)


def read_scenes(file: Path) -> tuple[list[Record], Scenes]:
    """Records about clouds and the objects that are known already: ours, or upstream's JSON or pickle.

    Upstream's JSON has no `pcl`: its features lie in the folders around it.
    """
    if file.suffix == ".pickle":
        items, scenes = read_pickle(file)
        return make_records(items, file, Path()), scenes
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if text and '"pcl"' not in text and '"scene_id"' in text:
        root = file.parent.parent if file.parent.name == "meta_file" else file.parent
        items, scenes = read_layout(file, root)
        return make_records(items, file, Path()), scenes
    return read_records(file), {}


def loops(record: Record, data: DataConfig) -> int:
    """How often an epoch passes over a record."""
    if record.cloud:
        return data.loop_3d
    return data.loop_detection if record.task_type == "detection" else data.loop
