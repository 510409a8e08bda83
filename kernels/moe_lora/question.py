"""Which tokens of a call are the question of each document, read from what the model is called with.

    question = the caller's `question_mask`; or the tokens before the document's first label; or those before the answer
    marker; in generation the prompt

With an answer marker configured, the question ends before it wherever it comes from, so that prompt plus answer routes
as the prompt alone. A document is a row of the batch or, if the batch is packed, a part of a row: what `position_ids`
that start again at 0, `seq_idx` or `cu_seq_lens_q` say.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lora.config import GateConfig

_IGNORED = -100  # torch's and transformers' label of a token that has no loss


@dataclass(frozen=True)
class Questions:
    """The questions of a batch of B rows of L tokens.

    Args:
        mask: [B, L] bool, the tokens of the questions.
        document: [B, L] int64, which document a token belongs to, rising along the flattened rows; N documents.
        packed: whether a row holds more than one document.
        counted: [N] bool, the documents that hold a token at all; the others are padding.
    """

    mask: Tensor
    document: Tensor
    packed: bool
    counted: Tensor

    def offsets(self) -> Tensor | None:
        """[N + 1] of the documents' tokens in the flattened rows; None if every row is one."""
        if not self.packed:
            return None
        counts = torch.bincount(self.document.flatten(), minlength=len(self.counted))
        return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def find_questions(
    shape: tuple[int, int], device: torch.device, inputs: dict[str, Any], config: GateConfig, prompt: bool = False
) -> Questions:
    """Finds the questions of a call.

    Args:
        shape, device: (B, L) of the tokens, and where they are.
        inputs: what the model is called with, by name.
        config: says the answer marker, and whether all tokens are the question.
        prompt: whether the tokens are the prompt of a generation, or the input of an encoder.
    Raises:
        ValueError: nothing says which tokens are the question (says what would), or a mask does not fit.
    """
    attended = _attended(shape, device, inputs.get("attention_mask"))
    starts = _starts(shape, device, attended, inputs)
    document = (starts.flatten().cumsum(0) - 1).view(shape)
    N = int(document[-1, -1]) + 1
    packed = shape[0] < N
    flat, tokens = document.flatten(), attended.flatten()
    counted = torch.zeros(N, dtype=torch.bool, device=device).index_put_((flat[tokens],), tokens.new_ones(()))
    question, source = _source(shape, attended, document, N, inputs, config, prompt)
    if config.answer_marker and source != "question_mask":
        question = question & _before(_marked(shape, document, inputs, config.answer_marker), document, N)[0]
    has_question = torch.zeros_like(counted).index_put_((flat[question.flatten()],), tokens.new_ones(()))
    empty = counted & ~has_question
    if bool(empty.any()):
        first = int(empty.nonzero()[0])
        row = int((document == first).any(1).nonzero()[0])
        where = f"document {first} (row {row})" if packed else f"row {row}"
        raise ValueError(f"every question must have a token, got none in {where}, where {source} says what it is")
    question = question | ~counted[document]  # padding alone: any routing will do
    return Questions(question, document, packed, counted)


def _attended(shape: tuple[int, int], device: torch.device, mask: Any) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 4:  # [B, 1, L, L], additive or bool: a token sees itself
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = diagonal if mask.dtype == torch.bool else diagonal == 0
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must be [B, L] = {shape}, got {tuple(getattr(mask, 'shape', ()))}")
    return mask.to(device) != 0


def _starts(shape: tuple[int, int], device: torch.device, attended: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[B, L] bool, where a document starts."""
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    cumulated, segments, positions = (inputs.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(cumulated, Tensor):
        inner = cumulated.to(device).long()
        starts.view(-1)[inner[(inner > 0) & (inner < starts.numel())]] = True
    elif isinstance(segments, Tensor) and tuple(segments.shape) == shape:
        segments = segments.to(device)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    elif isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == shape[1]:
        again = (positions.to(device) == 0).expand(shape)  # left padding has 0 too, so both must be tokens
        starts[:, 1:] = again[:, 1:] & attended[:, 1:] & attended[:, :-1]
    starts[:, 0] = True
    return starts


def _source(
    shape: tuple[int, int],
    attended: Tensor,
    document: Tensor,
    N: int,
    inputs: dict[str, Any],
    config: GateConfig,
    prompt: bool,
) -> tuple[Tensor, str]:
    """[B, L] bool, the questions before the answer marker is looked for, and what says so."""
    given = inputs.get("question_mask")
    if given is not None:
        if not isinstance(given, Tensor) or tuple(given.shape) != shape:
            raise ValueError(f"question_mask must be [B, L] = {shape}, got {tuple(getattr(given, 'shape', ()))}")
        return attended & (given.to(attended.device) != 0), "question_mask"
    if prompt:
        return attended, "the prompt"
    if config.question == "all":
        return attended, "question='all'"
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and tuple(labels.shape) == shape:
        labelled = (labels.to(attended.device) != _IGNORED) & attended
        before, first = _before(labelled, document, N)
        start = _before(attended, document, N)[1]
        # a document's first token is nobody's target: a label there, or at the next one, marks no question
        if bool(((first > start + 1) | (start == attended.numel())).all()):
            return attended & before, "the first label"
    elif isinstance(labels, Tensor) and labels.shape[0] == shape[0] and labels.dim() < 3 and not config.answer_marker:
        return attended, "labels of the whole row"  # classes
    if config.answer_marker:
        marked = _marked(shape, document, inputs, config.answer_marker)
        marks = torch.zeros(N, dtype=torch.bool, device=marked.device).index_put_(
            (document[marked],), marked.new_ones(())
        )
        lacking = ~marks & (_before(attended, document, N)[1] < attended.numel())
        if bool(lacking.any()):
            raise ValueError(
                f"every document must hold the answer marker {config.answer_marker}, got none in document "
                f"{int(lacking.nonzero()[0])}; give question_mask, or labels that are -100 on the question"
            )
        return attended, "the answer marker"
    raise ValueError(
        "nothing says which tokens are the question: call the model with question_mask [B, L], or with labels that are "
        "-100 on the question, or set GateConfig(answer_marker=<token ids that begin an answer>), or "
        "GateConfig(question='all'); or route yourself by moe_lora.route"
    )


def _before(mark: Tensor, document: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """[B, L] bool, the tokens before the first mark of their document, and its index [N] in the flattened rows."""
    index = torch.arange(mark.numel(), device=mark.device)
    first = torch.full((N,), mark.numel(), device=mark.device)
    flat = mark.flatten()
    first = first.scatter_reduce(0, document.flatten()[flat], index[flat], "amin")
    return index.view(mark.shape) < first[document], first


def _marked(shape: tuple[int, int], document: Tensor, inputs: dict[str, Any], marker: tuple[int, ...]) -> Tensor:
    """[B, L] bool, where an answer marker begins."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or tuple(ids.shape) != shape:
        raise ValueError(f"the answer marker needs input_ids {shape}, got none; call with question_mask instead")
    marked, last = torch.zeros_like(ids, dtype=torch.bool), shape[1] - len(marker) + 1
    if last > 0:
        marked[:, :last] = document[:, :last] == document[:, shape[1] - last :]
        for offset, token in enumerate(marker):
            marked[:, :last] &= ids[:, offset : offset + last] == token
    return marked
