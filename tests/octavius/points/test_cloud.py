"""Reading clouds: every format gives the same points, and bad ones are named."""

import numpy as np
import pytest
import trimesh

from octavius.points.cloud import LARGEST, PointCloud, checked, read_cloud
from octavius.points.mesh import z_up

RNG = np.random.default_rng(0)
XYZ = RNG.uniform(-1, 2, (37, 3)).astype(np.float32)
RGB = RNG.integers(0, 256, (37, 3)).astype(np.uint8)
HEADER = (
    "VERSION .7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F {}\nCOUNT 1 1 1 1\nWIDTH 37\nHEIGHT 1\nPOINTS 37\nDATA {}\n"
)


def packed() -> np.ndarray:
    return (RGB.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(1).astype(np.uint32)


def write(path, kind):
    match kind:
        case "npy":
            np.save(path, np.concatenate((XYZ, RGB / 255), 1))
        case "npz":
            np.savez(path, xyz=XYZ, rgb=RGB)
        case "ply":
            trimesh.PointCloud(XYZ, RGB).export(path)
        case "ascii.pcd":
            rows = [f"{x!r} {y!r} {z!r} {c}" for (x, y, z), c in zip(XYZ.tolist(), packed(), strict=True)]
            path.write_text(HEADER.format("U", "ascii") + "\n".join(rows) + "\n")
        case "binary.pcd":
            table = np.zeros(37, [("xyz", "<f4", 3), ("rgb", "<f4")])
            table["xyz"], table["rgb"] = XYZ, packed().view(np.float32)
            path.write_bytes(HEADER.format("F", "binary").encode() + table.tobytes())
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "ply", "ascii.pcd", "binary.pcd"])
def test_formats_give_the_same_points(tmp_path, kind):
    cloud = read_cloud(write(tmp_path / f"x.{kind}", kind))
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)
    np.testing.assert_allclose(cloud.rgb, RGB / 255, atol=1 / 510)


def test_padded_pcd_is_read(tmp_path):
    table = np.zeros(37, [("xyz", "<f4", 3), ("a", "u1", 4), ("intensity", "<f4"), ("b", "u1", 12)])
    table["xyz"] = XYZ
    header = "FIELDS x y z _ intensity _\nSIZE 4 4 4 1 4 1\nTYPE F F F U F U\nCOUNT 1 1 1 4 1 12\n"
    (tmp_path / "x.pcd").write_bytes(f"{header}POINTS 37\nDATA binary\n".encode() + table.tobytes())
    assert np.array_equal(read_cloud(tmp_path / "x.pcd").xyz, XYZ)


def test_mesh_is_sampled_evenly_and_turned_upright(tmp_path):
    mesh = trimesh.creation.box((2, 3, 1))  # y up in the file
    mesh.export(tmp_path / "x.obj")
    cloud = read_cloud(tmp_path / "x.obj")
    np.testing.assert_allclose(cloud.box, [-1, -0.5, -1.5, 1, 0.5, 1.5], atol=1e-3)
    top = np.isclose(cloud.xyz[:, 2], 1.5).mean()
    assert top == pytest.approx(2 / 22, rel=0.1)
    assert np.array_equal(z_up(np.array([[1, 2, 3]])), [[1, -3, 2]])


@pytest.mark.parametrize(("unit", "scale"), [("m", 1.0), ("cm", 0.01), ("mm", 0.001)])
def test_unit_scales(tmp_path, unit, scale):
    np.save(tmp_path / "x.npy", XYZ)
    cloud = read_cloud(tmp_path / "x.npy", unit)
    np.testing.assert_allclose(cloud.xyz, XYZ * scale, rtol=1e-6)
    assert cloud.rgb is None and np.all(cloud.channels(True)[:, 3:] == 0.5)


BAD = {
    "empty": (np.zeros((0, 3)), "finite coordinates, got 0 points"),
    "all NaN": (np.full((5, 3), np.nan), "finite coordinates, got 5 points"),
    "too many NaN": (np.where(np.arange(37)[:, None] < 4, np.nan, XYZ), "4 of 37 points have NaN"),
    "millimetres": (XYZ * 1000, "must be in metres, got a scene .* long; give its unit"),
    "a map's coordinates": (
        np.add(XYZ, (500000.0, 5400000.0, 0.0)),
        "within 1000 m of the origin, got .* 5400002 m",
    ),
    "one place": (np.ones((9, 3)), "must extend over at least"),
    "columns": (XYZ[:, :2], r"must be \[n, 3\] xyz or \[n, 6\]"),
    "texts": (np.array([["a", "b", "c"]]), "numbers"),
}


@pytest.mark.parametrize(("array", "message"), BAD.values(), ids=BAD)
def test_bad_cloud_is_named(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=rf"x\.npy: .*{message}"):
        read_cloud(tmp_path / "x.npy")


def test_few_bad_points_are_dropped():
    xyz = np.concatenate((XYZ, [[np.inf, 0, 0]])).astype(np.float32)
    assert np.array_equal(checked(PointCloud(xyz), "x").xyz, XYZ)
    assert LARGEST > 100


@pytest.mark.parametrize("name", ["x.ply", "x.pcd", "x.npy", "x.npz", "x.obj", "x.txt"])
def test_damaged_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        read_cloud(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x80\x04not a cloud\n\xff")
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        read_cloud(tmp_path / name)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.ply", "x.binary.pcd"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_file_cut_short_is_named(tmp_path, name, share):
    file = write(tmp_path / name, name.removeprefix("x."))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        read_cloud(file)


def test_format_without_its_reader_is_named(tmp_path):
    (tmp_path / "x.dae").write_text("<COLLADA/>")
    with pytest.raises(ValueError, match=r"x\.dae: cannot be read"):
        read_cloud(tmp_path / "x.dae")


def test_objects_in_an_array_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[{}, 1, 2]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        read_cloud(tmp_path / "x.npy")


def test_unknown_unit_is_named(tmp_path):
    with pytest.raises(ValueError, match="unit must be one of m, cm, mm, got 'inch'"):
        read_cloud(tmp_path / "x.npy", "inch")
