"""Questions have one right answer, which the scene's boxes and colours give; blind guessing gains little."""

from collections import Counter

import numpy as np
import pytest

from octavius.data.scan2inst.questions import DIRECTIONS, QUESTIONS, Builder, candidates, describe, plural
from octavius.data.scan2inst.relations import Scene, SceneObject, relation
from tests.octavius.data.scan2inst.test_relations import ROOM, box

NAMES = ("chair", "table", "lamp", "sofa", "bed")
SCENE = Scene(
    "room",
    "clouds/room.npz",
    ROOM,
    [
        SceneObject(0, "table", box(0, 0), "brown"),
        SceneObject(1, "lamp", box(0.1, 0.1, 1.0, 0.3, 0.3, 0.4), "red"),
        SceneObject(2, "chair", box(-1.4, 0.1, 0, 0.5, 0.5), "gray"),
        SceneObject(3, "chair", box(2.7, 1.7, 0, 0.5, 0.5), "blue", ("A blue chair in the corner.",)),
    ],
    [("What is on the table?", ["lamp", "red lamp"])],
)


def test_candidates_are_true():
    found = {(asked.kind, *asked.names): asked for asked in candidates(SCENE, NAMES)}
    assert found["over", "table"].text == "A red lamp." and found["beneath", "lamp"].text == "A brown table."
    assert found["left", "table"].text == "A gray chair."
    assert found["corner",].text == "A blue chair." and found["corner",].about == 3
    assert found["count", "chairs"].label == "2" and found["colour", "table"].label == "brown"
    assert found["size", "table", "lamp"].label == "table"
    assert found["side", "lamp", "table"].label == "over"
    assert not any("chair" in names for _, *names in found)  # there are two: no question can name one
    for asked in found.values():
        assert asked.label in asked.labels and asked.kind in QUESTIONS


def test_records_have_upstreams_form():
    records = Builder(NAMES, per_scene=(2, 2, 6)).write(SCENE)
    assert len({record["id"] for record in records}) == len(records) == 11
    for record in records:
        human, gpt = record["conversations"]
        assert human["from"] == "human" and gpt["from"] == "gpt" and human["value"] and gpt["value"]
        assert record["pcl"] == "clouds/room.npz" and record["scene_id"] == "room" and "question_key" not in record
        tasks = {"classification3d": "classification3d", "caption3d": "description3d", "vqa3d": "VQA3D"}
        assert record["task_type"] == tasks[record["benchmark"].removeprefix("mini-")]
        if record["benchmark"] != "mini-vqa3d":
            assert record["object_name"] == SCENE.objects[record["object_id"]].name
    written = next(record for record in records if record["id"] == "room_q0")
    assert written["sentences"] == written["accepted"] == ["lamp", "red lamp"]
    assert written["conversations"][1]["value"] == "lamp"


def test_written_captions_win():
    records = Builder(NAMES, per_scene=(0, 4, 0)).write(SCENE)
    said = {record["object_id"]: record["sentences"] for record in records if record["benchmark"] == "mini-caption3d"}
    assert said[3] == ["A blue chair in the corner."] and said[0] == [describe(SCENE.objects[0])]
    assert describe(SCENE.objects[0]) == "This is a brown table. It is 1.0 m high."


def random_scene(rng, number):
    objects = []
    for index in range(6):
        x, y = rng.uniform(-2.5, 2.5), rng.uniform(-1.5, 1.5)
        colour = str(rng.choice(["red", "blue", "brown", "white"]))
        objects.append(SceneObject(index, str(rng.choice(NAMES)), box(x, y, 0, *rng.uniform(0.2, 1, 3)), colour))
    return Scene(f"s{number}", "x.npz", ROOM, objects)


@pytest.fixture(scope="module")
def many():
    rng, builder = np.random.default_rng(0), Builder(NAMES)
    scenes = [random_scene(rng, number) for number in range(150)]
    return {scene.id: scene for scene in scenes}, [record for scene in scenes for record in builder.write(scene)]


def test_sides_are_those_of_the_boxes(many):
    scenes, records = many
    sides = [record for record in records if record.get("kind") == "side"]
    assert len(sides) > 20
    for record in sides:
        objects = scenes[record["scene_id"]].objects
        a = objects[record["object_id"]]
        words = record["conversations"][0]["value"]
        b = next(o for o in objects if o.id != a.id and o.name in words)
        assert relation(a.box, b.box) == record["label"] and DIRECTIONS[record["label"]] == record["sentences"][0]


def test_no_answer_dominates_its_kind(many):
    for kind in ("left", "right", "next to", "colour", "side"):
        labels = Counter(record["label"] for record in many[1] if record.get("kind") == kind)
        assert max(labels.values()) < 0.6 * sum(labels.values()), (kind, labels)
    phrasings = {record["conversations"][0]["value"] for record in many[1] if record["benchmark"] == "mini-caption3d"}
    assert len(phrasings) >= 5


@pytest.mark.parametrize(("height", "stands"), [(1.0, True), (1.04, True), (1.8, False)])
def test_support_is_asked_only_of_what_touches(height, stands):
    lamp = SceneObject(1, "lamp", box(0.1, 0.1, height, 0.3, 0.3, 0.4), "red")
    scene = Scene("room", "x.npz", ROOM, [SCENE.objects[0], lamp])
    asked = Counter()
    for seed in range(40):
        for record in Builder(NAMES, seed, (0, 0, 6)).write(scene):
            if record.get("kind") in ("over", "beneath"):
                words = record["conversations"][0]["value"]
                asked["stand" in words or "on top" in words.lower()] += 1
    assert asked[False] > 20 and (asked[True] > 20) is stands and bool(asked[True]) is stands


def test_order_of_words_does_not_tell_the_larger(many):
    sizes = [record for record in many[1] if record.get("kind") == "size"]
    first = Counter()
    for record in sizes:
        words, (one, other) = record["conversations"][0]["value"], record["labels"]
        assert words.index(one) < words.index(other)
        first[record["label"] == one] += 1
    assert len(sizes) > 50 and abs(first[True] - first[False]) <= 1


def test_same_seed_same_records():
    assert Builder(NAMES, 3).write(SCENE) == Builder(NAMES, 3).write(SCENE)
    assert [plural(name) for name in ("chair", "box", "person", "stairs")] == ["chairs", "boxes", "people", "stairs"]
