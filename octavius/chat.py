"""One question about one picture."""

from pathlib import Path

from octavius.data import Collator, InstructionData, Record
from octavius.encoders import FeatureStore
from octavius.model import Octavius


def chat(
    model: Octavius, image: Path, question: str, task_type: str = "normal", max_new_tokens: int = 128
) -> tuple[str, list[tuple[int, float]]]:
    """Ask a model about a picture.

    Returns:
        the answer, and (expert, weight) of the experts that gave it, heaviest first.

    Raises:
        ValueError: the picture cannot be read.
    """
    if not question.strip():
        raise ValueError("question must be a text, got an empty one")
    store = FeatureStore(model.tower[0])
    if bad := store.prepare([image]):
        raise ValueError(f"image must be a readable picture, got {image}: {bad[image]}")
    data = InstructionData(
        [Record("chat", image, [(question, "")], task_type, {})], model.conversation, store.tower.tokens, 0, False
    )
    batch = Collator(model.conversation.eos, store, left=True)([data[0]])
    batch.pop("labels")
    answers, weights = model.eval().generate(**batch, max_new_tokens=max_new_tokens)
    used = [(expert, weight) for expert, weight in enumerate(weights[0].tolist()) if weight > 0]
    return answers[0], sorted(used, key=lambda pair: -pair[1])
