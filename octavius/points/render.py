"""Images of point clouds: orthographic, painted from far to near, boxes over them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from octavius.points.cloud import PointCloud

PALETTE = ("#d1495b", "#2a7de1", "#2e933c", "#edae49", "#7b5ea7", "#00798c", "#8d6a3f", "#5c677d")


def camera(box: np.ndarray, yaw: float, pitch: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation [3, 3] (rows: right, up, towards the viewer) and offset, so that pixels = xyz @ rotation.T + offset.

    yaw 0 looks from -y towards +y; pitch lifts the viewer. The box (6 numbers) fills nine tenths of the image.
    """
    turn, lift = np.deg2rad(yaw), np.deg2rad(pitch)
    right = np.array([np.cos(turn), np.sin(turn), 0])
    near = np.array([np.sin(turn) * np.cos(lift), -np.cos(turn) * np.cos(lift), np.sin(lift)])
    rotation = np.stack((right, np.cross(near, right), near))
    corners = corners_of(box) @ rotation.T
    low, high = corners.min(0), corners.max(0)
    scale = 0.9 * size / max((high - low)[:2].max(), 1e-6)
    rotation = rotation * scale
    offset = size / 2 - (low + high) / 2 * scale
    return rotation, offset


def render(
    cloud: PointCloud,
    size: int = 224,
    yaw: float = 30.0,
    pitch: float = 25.0,
    boxes: np.ndarray | None = None,
    labels: Sequence[str] = (),
    dot: int = 3,
) -> Image.Image:
    """Draw a cloud on white.

    Args:
        cloud: at least one point.
        size: of the square image in pixels.
        yaw, pitch: of the viewer in degrees.
        boxes: [n, 6] drawn as wire frames, each with its label.
        dot: side of a point in pixels.
    """
    rotation, offset = camera(cloud.box, yaw, pitch, size)
    seen = cloud.xyz @ rotation.T + offset  # [n, 3]: right, up, near
    order = np.argsort(seen[:, 2], kind="stable")
    depth = (seen[order, 2] - seen[:, 2].min()) / max(np.ptp(seen[:, 2]), 1e-6)
    rgb = np.full((len(cloud), 3), 0.6) if cloud.rgb is None else cloud.rgb
    colours = (255 * rgb[order] * (0.65 + 0.35 * depth[:, None])).astype(np.uint8)
    pixels = np.full((size, size, 3), 255, np.uint8)
    column, row = np.round(seen[order, 0]).astype(int), size - 1 - np.round(seen[order, 1]).astype(int)
    reach = range(-(dot // 2), dot - dot // 2)
    for chunk in np.array_split(np.arange(len(order)), 64):  # nearer points over all dots of farther ones
        for dy in reach:
            for dx in reach:
                r, c = (row[chunk] + dy).clip(0, size - 1), (column[chunk] + dx).clip(0, size - 1)
                pixels[r, c] = colours[chunk]
    image = Image.fromarray(pixels)
    if boxes is not None:
        draw = ImageDraw.Draw(image)
        for index, box in enumerate(boxes):
            colour = PALETTE[index % len(PALETTE)]
            corners = corners_of(box) @ rotation.T + offset
            ends = [(float(x), float(size - 1 - y)) for x, y, _ in corners]
            for a in range(8):
                for bit in (1, 2, 4):
                    if not a & bit:
                        draw.line((ends[a], ends[a | bit]), fill=colour, width=2)
            if index < len(labels):
                draw.text(min(ends, key=lambda end: end[1]), labels[index], fill=colour, anchor="mb")
    return image


def corners_of(box: np.ndarray) -> np.ndarray:
    """(xmin, ymin, zmin, xmax, ymax, zmax) → [8, 3]; bit 0 of a corner's number chooses x, bit 1 y, bit 2 z."""
    number = np.arange(8)[:, None] >> np.arange(3) & 1
    return np.where(number, box[3:], box[:3])
