"""Trees in the released benchmarks' layouts: what is read, what is asked, what a known answer scores."""

import json
import pickle

import numpy as np
import pytest
import torch

from octavius.data import meta_files
from octavius.evaluation.benchmarks import BENCHMARKS, benchmark_records
from octavius.evaluation.evaluate import load_benchmarks
from octavius.evaluation.scoring import check, score
from tests.support import tiny

BOX = [0.1, 0.2, 0.5, 0.6]
IMAGES = {  # file, entries, an answer to each, main score
    "voc2012-detection": (
        "Detection_VOC2012",
        [{"object": [{"label": "person", "bbox": BOX}]}, {"object": [{"label": "sofa", "bbox": BOX}]}],
        ["A person at [0.1, 0.2, 0.5, 0.6].", "A chair at [0.1, 0.2, 0.5, 0.6]."],
        0.5,
    ),
    "scienceqa": (
        "VQA_ScienceQA",
        [{"gt_choice": 1, "gt_choices": ["iron", "wood"]}, {"gt_choice": 0, "gt_choices": ["hot", "cold"]}],
        ["It floats.\nThe answer is (B)", "The answer is (B)"],
        0.5,
    ),
    "cifar10": ("Classification_CIFAR10", [{"label": "cat"}, {"label": "ship"}], ["A cat.", "ships"], 1.0),
    "celeba-hair": (
        "Facial_Classification_CelebA(Hair)",
        [{"attr": "black hair"}, {"attr": "blond hair"}],
        ["Black hair.", "brown"],
        0.5,
    ),
    "celeba-smile": ("Facial_Classification_CelebA(Smile)", [{"attr": "1"}, {"attr": "-1"}], ["Yes.", "No."], 1.0),
}
CAPTIONS = [{"sentences": ["a red square", "a square"]}, {"sentences": ["a green square on white"]}]


def tree(folder, name, entries):
    (folder / "meta_file").mkdir(exist_ok=True)
    for index in range(len(entries)):
        tiny.draw(folder / f"{index}.png", index % len(tiny.COLOURS))
    items = [{"query": f"Question {i}?", "image": f"{i}.png", **entry} for i, entry in enumerate(entries)]
    (folder / "meta_file" / f"{name}.json").write_text(json.dumps(items))
    return folder


def answered(records, answers):
    return [record.truth | {"prediction": text} for record, text in zip(records, answers, strict=True)]


@pytest.mark.parametrize("name", IMAGES)
def test_tree_of_images_is_read_and_scored(tmp_path, name):
    file, entries, answers, expected = IMAGES[name]
    records, _ = benchmark_records(name, tree(tmp_path, file, entries))
    assert [record.image for record in records] == [tmp_path / "0.png", tmp_path / "1.png"]
    assert all(record.turns[0][0].startswith(f"Question {index}?") for index, record in enumerate(records))
    check([record.truth for record in records])
    entry = score(answered(records, answers), upstream=True)[name]
    assert entry[entry["main"]] == expected and entry["title"] == BENCHMARKS[name].title
    assert any(key.startswith("upstream ") for key in entry)


def test_captions_of_flickr(tmp_path):
    records, _ = benchmark_records("flickr30k", tree(tmp_path, "Caption_flickr30k", CAPTIONS))
    entry = score(answered(records, ["a red square", "a green square on white"]))["flickr30k"]
    assert entry["BLEU-4"] == pytest.approx(1, abs=1e-3) and entry["main"] == "CIDEr"


