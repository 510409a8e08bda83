"""Images of clouds: nearer points hide farther ones, boxes frame what they hold."""

import numpy as np

from octavius.points.cloud import PointCloud
from octavius.points.render import camera, corners_of, render


def wall(y, rgb):
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 60)), -1).reshape(-1, 2)
    xyz = np.stack((grid[:, 0], np.full(3600, y), grid[:, 1]), 1).astype(np.float32)
    return xyz, np.tile(np.array(rgb, np.float32), (3600, 1))


def test_the_nearer_wall_is_seen():
    (near, red), (far, blue) = wall(0.0, (1, 0, 0)), wall(1.0, (0, 0, 1))
    cloud = PointCloud(np.concatenate((near, far)), np.concatenate((red, blue)))
    for yaw, seen in ((0.0, 0), (180.0, 2)):
        image = np.asarray(render(cloud, 64, yaw=yaw, pitch=0.0))
        assert image[32, 32].argmax() == seen and (image[0, 0] == 255).all()


def test_camera_shows_the_whole_box():
    box = np.array([-3, 1, 0, 5, 2, 2.5], np.float32)
    for yaw in range(0, 360, 45):
        rotation, offset = camera(box, yaw, 30, 100)
        places = (corners_of(box) @ rotation.T + offset)[:, :2]
        assert places.min() > 4 and places.max() < 96 and places.max() - places.min() > 80


def test_boxes_are_drawn_with_labels():
    cloud = PointCloud(wall(0.0, (1, 1, 1))[0], None)
    boxes = np.array([[0, 0, 0, 1, 0, 1], [0.2, -0.1, 0.2, 0.6, 0.1, 0.6]], np.float32)
    plain, framed = (np.asarray(render(cloud, 96, boxes=b, labels=["a"])) for b in (None, boxes))
    assert (plain != framed).any(2).sum() > 200
