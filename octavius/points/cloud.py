"""Point clouds: reading PLY, PCD, NPY, NPZ, OBJ and other meshes, in metres, z up; and what is done when they are bad.

A mesh is sampled, so that every file gives points. Points with NaN or infinite coordinates are dropped if they are few.
"""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octavius.inputs.arrays import read_array, read_arrays

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
LARGEST = 200.0  # metres: a longer scene is one in other units
SMALLEST = 1e-3
FARTHEST = 1000.0  # metres from the origin: there float32 still tells a tenth of a millimetre
MAX_BAD = 0.05  # share of the points that may have no finite coordinates
DAMAGED = (  # what numpy and trimesh raise on files that are cut short, of another format, or lack their reader
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, NotImplementedError,
    struct.error, zipfile.BadZipFile, zlib.error, SyntaxError, MemoryError, ArithmeticError, RecursionError, NameError,
    AssertionError,
)  # fmt: skip


@dataclass(frozen=True)
class PointCloud:
    """xyz: [n, 3] float32 in metres, z up; rgb: [n, 3] float32 in 0..1, or None."""

    xyz: np.ndarray
    rgb: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.xyz)

    def __getitem__(self, rows: np.ndarray | slice) -> "PointCloud":
        return PointCloud(self.xyz[rows], None if self.rgb is None else self.rgb[rows])

    @property
    def box(self) -> np.ndarray:
        """(xmin, ymin, zmin, xmax, ymax, zmax), float32 [6]."""
        return np.concatenate((self.xyz.min(0), self.xyz.max(0)))

    def channels(self, colours: bool) -> np.ndarray:
        """[n, 6] with colours (grey where there are none), else [n, 3]."""
        if not colours:
            return self.xyz
        return np.concatenate((self.xyz, np.full_like(self.xyz, 0.5) if self.rgb is None else self.rgb), 1)


def read_cloud(path: str | Path, unit: str = "m", seed: int = 0) -> PointCloud:
    """Read a point cloud or a mesh.

    Args:
        path: .npy or .npz ([n, 3] xyz or [n, 6] xyz+rgb; an .npz has them as `xyz` and `rgb`), .pcd, or what trimesh
            reads (.ply, .obj, .stl, .off, .glb, .xyz). glTF and OBJ files are y up and are turned.
        unit: of the coordinates: m, cm or mm.
        seed: of the points drawn from a mesh.
    Raises:
        ValueError: no such file or format; no points; more than MAX_BAD of them without finite coordinates; a scene
            longer than LARGEST, hence most likely in other units; a coordinate beyond FARTHEST.
    """
    path = Path(path)
    _check_unit(unit)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a point cloud: {error}") from error
    return cloud_from_bytes(data, str(path), unit, seed, path)


def cloud_from_bytes(data: bytes, name: str, unit: str = "m", seed: int = 0, beside: Path | None = None) -> PointCloud:
    """Read a point cloud or a mesh that is in memory.

    Args:
        data: the file.
        name: of the file; its suffix says the format.
        unit, seed: as `read_cloud`.
        beside: where an OBJ file's materials and textures lie; None: without them.
    Raises:
        ValueError: as `read_cloud`.
    """
    _check_unit(unit)
    suffix = Path(name).suffix.lower()
    try:
        match suffix:
            case ".npy":
                cloud = _from_array(read_array(name, data))
            case ".npz":
                rows = list(read_arrays(name, ("xyz", "rgb"), data).values())
                cloud = _from_array(np.concatenate(rows, 1))
            case ".pcd":
                cloud = _from_pcd(data)
            case _:
                from octavius.points.mesh import read_mesh  # trimesh is slow to import

                cloud = read_mesh(data, suffix, beside, seed)
    except DAMAGED as error:
        raise ValueError(f"{name}: cannot be read as a point cloud: {error}") from error
    return checked(PointCloud(cloud.xyz * np.float32(UNITS[unit]), cloud.rgb), name)


def _check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")


