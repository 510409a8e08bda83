"""This model behind the interface of lmms-eval: `generate_until` and `loglikelihood` over requests.

A request's `args` are (question, options, visuals, document's number, task, split) for generation, and (question,
continuation, visuals, document's number, task, split) for likelihoods; `visuals` is a function of the document.
Register it there by a class that inherits from their `lmms` and from `LmmsModel`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from octavius.evaluation.chef import ChefModel
from octavius.model.octavius import Octavius

LIMIT = 128  # tokens of an answer where the request does not say


class LmmsModel:
    """The methods that lmms-eval's runner calls.

    Args:
        pretrained: a folder that training wrote, or a loaded model.
        batch_size: requests that the model gets at once.
    """

    def __init__(self, pretrained: str | Octavius, batch_size: int | str = 16):
        model = pretrained if isinstance(pretrained, Octavius) else Octavius.from_folder(pretrained)
        self.chef, self.size = ChefModel(model), int(batch_size)
        self.task_dict: dict[str, Any] = {}  # the runner fills it: task → split → documents

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers in the order of the requests, cut at their stop texts."""
        answers: list[str] = []
        for start in range(0, len(requests), self.size):
            chunk = [request.args for request in requests[start : start + self.size]]
            with tempfile.TemporaryDirectory() as folder:
                images = [self._image(args, Path(folder) / f"{i}.png") for i, args in enumerate(chunk)]
                limit = max(int(args[1].get("max_new_tokens", LIMIT)) for args in chunk)
                texts = self.chef.batch_generate(images, [args[0] for args in chunk], limit)
            answers += [_cut(text, args[1].get("until", ())) for text, args in zip(texts, chunk, strict=True)]
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request its continuation's log likelihood, end included, and whether it is the greedy answer."""
        results: list[tuple[float, bool]] = []
        for request in requests:
            args = request.args
            text = args[1](self._document(args)) if callable(args[1]) else args[1]
            with tempfile.TemporaryDirectory() as folder:
                image = self._image(args, Path(folder) / "0.png")
                (loss,) = self.chef.ppl_inference([image], [args[0]], [text])
                tokens = len(self.chef.model.conversation.tokens(f" {text.strip()}")) + 1
                greedy = self.chef.generate(image, args[0], max_new_tokens=tokens) == text.strip()
            results.append((-loss * tokens, greedy))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: this model answers one question about one image.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("octavius answers one round; choose a task of one question per image")

    def _document(self, args: Sequence[Any]) -> Any:
        number, task, split = args[3:6]
        return self.task_dict[task][split][number]

    def _image(self, args: Sequence[Any], path: Path) -> str:
        """Path of the request's image; the document's is written to `path`."""
        visuals = args[2](self._document(args))
        if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
            raise ValueError(f"document {args[3]} of task {args[4]} must show one image, got {len(visuals)} visuals")
        visuals[0].save(path)
        return str(path)


def _cut(text: str, stops: str | Sequence[str]) -> str:
    """The text up to the first of its stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
