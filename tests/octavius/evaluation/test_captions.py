"""Caption scores against pycocoevalcap called directly."""

import time

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from octavius.evaluation import captions
from octavius.evaluation.scoring import score

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


@pytest.mark.skipif(not captions.has_java(), reason="METEOR needs Java")
def test_meteor_is_pycocoevalcaps():
    values, intervals = captions.meteor_scores(CAPTIONS, REFERENCES)
    truths, answers = dict(enumerate(REFERENCES)), {i: [text] for i, text in enumerate(CAPTIONS)}
    assert values["METEOR"] == pytest.approx(Meteor().compute_score(truths, answers)[0]) and values["METEOR"] > 0.1
    low, high = intervals["METEOR"]
    assert 0 <= low <= high <= 1


def test_meteor_without_java_says_so(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="METEOR needs Java on the PATH, found none"):
        score([{"benchmark": "mini-caption", "prediction": "a cat", "sentences": ["a cat"]}], meteor=True)


def test_bleu_of_resampled_sums_is_bleu():
    """The formula behind BLEU's intervals gives the corpus score for the corpus' own sums."""
    answers = {i: [text] for i, text in enumerate(CAPTIONS)}
    bleu, statistics = captions._bleu(answers, dict(enumerate(REFERENCES)))
    for order in range(1, 5):
        assert captions._bleu_of(statistics.sum(0)[None], order)[0] == pytest.approx(bleu[order - 1])


@pytest.mark.slow
def test_five_thousand_captions_take_seconds():
    start = time.process_time()
    captions.caption(CAPTIONS * 1250, REFERENCES * 1250)
    print(f"{time.process_time() - start:.1f} s of CPU")
