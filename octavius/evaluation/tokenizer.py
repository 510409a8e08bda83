"""Words of a caption as COCO's evaluation makes them, without Java.

The Stanford PTB tokenizer (3.4.1, `-lowerCase`) followed by the removal of punctuation, as pycocoevalcap's
`PTBTokenizer` does both. Equal on English prose; names of files and of programs may differ.
"""

import re

REMOVED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}  # "-lrb-" stays, as it does there
NAMES = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
NAMES |= {"…": "...", "–": "--", "—": "--", '"': "''", "“": "``", "”": "''", "‘": "`", "’": "'"}  # noqa: RUF001
SHORTENED = "st|mr|mrs|ms|dr|prof|sr|jr|vs|etc|ave|blvd|rd|inc|ltd|corp|co|dept|lt|gen|sgt|capt|col|rev|hon|gov|sen|rep"
WORD = r"[^\W_](?:[\w]|[-/.](?=[^\W_])|&(?=[A-Z]))*"
TOKEN = re.compile(
    rf"""https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+   # addresses
    | (?:[^\W\d_]\.){{2,}} | \b(?i:{SHORTENED})\. | \b(?i:no)\.(?=\s*\d)   # abbreviations
    | \b[A-Z]\.(?!\w) | (?<=\s)n't(?=\s) | '(?i:n)'(?!\w) | (?i:o)'(?i:clock)\b | (?i:'t)(?=(?i:is|was)\b)
    | \d+(?:[.,:/]\d+)+(?=(?i:am|pm)\b) | \d+(?:[.,:]\d+)+(?![\w-])
    | [yY]'(?=all\b)
    | {WORD}(?='\w)? | (?:(?<=\w)|(?<=n't\s))'(?i:s|m|d|re|ve|ll)\b   # words, and what an apostrophe joins to them
    | \.{{2,}} | -{{2,}} | [!?]{{2,}} | \*{{2,}} | \#{{2,}} | ''|`` | [^\w\s]|_""",
    re.VERBOSE,
)
NEGATED = re.compile(r"(?<=\w)n['’]t(?!\w)", re.IGNORECASE)  # noqa: RUF001
MERGED = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
}  # fmt: skip


def tokenize(text: str) -> str:
    """Lower-cased words of a caption, joined by spaces.

    Args:
        text: one caption.
    """
    parted = NEGATED.sub(" n't ", text.replace("\n", " "))
    lowered = (NAMES.get(match[0], match[0]).lower() for match in TOKEN.finditer(parted))
    return " ".join(MERGED.get(token, token) for token in lowered if token not in REMOVED)