def test_labels_of_cifar_are_shuffled_the_same_way_every_time(tmp_path):
    folder = tree(tmp_path, "Classification_CIFAR10", [{"label": "cat"}] * 3)
    texts = [[record.turns[0][0] for record in benchmark_records("cifar10", folder)[0]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert all(name in texts[0][0] for name in meta_files.CIFAR10)


def test_reasoning_is_how_scienceqa_is_answered():
    assert BENCHMARKS["scienceqa"].inferencer == "CoT"


def test_llava_joins_questions_and_answers(tmp_path):
    tiny.draw(tmp_path / "0.png", 0)
    (tmp_path / "qa90_questions.jsonl").write_text('{"question_id": 3, "image": "0.png", "text": "What?"}\n')
    (tmp_path / "qa90_gpt4_answer.jsonl").write_text('{"question_id": 3, "text": "A red square."}\n')
    (record,), _ = benchmark_records("llava", tmp_path)
    assert record.turns == [("What?", "A red square.")] and record.truth["sentences"] == ["A red square."]
    (tmp_path / "qa90_gpt4_answer.jsonl").write_text('{"question_id": 4, "text": "A red square."}\n')
    with pytest.raises(ValueError, match=r"line 1: question_id 3 has no answer in .*gpt4"):
        benchmark_records("llava", tmp_path)


THREE = {
    "scannet-caption": ("Caption_scannet", "description3d"),
    "scannet-vqa": ("VQA_scannet", "VQA3D"),
    "scannet-classification": ("Classification_scannet", "classification3d"),
    "shapenet-classification": ("Classification_shapenet", "classification3d"),
    "nr3d-caption": ("Caption_nr3d", "description3d"),
}


def cloud_tree(folder, name, task):
    """Two records of one scene, with features in a pickle."""
    rng = np.random.default_rng(0)
    turns = [tiny.turns("What is this?", text) for text in ("a chair", "a round table")]
    items = [
        {"scene_id": "scene0000_00", "object_name": noun, "object_id": i, "task_type": task, "conversations": turns[i]}
        for i, noun in enumerate(("chair", "table"))
    ]
    base = folder / "meta_file"
    base.mkdir()
    (base / f"{name}.json").write_text(json.dumps(items))
    half = [torch.from_numpy(rng.normal(size=(3, 8))).half() for _ in items]
    boxes = [torch.tensor([[0, 0, 0, 1, 1, 1.0]] * 3).half() for _ in items]
    columns = {"caption_list": turns, "task_type_list": [task] * 2, "scene_id_list": ["scene0000_00"] * 2}
    columns |= {"vision_embeds_3d_scene_prop_list": half, "vision_pos_3d_scene_prop_list": boxes}
    columns |= {"vision_embeds_3d_ref_list": [row[0] for row in half]}
    columns |= {"vision_pos_3d_ref_list": [row[0] for row in boxes], "max_proposal_num": 3}
    with (base / f"{name}.pickle").open("wb") as file:
        pickle.dump(columns, file)
    return folder


@pytest.mark.parametrize("name", THREE)
def test_tree_of_clouds_is_read_and_scored(tmp_path, name):
    file, task = THREE[name]
    records, scenes = benchmark_records(name, cloud_tree(tmp_path, file, task))
    assert len(records) == len(scenes) == 2 and {record.truth["scene_id"] for record in records} == {"scene0000_00"}
    assert len({record.id for record in records}) == 2
    entry = score(answered(records, ["a chair", "a round table"]))[name]
    assert entry["n"] == 2  # upstream keeps the last of a scene
    assert entry["Acc@1"] == 1 if "classification" in name else entry["BLEU-1"] == pytest.approx(1)
    stores = load_benchmarks([name], tmp_path, tower=None, encoder=None, clouds=True)[1]
    assert stores.scenes and set(stores.scenes.scenes) == set(scenes)


BROKEN = {
    "missing file": (None, r"Detection_VOC2012\.json: cannot be read as JSON"),
    "no list": ({"a": 1}, r"must be a list of records"),
    "no query": ([{"image": "0.png"}], r"record 0: field query must be a text"),
    "box in pixels": (
        [{"query": "?", "image": "0.png", "object": [{"label": "cat", "bbox": [3, 4, 90, 80]}]}],
        r"record 0.*are these pixels",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_another_layout_is_named(tmp_path, content, message):
    (tmp_path / "meta_file").mkdir()
    if content is not None:
        (tmp_path / "meta_file/Detection_VOC2012.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        benchmark_records("voc2012-detection", tmp_path)


def test_missing_images_stop_the_run_or_are_left_out(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tree(tmp_path, "Caption_flickr30k", CAPTIONS)
    (folder / "1.png").unlink()
    readers = tiny.make(parts).readers()
    with pytest.raises(ValueError, match=r"1 of 2 records have an unreadable image .*1\.png"):
        load_benchmarks(["flickr30k"], folder, **readers)
    tree(folder, "Caption_flickr30k", CAPTIONS[:1] * 150)
    (folder / "7.png").unlink()
    records, _ = load_benchmarks(["flickr30k"], folder, **readers)
    assert len(records) == 149 and "skipped: 1 of 150" in " ".join(capsys.readouterr().err.split())


def test_pickle_of_another_length_is_refused(tmp_path):
    folder = cloud_tree(tmp_path, "Caption_scannet", "description3d")
    file = folder / "meta_file/Caption_scannet.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:1]))
    with pytest.raises(ValueError, match=r"Caption_scannet\.pickle: must hold the 1 records"):
        benchmark_records("scannet-caption", folder)
