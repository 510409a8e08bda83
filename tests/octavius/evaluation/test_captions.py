"""Caption scores against pycocoevalcap called directly."""

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from octavius.evaluation import captions

CAPTIONS = ["a black cat sits on the bed", "two birds in a tree", "", "the red apple"]
REFERENCES = [["a black cat sits on a bed", "a cat"], ["two birds"], ["a green tree stands here"], ["an apple", "red"]]


def test_caption_equals_pycocoevalcap(capsys):
    truths, answers = dict(enumerate(REFERENCES)), {i: [text] for i, text in enumerate(CAPTIONS)}
    bleu = Bleu(4).compute_score(truths, answers, verbose=0)[0]
    result = captions.caption([f"{c.upper()}!" for c in CAPTIONS], REFERENCES)
    assert result == {
        "CIDEr": Cider().compute_score(truths, answers)[0],
        **{f"BLEU-{i + 1}": bleu[i] for i in range(4)},
        "ROUGE-L": Rouge().compute_score(truths, answers)[0],
    }
    assert result["CIDEr"] > 0.5 and result["BLEU-1"] > result["BLEU-4"] > 0
    assert capsys.readouterr().out == ""


def test_caption_small_sets():
    assert captions.caption([], [])["CIDEr"] == 0
    alone = captions.caption(["a cat"], [["A cat!"]])
    assert alone["CIDEr"] == 0 and alone["BLEU-1"] == pytest.approx(1)
    with pytest.raises(ValueError, match="reference captions"):
        captions.caption(["a cat"], [["..."]])


def test_caption_same_scene_is_scored_twice():
    both = captions.caption(["a cat", "a cat"], [["a cat"], ["a dog"]])
    assert both["BLEU-1"] == pytest.approx(3 / 4)
