"""One conversation, one format, in training and in generation.

    BOS [system\\n\\n] ### Human: <Img> P picture tokens </Img> question\\n### Assistant: answer EOS [### Human: ...]

Every piece is tokenised by itself, so that the question's tokens, which the gate reads, and the answer's, which carry
the loss, are the same ids wherever they stand. Picture tokens and the two markers have ids beyond the vocabulary:
`vocab` for <Img>, `vocab + 1` for </Img>, `vocab + 2` for a picture token; <Pcl>, </Pcl> and a point cloud's tokens
have the next three. The LLM's own embeddings stay as they are.
"""

from dataclasses import dataclass

IGNORE = -100

# What the assistant is told it does, by upstream's task types.
SYSTEM = {
    "classification": "Name what the picture shows.",
    "detection": "List the objects in the picture, each with its box.",
    "keypoint_detection": "Give the positions of the named keypoints.",
    "VQA": "Answer the question about the picture.",
    "counting": "Count the objects that the question asks for.",
    "conversation": "Talk with the human about the picture.",
    "description": "Describe the picture.",
    "commomsenseqa": "Answer the question with the picture and common sense.",
    "normal": "Answer the human, with the picture where there is one.",
    "classification3d": "Name the object that the point cloud shows.",
    "description3d": "Describe the object that the point cloud shows.",
    "detection3d": "List the objects of the point cloud, each with its box.",
    "VQA3D": "Answer the question about the scene of the point cloud.",
    "VQA3d": "Answer the question about the scene of the point cloud.",
    "conversation3d": "Talk with the human about the point cloud.",
    "commomsenseqa3d": "Answer the question with the point cloud and common sense.",
    "visual_grounding3d": "Say where in the point cloud the named object is.",
}


@dataclass(frozen=True)
class Sample:
    """Token ids of one conversation.

    ids: [L]; labels: [L], the id where the loss counts and IGNORE elsewhere; gate: [L], 1 on the tokens the gate reads.
    """

    ids: list[int]
    labels: list[int]
    gate: list[int]


class ConversationFormat:
    """Turns conversations into token ids.

    Args:
        tokenizer: of the LLM.
        vocab: rows of the LLM's embedding; ids from here on are the picture's and the point cloud's.
        system: begin with the task type's system message.
        gate_system: the gate reads the system message too.
    """

    def __init__(self, tokenizer, vocab: int, system: bool = False, gate_system: bool = False):
        if gate_system and not system:
            raise ValueError("gate input system+question needs system: true, so that there is a system message to read")
        self.tokenizer = tokenizer
        self.image_start, self.image_end, self.image_token = vocab, vocab + 1, vocab + 2
        self.cloud_start, self.cloud_end, self.cloud_token = vocab + 3, vocab + 4, vocab + 5
        self.system, self.gate_system = system, gate_system
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise ValueError("the tokenizer must have an end-of-sequence token: answers end with it")
        self._check_template(vocab)

    def encode(
        self,
        turns: list[tuple[str, str | None]],
        task_type: str = "normal",
        image_tokens: int = 0,
        max_tokens: int = 0,
        cloud_tokens: int = 0,
    ) -> Sample:
        """One conversation as ids.

        Args:
            turns: (question, answer) pairs; the last answer may be None, to be generated.
            task_type: one of SYSTEM's keys.
            image_tokens: P, 0 without a picture.
            max_tokens: cut what follows picture and cloud to this many tokens; 0 for no limit.
            cloud_tokens: Q, 0 without a point cloud.
        """
        if task_type not in SYSTEM:
            raise ValueError(f"task_type must be one of {', '.join(SYSTEM)}, got {task_type!r}")
        ids, labels, gate = list(self.bos), [IGNORE] * len(self.bos), [0] * len(self.bos)

        def add(tokens: list[int], learn: bool = False, read: bool = False) -> None:
            ids.extend(tokens)
            labels.extend(tokens if learn else [IGNORE] * len(tokens))
            gate.extend([int(read)] * len(tokens))

        if self.system:
            add(self.tokens(SYSTEM[task_type] + "\n\n"), read=self.gate_system)
        add(self.tokens("### Human:"))
        if image_tokens:
            add([self.image_start, *[self.image_token] * image_tokens, self.image_end])
        if cloud_tokens:
            add([self.cloud_start, *[self.cloud_token] * cloud_tokens, self.cloud_end])
        start = len(ids)
        for turn, (question, answer) in enumerate(turns):
            if turn:
                add(self.tokens("\n### Human:"))
            add(self.tokens(f" {question.strip()}"), read=turn == 0)
            add(self.tokens("\n### Assistant:"))
            if answer is not None:
                add([*self.tokens(f" {answer.strip()}"), self.eos], learn=True)
        end = start + max_tokens if max_tokens else len(ids)
        return Sample(ids[:end], labels[:end], gate[:end])

    def _check_template(self, vocab: int) -> None:
        """Raise ValueError if the tokenizer cannot write the template: it is another model's, or lacks its signs."""
        for piece in ("### Human:", "\n### Assistant:", " a word 0.12"):
            ids = self.tokens(piece)
            if max(ids, default=0) >= vocab:
                raise ValueError(
                    f"the tokenizer must have ids below the LLM's {vocab} rows, got {max(ids)} for {piece!r}"
                )
            unknown = self.tokenizer.unk_token_id
            if not ids or (unknown is not None and unknown in ids) or self.eos in ids:
                raise ValueError(
                    f"the tokenizer must have tokens for the template's {piece!r}, got {ids}: "
                    "it does not belong to this model"
                )
            if self.tokenizer.decode(ids).strip() != piece.strip():
                raise ValueError(
                    f"the tokenizer must read {piece!r} back as it is, got {self.tokenizer.decode(ids)!r}: "
                    "it does not match the template"
                )

    def decode(self, ids: list[int]) -> str:
        """The answer's text, without what ends it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).split("\n###")[0].strip()

    def tokens(self, text: str) -> list[int]:
        """Ids of a piece of text, no special tokens added."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def box_answer(objects: list[dict]) -> str:
    """Detection's answer: "A bird at [0.12, 0.34, 0.56, 0.78]. ..." from left to right, in fractions of the sides.

    Args:
        objects: {"label": name, "bbox": [x1, y1, x2, y2]} each.
    """
    if not objects:
        return "There is no object."
    ordered = sorted(objects, key=lambda item: item["bbox"])
    return " ".join(
        f"{'An' if item['label'][0].lower() in 'aeiou' else 'A'} {item['label']} at "
        f"[{', '.join(f'{value:.2f}' for value in item['bbox'])}]."
        for item in ordered
    )