def checked(cloud: PointCloud, where: str) -> PointCloud:
    """The cloud without its points at NaN or infinity.

    Raises:
        ValueError: as `read_cloud`.
    """
    good = np.asarray(np.isfinite(cloud.xyz).all(1))
    if not good.any():
        raise ValueError(f"{where}: must hold points with finite coordinates, got {len(cloud)} points")
    if (bad := len(cloud) - int(good.sum())) > MAX_BAD * len(cloud):
        raise ValueError(f"{where}: {bad} of {len(cloud)} points have NaN or infinite coordinates, {MAX_BAD:.0%} may")
    cloud = cloud[good] if bad else cloud
    if cloud.rgb is not None:
        cloud = PointCloud(cloud.xyz, np.nan_to_num(cloud.rgb, nan=0.5).clip(0, 1))
    length = float((cloud.xyz.max(0) - cloud.xyz.min(0)).max())
    if length > LARGEST:
        raise ValueError(
            f"{where}: must be in metres, got a scene {length:.0f} long; give its unit ({', '.join(UNITS)})"
        )
    if (far := float(np.abs(cloud.xyz).max())) > FARTHEST:
        raise ValueError(
            f"{where}: must lie within {FARTHEST:.0f} m of the origin, got a coordinate of {far:.0f} m; "
            "subtract a corner of the scene from its points and boxes"
        )
    if length < SMALLEST:
        raise ValueError(f"{where}: must extend over at least {SMALLEST} m, got {length:.2g}; is the unit right?")
    return cloud


def _from_array(array: np.ndarray) -> PointCloud:
    if array.ndim != 2 or array.shape[1] not in (3, 6) or array.dtype.kind not in "fiu":
        raise ValueError(f"an array must be [n, 3] xyz or [n, 6] xyz+rgb numbers, got {array.shape} {array.dtype}")
    xyz = array[:, :3].astype(np.float32)
    if array.shape[1] == 3:
        return PointCloud(xyz)
    rgb = array[:, 3:].astype(np.float32)
    return PointCloud(xyz, rgb / 255 if len(rgb) and np.nanmax(rgb) > 1 else rgb)


def _from_pcd(data: bytes) -> PointCloud:
    """The Point Cloud Library's format, version 0.7: `ascii` or `binary` data."""
    header, start = {}, 0
    while "DATA" not in header:
        end = data.index(b"\n", start)
        line = data[start:end].decode("ascii").split()
        start = end + 1
        if line and not line[0].startswith("#"):
            header[line[0]] = line[1:]
    names, sizes, kinds = header["FIELDS"], list(map(int, header["SIZE"])), header["TYPE"]
    counts = list(map(int, header.get("COUNT", ["1"] * len(names))))
    names = [f"_{row}" if name == "_" else name for row, name in enumerate(names)]  # padding may come repeatedly
    form = {"F": "f", "I": "i", "U": "u"}
    fields = [(n, f"<{form[k]}{s}", (c,)) for n, k, s, c in zip(names, kinds, sizes, counts, strict=True)]
    points, columns = int(header["POINTS"][0]), np.dtype(fields)
    match header["DATA"][0]:
        case "binary":
            table = np.frombuffer(data, columns, points, start)
        case "ascii":
            flat = np.loadtxt(io.BytesIO(data[start:]), np.float64, ndmin=2)[:points]
            table, at = np.zeros(len(flat), columns), 0
            for name, count in zip(names, counts, strict=True):
                table[name] = flat[:, at : at + count]
                at += count
        case kind:
            raise ValueError(f"PCD data must be ascii or binary, got {kind}; see pcl_convert_pcd_ascii_binary")
    xyz = np.concatenate([table[axis] for axis in "xyz"], 1).astype(np.float32)
    packed = next((table[name] for name in ("rgb", "rgba") if name in names), None)
    if packed is None:
        return PointCloud(xyz)
    bits = np.ascontiguousarray(packed[:, 0].astype(packed.dtype)).view(np.uint32)  # 0x00RRGGBB, often stored as float
    return PointCloud(xyz, np.stack([(bits >> shift & 255) for shift in (16, 8, 0)], 1).astype(np.float32) / 255)
