"""The tokenizer without Java against the words that Java's makes."""

import shutil

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from octavius.evaluation.tokenizer import tokenize

KNOWN = {  # what pycocoevalcap's PTBTokenizer gives with Stanford CoreNLP 3.4.1
    "A man's dog can't sit on the t-shirt.": "a man 's dog ca n't sit on the t-shirt",
    "I'm gonna go; don't cannot wanna": "i 'm gon na go do n't can not wan na",
    "U.S. flag at 3:30 p.m. costs $5.00, 1/2 & 50%!": "u.s. flag at 3:30 p.m. costs $ 5.00 1/2 & 50 %",
    "He said \"hello\" to 'him' (there) [x]...": "he said hello to him -lrb- there -rrb- -lsb- x -rsb-",
    "mother-in-law -- it's o'clock": "mother-in-law it 's o'clock",
    "the 1990s' best, 2,000 people": "the 1990s best 2,000 people",
    "It's the dogs' bowl.": "it 's the dogs bowl",
    "Rock 'n' roll": "rock 'n' roll",
    "A St. Bernard and Mr. Smith": "a st. bernard and mr. smith",
    "cat_dog #1 *star* ~ ^ | < > = + \\": "cat_dog # 1 * star * ~ ^ | < > = + \\",
    "two\u2013three \u2014 four": "two three four",
    "A big, red ball!?": "a big red ball !?",
    "12-year-old boy's": "12-year-old boy 's",
    "y'all won't've": "y' all wo n't 've",
    "rock&roll AT&T": "rock & roll at&t",
    "x-ray of 3-4 bones, no. 5": "x-ray of 3-4 bones no. 5",
    "'tis twas lemme gimme": "'t is twas lem me gim me",
    "5ft 6in 3.5\" 7'": "5ft 6in 3.5 7",
    "it is 10:30am": "it is 10:30 am",
    "I'd we've they're he'll": "i 'd we 've they 're he 'll",
    "": "",
}


@pytest.mark.parametrize("text", KNOWN)
def test_words_are_those_of_java(text):
    assert tokenize(text) == KNOWN[text]


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer that is compared with needs Java")
def test_words_equal_java_on_captions_that_templates_make():
    things = ("cat", "St. Bernard", "man's hat", "12-year-old", "T-shirt", "U.S. flag", "3.5 m pole", "dogs'")
    texts = [f"{a} {x}, {b} the {y}{end}" for x in things for y in things for a, b, end in FORMS]
    texts += [text for text in KNOWN if text] + ["a cat"]  # Java reads an apostrophe before the file's end apart
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    differing = [(text, theirs[i][0], tokenize(text)) for i, text in enumerate(texts) if theirs[i] != [tokenize(text)]]
    assert len(texts) > 270 and differing == []


FORMS = (
    ("A photo of a", "isn't it near", "."),
    ("There's the", "which doesn't touch", "!"),
    ("Two (2) of the", '"seen" from', "?"),
    ("I'll say:", "they've left", "..."),
)
