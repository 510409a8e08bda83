"""Images and clouds in one model: an instance gives the same alone and among others, trains, saves, answers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from octavius.config import CloudConfig, Config, TrainConfig, load_config
from octavius.data.loading import load_data
from octavius.data.records import read_records
from octavius.evaluation.evaluate import evaluate, exchange_images
from octavius.model.octavius import Octavius
from octavius.points.object_store import ObjectStore, Region
from octavius.points.pointbert import PointBert
from octavius.points.proposals import read_boxes
from octavius.report.scene_image import attention, scene_image
from octavius.session import Scan, chat
from octavius.training.train import train
from tests.octavius.points.test_pointbert import TINY
from tests.support import clouds, tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return clouds.save_clouds(tmp_path_factory.mktemp("clouds"))


@pytest.fixture(scope="module")
def model(parts, root):
    return clouds.make(parts, root)


@pytest.fixture(scope="module")
def records(parts, root):
    return clouds.records(parts, root)


def test_mixed_batch_is_padded_in_text_alone(model, records):
    made = clouds.batch(model, records)
    lengths = made["attention_mask"].sum(1).tolist()
    assert max(lengths) == made["input_ids"].shape[1] and len(set(lengths)) > 3
    vocab = model.llm.get_input_embeddings().weight.shape[0]
    images, scenes = (made["input_ids"] == vocab + 2).sum(1), (made["input_ids"] == vocab + 5).sum(1)
    assert images.tolist()[:4] == [model.image_tokens, 0] * 2 and scenes.tolist()[:4] == [0, 3] * 2
    assert len(made["features"]) + len(made["objects"]) == len(records)
    assert not made["objects"][~made["object_mask"]].any()


def test_loss_of_a_mixed_batch_is_that_of_its_instances(model, records):
    whole = clouds.batch(model, records)
    items = (whole["labels"][:, 1:] != -100).sum()
    alone = [model(**clouds.batch(model, [record]), num_items_in_batch=items)["loss"] for record in records]
    torch.testing.assert_close(model(**whole)["loss"], sum(alone), atol=1e-4, rtol=1e-4)


def test_embedded_tokens_are_the_projectors(model, records):
    chosen = [record for record in records if record.cloud][:3]
    made = clouds.batch(model, chosen)
    embeds = model.embed(made["input_ids"], None, made["objects"], made["boxes"], made["object_mask"])
    tokens, _ = model.scene(made["objects"], made["boxes"], made["object_mask"])
    vocab = model.llm.get_input_embeddings().weight.shape[0]
    torch.testing.assert_close(embeds[made["input_ids"] == vocab + 5], tokens.flatten(0, 1))
    assert torch.equal(embeds[made["input_ids"] == vocab + 3], model.scene.markers[:1].expand(3, -1))
    assert torch.equal(embeds[made["input_ids"] == vocab + 4], model.scene.markers[1:].expand(3, -1))


def test_generation_continues_what_training_scores(model, records):
    """Left padding and position ids of generation against a right-padded training pass over the same ids."""
    chosen = records[:6]
    prompts = clouds.batch(model, chosen, answer=False)
    texts, _ = model.generate(**prompts, max_new_tokens=6)
    for record, text in zip(chosen, texts, strict=True):
        one = clouds.batch(model, [record], answer=False)
        assert model.generate(**one, max_new_tokens=6)[0] == [text]
        seen = {name: one[name] for name in ("features", "objects", "boxes", "object_mask") if name in one}
        embeds = model.embed(one["input_ids"], **seen)
        ids: list[int] = []
        for _ in range(6):
            with torch.no_grad(), model.routed(embeds, one["gate_mask"], one["attention_mask"]):
                hidden = model.llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            ids.append(int(model.llm.get_output_embeddings()(hidden[:, -1]).argmax()))
            if ids[-1] == model.conversation.eos:
                break
            embeds = torch.cat((embeds, model.llm.get_input_embeddings()(torch.tensor([ids[-1:]]))), 1)
            one["gate_mask"], one["attention_mask"] = (
                torch.nn.functional.pad(one[name], (0, 1), value=value)
                for name, value in (("gate_mask", 0), ("attention_mask", 1))
            )
        assert model.conversation.decode(ids) == text


def test_tasks_about_one_object_see_it_alone(model, root):
    store = ObjectStore(model.encoder[0])
    first, _, question = read_records(root / "train.json")[6:9]
    batch = store([first.cloud, question.cloud])
    assert batch["object_mask"].tolist() == [[True, False, False], [True, True, True]]
    assert torch.equal(batch["objects"][0, 0], batch["objects"][1, 2])
    with pytest.raises(ValueError, match=r"object must be one of \[10, 11, 12\], got 9"):
        store([Region(first.cloud.cloud, 9)])


def test_answer_depends_on_the_cloud(model, records):
    chosen = [record for record in records if record.cloud]
    made = clouds.batch(model, chosen, answer=False)
    texts, _ = model.generate(**made, max_new_tokens=8)
    other = {name: made[name].roll(1, 0) for name in ("objects", "boxes", "object_mask")}
    assert model.generate(**made | other, max_new_tokens=8)[0] != texts


def test_blind_exchanges_clouds(records):
    for before, after in zip(records, exchange_images(records), strict=True):
        assert (before.cloud is None) == (after.cloud is None) and before.turns == after.turns
        if before.cloud:
            assert after.cloud.cloud != before.cloud.cloud


def test_evaluation_scores_all_tasks(model, parts, root, records):
    scores, answers = evaluate(model, records, clouds.stores(model), max_new_tokens=4)
    assert {f"mini-{name}" for name in ("classification3d", "caption3d", "vqa3d", "detection", "vqa")} <= scores.keys()
    assert len(answers.texts) == len(records) and answers.weights.sum(1).allclose(torch.ones(len(records)))


def test_branch_learns_and_is_saved(parts, root, records, tmp_path):
    model = clouds.make(parts, root).train()
    made = clouds.batch(model, records)
    model(**made)["loss"].backward()
    assert all(value.grad is not None and value.grad.any() for value in model.scene.parameters())
    assert not any(value.requires_grad for value in model.encoder[0].parameters())
    model.save(tmp_path)
    again = Octavius.from_folder(tmp_path).eval()
    assert torch.equal(again(**made)["loss"], model.eval()(**made)["loss"])
    with pytest.raises(ValueError, match=r"must be .* for this model, got"):
        tiny.make(parts).load(tmp_path)


def test_point_encoder_is_saved_with_the_model(parts, root, records, tmp_path):
    """Where the encoder that the config names is another one by now, as `small` is on another machine."""
    shutil.copytree(root, tmp_path / "root")
    model = clouds.make(parts, tmp_path / "root")
    model.save(tmp_path / "model")
    torch.manual_seed(4)
    PointBert(TINY).save(tmp_path / "root/encoder")
    again, other = Octavius.from_folder(tmp_path / "model"), clouds.make(parts, tmp_path / "root")
    chosen = [record for record in records if record.cloud]
    asked = clouds.batch(again.eval(), chosen, answer=False)
    assert torch.equal(asked["objects"], clouds.batch(model, chosen, answer=False)["objects"])
    assert again.generate(**asked, max_new_tokens=5)[0] == model.generate(**asked, max_new_tokens=5)[0]
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="its point encoder must be this model's, got another"):
        other.load(tmp_path / "model")
    (tmp_path / "model/pointbert.safetensors").unlink()
    for call in (lambda: again.load(tmp_path / "model"), lambda: Octavius.from_folder(tmp_path / "model")):
        with pytest.raises(ValueError, match=r"pointbert\.safetensors is missing"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_training_joins_both_and_repeats_3d(parts, root, tmp_path):
    branch = CloudConfig(encoder=str(root / "encoder"), queries=3, heads=2)
    data = tiny.data_config(parts, root_3d=str(root), loop_3d=2)
    run = TrainConfig(output=str(tmp_path / "run"), steps=3, batch_size=4, log_steps=1, save_steps=9)
    config = Config(tiny.model_config(parts, clouds=branch), data, run)
    model, report = train(config)
    assert report["steps"] == 3 and all(np.isfinite(entry["loss"]) for entry in report["loss"])
    loaded, stores = load_data(config.data, "train.json", **model.readers())
    assert len(loaded) == 7 + 9 and stores.scenes is not None and stores.images is not None
    said, _ = chat(model, Scan(root / "clouds/2.npz"), "What is left?", max_new_tokens=4)
    assert isinstance(said, str)


def test_clouds_alone(parts, root):
    model = clouds.make(parts, root, tower=None)
    chosen = read_records(root / "train.json")
    assert model.image_tokens == 0 and torch.isfinite(model(**clouds.batch(model, chosen))["loss"])
    with pytest.raises(ValueError, match="reads point clouds alone"):
        chat(model, parts.data.parent / "0.png", "What?")
    with pytest.raises(ValueError, match="without an image tower cannot read"):
        clouds.batch(model, tiny.records(parts))


def test_images_alone_refuse_clouds(parts, root):
    model = tiny.make(parts)
    with pytest.raises(ValueError, match="without a 3D branch cannot read"):
        tiny.batch(model, read_records(root / "train.json"))
    with pytest.raises(ValueError, match=r"trained without model\.clouds"):
        chat(model, Scan(root / "clouds/0.npz"), "What?")
    with pytest.raises(ValueError, match="give tower, clouds, or both"):
        Octavius(replace(model.settings, tower=None), model.llm, model.tokenizer, None)


def test_chat_reads_files_and_draws(model, root, tmp_path):
    xyz = np.load(root / "clouds/2.npz")["xyz"]
    np.save(tmp_path / "mm.npy", xyz * 1000)
    with pytest.raises(ValueError, match="must be in metres"):
        chat(model, Scan(tmp_path / "mm.npy"), "What is left?")
    answer, experts = chat(model, Scan(tmp_path / "mm.npy", "mm", draw=tmp_path / "x.png"), "What?", max_new_tokens=3)
    assert isinstance(answer, str) and sum(weight for _, weight in experts) == pytest.approx(1)
    assert Image.open(tmp_path / "x.png").size == (480, 480)


def test_boxes_are_in_the_unit_of_their_cloud(model, root, tmp_path):
    arrays = dict(np.load(root / "clouds/2.npz"))
    np.savez(tmp_path / "both.npz", **arrays | {name: arrays[name] * 1000 for name in ("xyz", "boxes")})
    np.save(tmp_path / "points.npy", arrays["xyz"] * 1000)
    np.save(tmp_path / "boxes.npy", arrays["boxes"] * 1000)
    store = ObjectStore(model.encoder[0])
    given = read_boxes(tmp_path / "boxes.npy")
    for scene in (store.add(tmp_path / "both.npz", unit="mm"), store.add(tmp_path / "points.npy", given, "mm")):
        torch.testing.assert_close(scene.boxes, torch.from_numpy(arrays["boxes"]))


def test_attention_of_a_scene(model, root):
    store = ObjectStore(model.encoder[0])
    boxes, shares = attention(model, store, Region(root / "clouds/2.npz"))
    assert boxes.shape == (3, 6) and shares.sum() == pytest.approx(1, abs=1e-5) and (shares > 0).all()
    assert scene_image(model, store, Region(root / "clouds/2.npz", 11), size=99).size == (99, 99)


def test_features_are_kept(model, root, tmp_path):
    paths = sorted((root / "clouds").glob("*.npz"))
    first, second = (ObjectStore(model.encoder[0], tmp_path) for _ in range(2))
    assert first.prepare(paths) == {} and len(list(tmp_path.glob("*/ready/objects.pt"))) == 1
    stamp = next(tmp_path.glob("*/ready/objects.pt")).stat().st_mtime_ns
    assert second.prepare(paths) == {} and next(tmp_path.glob("*/ready/objects.pt")).stat().st_mtime_ns == stamp
    one, other = (store([Region(path) for path in paths]) for store in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_records_of_absent_objects_are_dropped(parts, model, root, tmp_path, capsys):
    items = json.loads((root / "train.json").read_text())
    items = [item | {"pcl": str(root / item["pcl"])} for item in items] * 15
    items[0] = items[0] | {"object_id": 99}
    (tmp_path / "train.json").write_text(json.dumps(items))
    config = Config(data=replace(tiny.data_config(parts, root_3d=str(tmp_path)), root=""))
    loaded, stores = load_data(config.data, "train.json", **model.readers())
    assert len(loaded) == len(items) - 1 and stores.scenes is not None
    stores.scenes([record.cloud for record in loaded if record.cloud])
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 of 135 records" in shown and "no object 99 among [10]" in shown
    items[1] = items[1] | {"object_id": 98}
    (tmp_path / "train.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"2 of 135 records .* at most 1% may be"):
        load_data(config.data, "train.json", **model.readers())


def test_unreadable_cloud_is_reported(model, root, tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"no cloud")
    bad = ObjectStore(model.encoder[0]).prepare([tmp_path / "bad.npy", root / "clouds/0.npz"])
    assert list(bad) == [tmp_path / "bad.npy"] and "cannot be read" in bad[tmp_path / "bad.npy"]
    whole = (root / "clouds/2.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "flat.npz", **dict(np.load(root / "clouds/2.npz")) | {"boxes": np.zeros((3, 5))})
    bad = ObjectStore(model.encoder[0]).prepare(tmp_path.glob("*.npz"))
    assert "cannot be read as a point cloud" in bad[tmp_path / "cut.npz"]
    assert "its boxes cannot be read" in bad[tmp_path / "flat.npz"]


@pytest.mark.parametrize(
    ("name", "experts"), [("octavius-3d", 3), ("octavius-2d+3d", 6), ("mini-3d", 3), ("mini-2d+3d", 6)]
)
def test_presets(name, experts):
    config = load_config(name)
    assert config.model.lora.num_experts == experts and config.model.lora.rank == 32 and config.model.clouds is not None
    assert (config.model.tower is None) == ("2d" not in name) and config.data.root_3d


def test_record_fields_are_checked(tmp_path):
    item = {"pcl": "x.npz", "task_type": "classification3d", "conversations": tiny.turns("a", "b")}
    for change, message in (
        ({"pcl": 3}, "field pcl must be a path"),
        ({"object_id": "x"}, "object_id must be a number"),
    ):
        (tmp_path / "x.json").write_text(json.dumps([item | change]))
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path / "x.json")
