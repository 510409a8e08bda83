"""ChEF's and lmms-eval's runners against this model: their calls, answered as our own evaluation answers."""

from typing import NamedTuple

import pytest
import yaml
from PIL import Image

from octavius.data.loading import Stores
from octavius.evaluation.answering import Plan, answer_batches
from octavius.evaluation.chef import ChefModel, read_recipe
from octavius.evaluation.lmms import LmmsModel
from octavius.vision.features import FeatureStore
from tests.support import tiny


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make(parts)


@pytest.fixture(scope="module")
def answered(model, parts):
    """Records of one turn, and what our own evaluation answers."""
    records = [record for record in tiny.records(parts) if len(record.turns) == 1]
    stores, answers = Stores(FeatureStore(model.tower[0])), {}
    for rows, texts, _ in answer_batches(model, records, stores, Plan(batch_size=1, max_new_tokens=6)):
        answers |= dict(zip(rows, texts, strict=True))
    return records, [answers[row] for row in range(len(records))]


def test_chef_gets_the_same_answers(model, answered):
    records, answers = answered
    runner = ChefModel(model)
    images, questions = [str(r.image) for r in records], [r.turns[0][0] for r in records]
    assert runner.batch_generate(images, questions, max_new_tokens=6) == answers
    assert runner.generate(images[1], questions[1], max_new_tokens=6) == answers[1]


def test_chef_gets_losses_that_choose_as_ours_do(model, answered, parts):
    records, _ = answered
    record = next(r for r in records if r.truth["benchmark"] == "mini-classification")
    labels = record.truth["labels"]
    losses = ChefModel(model).ppl_inference([str(record.image)] * 5, [record.turns[0][0]] * 5, labels, labels, None)
    stores = Stores(FeatureStore(model.tower[0]))
    ((_, (said,), _),) = list(answer_batches(model, [record], stores, Plan(inferencer="PPL")))
    assert labels[losses.index(min(losses))] == said and len(set(losses)) == 5


class Request(NamedTuple):
    args: tuple


def test_lmms_gets_the_same_answers_and_likelihoods(model, answered):
    records, answers = answered
    runner = LmmsModel(model, batch_size=2)
    runner.task_dict = {"squares": {"test": [record.image for record in records]}}

    def visuals(document):
        return [Image.open(document).convert("RGB")]

    options = {"max_new_tokens": 6, "until": ["\n\n"]}
    requests = [Request((r.turns[0][0], options, visuals, i, "squares", "test")) for i, r in enumerate(records)]
    assert runner.generate_until(requests) == [text.split("\n\n")[0] for text in answers]
    pairs = [
        runner.loglikelihood([Request((records[1].turns[0][0], text, visuals, 1, "squares", "test"))])[0]
        for text in ("green", "green square of colour")
    ]
    assert all(value < 0 and not greedy for value, greedy in pairs) and pairs[0] != pairs[1]
    (loss,) = ChefModel(model).ppl_inference([str(records[1].image)], [records[1].turns[0][0]], ["green"])
    assert pairs[0][0] == pytest.approx(-loss * (len(model.conversation.tokens(" green")) + 1), rel=1e-4)
    with pytest.raises(ValueError, match="must show one image, got 2 visuals"):
        runner.generate_until([Request(("?", options, lambda d: visuals(d) * 2, 0, "squares", "test"))])
    with pytest.raises(NotImplementedError, match="answers one round"):
        runner.generate_until_multi_round(requests)


def recipe(**changes):
    scenario = {"dataset_name": "ScienceQA", "base_data_path": "/data/2D_Benchmark"}
    inference = {"inferencer_type": "Direct", "batch_size": 1, "max_new_tokens": 256, "CoT": True}
    scenario |= {key: value for key, value in changes.items() if key not in inference}
    inference |= {key: value for key, value in changes.items() if key in inference}
    return {"scenario_cfg": scenario, "eval_cfg": {"inferencer_cfg": inference, "metric_cfg": {"metric_type": "LAMM"}}}


def test_recipe_becomes_a_benchmark_and_a_plan(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe()))
    read = read_recipe(tmp_path / "a.yaml")
    assert (read.benchmark, read.data, read.plan) == ("scienceqa", "/data/2D_Benchmark", Plan(1, 256, "CoT"))
    three = {"dataset_name": "OctaviusPCLDataset", "inference_dataset_name": "scannet", "task_name": "Caption"}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(recipe(**three, inferencer_type="Direct3D", CoT=False)))
    assert read_recipe(tmp_path / "b.yaml").benchmark == "scannet-caption"


WRONG = {
    "data set": (recipe(dataset_name="MME"), "dataset_name must be one of VOC2012, .*got 'MME'"),
    "inferencer": (recipe(inferencer_type="Multi_Direct"), "inferencer_type must be one of Direct, Direct3D, PPL"),
    "folder": (recipe(base_data_path=3), "base_data_path must be a folder, got 3"),
    "number": (recipe(batch_size="many"), "batch_size must be a whole number, got 'many'"),
    "section": ({"scenario_cfg": {}}, "key eval_cfg must be a mapping, got None"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_recipe_that_cannot_be_followed_is_named(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "a.yaml")
