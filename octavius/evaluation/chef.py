"""ChEF, the released evaluation, beside this one: its recipes read here, and this model behind its runner.

A recipe is YAML: scenario_cfg {dataset_name, base_data_path}, eval_cfg {inferencer_cfg {inferencer_type, batch_size,
max_new_tokens, CoT}, metric_cfg {metric_type}}. Its runner calls a model by `batch_generate`, `generate` and
`ppl_inference` with paths of images and texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavius.data.batches import Collator, InstructionData
from octavius.data.loading import Stores
from octavius.data.records import Record
from octavius.evaluation.answering import Plan
from octavius.evaluation.inferencers import Questions, choice_losses, direct
from octavius.inputs.documents import read_yaml
from octavius.model.octavius import Octavius
from octavius.vision.features import FeatureStore

DATASETS = {  # ChEF's dataset_name → the benchmark here
    "VOC2012": "voc2012-detection",
    "ScienceQA": "scienceqa",
    "Flickr30k": "flickr30k",
    "CIFAR10": "cifar10",
    "CelebA(Hair)": "celeba-hair",
    "CelebA(Smile)": "celeba-smile",
    "scannet_Caption": "scannet-caption",
    "scannet_VQA": "scannet-vqa",
    "scannet_Classification": "scannet-classification",
    "shapenet_Classification": "shapenet-classification",
    "nr3d_Caption": "nr3d-caption",
}
INFERENCER_TYPES = {"Direct": "Direct", "Direct3D": "Direct", "PPL": "PPL"}


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for: the benchmark, its data's folder, and how it is answered."""

    benchmark: str
    data: str
    plan: Plan


def read_recipe(path: str | Path) -> Recipe:
    """Read one of ChEF's scenario recipes.

    Raises:
        ValueError: no recipe, or a data set or inferencer that is not here; the key is named.
    """
    values = read_yaml(path)
    scenario, inference = _section(values, "scenario_cfg", path), _section(values, "eval_cfg", path)
    inference = _section(inference, "inferencer_cfg", path)
    name, kind = scenario.get("dataset_name"), inference.get("inferencer_type", "Direct")
    task = scenario.get("task_name")  # of point clouds, whose data sets have several tasks
    name = f"{scenario.get('inference_dataset_name', name)}_{task}" if task else name
    if name not in DATASETS:
        raise ValueError(f"{path}: dataset_name must be one of {', '.join(DATASETS)}, got {name!r}")
    if kind not in INFERENCER_TYPES:
        raise ValueError(f"{path}: inferencer_type must be one of {', '.join(INFERENCER_TYPES)}, got {kind!r}")
    if not isinstance(scenario.get("base_data_path"), str):
        raise ValueError(f"{path}: base_data_path must be a folder, got {scenario.get('base_data_path')!r}")
    sizes = {"batch_size": inference.get("batch_size", 1), "max_new_tokens": inference.get("max_new_tokens", 16)}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{path}: {key} must be a whole number, got {value!r}")
    how = "CoT" if inference.get("CoT") and kind != "PPL" else INFERENCER_TYPES[kind]
    plan = Plan(sizes["batch_size"], sizes["max_new_tokens"], how)
    return Recipe(DATASETS[name], scenario["base_data_path"], plan)


class ChefModel:
    """This model with the methods that ChEF's runner calls.

    Args:
        model: reads images.
    Raises:
        ValueError: it does not.
    """

    def __init__(self, model: Octavius):
        if model.tower[0] is None:
            raise ValueError("ChEF's runner shows images, and this model reads none")
        self.model = model.eval()
        self.stores = Stores(FeatureStore(model.tower[0]))

    def batch_generate(self, image_list: list[str], question_list: list[str], max_new_tokens: int = 128) -> list[str]:
        """Greedy answers, one per image and question."""
        return direct(self.model, self._questions(image_list, question_list), max_new_tokens)[0]

    def generate(self, image: str, question: str, max_new_tokens: int = 128) -> str:
        """One greedy answer."""
        return self.batch_generate([image], [question], max_new_tokens)[0]

    def ppl_inference(
        self, batch_images: list[str], batch_prompt: list[str], batch_answers: list[str], *_: Any
    ) -> list[float]:
        """The mean loss per token of each answer to its question; the runner takes the lowest of a question.

        What follows the answers (the options without their wording, the reasoning) is not used.
        """
        questions = self._questions(batch_images, batch_prompt)
        return choice_losses(self.model, questions, [[text] for text in batch_answers])[0].tolist()

    def _questions(self, images: list[str], texts: list[str]) -> Questions:
        rows = zip(images, texts, strict=True)
        records = [Record(str(i), Path(image), [(text, "")], "normal", {}) for i, (image, text) in enumerate(rows)]
        data = InstructionData(records, self.model.conversation, self.model.image_tokens, 0, False)
        collate = Collator(self.model.conversation.eos, self.stores.images, True)
        return Questions(records, [data[index] for index in range(len(data))], collate)


def _section(values: Any, key: str, path: str | Path) -> dict[str, Any]:
    section = values.get(key) if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path}: key {key} must be a mapping, got {section!r:.80}")
    return section
