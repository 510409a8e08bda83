"""Meshes as point clouds: vertices where there are no faces, else points drawn evenly from the surface."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from trimesh.resolvers import FilePathResolver

from octavius.points.cloud import PointCloud

MESH_POINTS = 100_000  # drawn from the surface of a mesh


def read_mesh(data: bytes, suffix: str, beside: Path | None = None, seed: int = 0) -> PointCloud:
    """Points of a file that trimesh reads; glTF and OBJ files are y up and are turned.

    Args:
        data: the file.
        suffix: of its name, in lower case.
        beside: where an OBJ file's materials and textures lie; None: without them.
        seed: of the points drawn from a surface.
    """
    options: dict[str, Any] = {"resolver": FilePathResolver(str(beside))} if suffix == ".obj" and beside else {}
    scene = trimesh.load_scene(io.BytesIO(data), file_type=suffix, **options)
    cloud = from_scene(scene, MESH_POINTS, np.random.default_rng(seed))
    return PointCloud(z_up(cloud.xyz), cloud.rgb) if suffix in (".obj", ".glb", ".gltf") else cloud


def from_scene(scene: Any, count: int, rng: np.random.Generator) -> PointCloud:
    """Points of a trimesh scene: its vertices if it has no faces, else `count` drawn evenly from its surface.

    The colour of a face is its texture's there, times the diffuse colour; without any, grey.
    """
    parts = scene.dump()
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not meshes:
        points = [part for part in parts if len(part.vertices)]
        if not points:
            raise ValueError("it holds neither points nor faces")
        xyz = np.concatenate([part.vertices for part in points]).astype(np.float32)
        rgb = [np.asarray(getattr(part.visual, "vertex_colors", ())) for part in points]
        coloured = all(len(colours) == len(part.vertices) for colours, part in zip(rgb, points, strict=True))
        return PointCloud(xyz, np.concatenate(rgb)[:, :3].astype(np.float32) / 255 if coloured else None)
    areas = np.array([mesh.area for mesh in meshes])
    if not areas.sum() > 0:
        raise ValueError("its faces have no area")
    shares = rng.multinomial(count, areas / areas.sum())
    drawn = [_sample(mesh, int(share), rng) for mesh, share in zip(meshes, shares, strict=True) if share]
    return PointCloud(*(np.concatenate(column).astype(np.float32) for column in zip(*drawn, strict=True)))


def z_up(xyz: np.ndarray) -> np.ndarray:
    """Coordinates with y up, z towards the viewer → z up, y away from the viewer."""
    return np.stack((xyz[:, 0], -xyz[:, 2], xyz[:, 1]), 1)


def _sample(mesh: trimesh.Trimesh, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points [count, 3] evenly over the surface and their colours."""
    faces = rng.choice(len(mesh.faces), count, p=mesh.area_faces / mesh.area_faces.sum())
    u, v = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack((1 - u, u * (1 - v), u * v), 1)  # [count, 3], uniform over a triangle (Osada et al. 2002)
    corners = mesh.faces[faces]
    xyz = np.einsum("nc,ncd->nd", weights, mesh.vertices[corners])
    return xyz, _colours(mesh, faces, corners, weights)


def _colours(mesh: Any, faces: np.ndarray, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    visual = mesh.visual
    if visual.kind != "texture":
        if visual.kind == "vertex":
            return np.einsum("nc,ncd->nd", weights, visual.vertex_colors[corners][..., :3] / 255)
        return visual.face_colors[faces][:, :3] / 255 if visual.kind == "face" else np.full((len(faces), 3), 0.6)
    material = visual.material
    diffuse = np.asarray(material.main_color[:3], np.float64) / 255
    image, uv = getattr(material, "image", None), visual.uv
    if image is None or uv is None or len(uv) != len(mesh.vertices):
        return np.broadcast_to(diffuse, (len(faces), 3))
    place = np.einsum("nc,ncd->nd", weights, np.nan_to_num(uv[corners]))
    pixels = np.asarray(image.convert("RGB"))
    column = np.floor(place[:, 0] % 1.0 * pixels.shape[1]).astype(int) % pixels.shape[1]
    row = np.floor((1 - place[:, 1] % 1.0) * pixels.shape[0]).astype(int) % pixels.shape[0]
    return pixels[row, column] / 255
