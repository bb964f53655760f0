"""Running text split into sentences, and into passages of whole sentences, in any script."""

from __future__ import annotations

import regex

from expertrag_jax.errors import UserError
from expertrag_jax.scripts import WITHOUT_BLANKS

_CLOSING = r"""["'”’)\]]*"""
# A sentence ends at . ! ? and closing quotes or brackets, before white space and what can begin the next one. Other
# scripts have ends of their own (Unicode's STerm: 。 । ۔ ؟ ። and so on), which nothing has to follow.
_SENTENCE_END = regex.compile(
    rf"""(?<=[.!?]){_CLOSING}\s+(?=["'“‘(\[]*[^\W_a-z])|(?<=[\p{{SB=STerm}}--[!?]])[\p{{SB=STerm}}\p{{Pe}}\p{{Pf}}"']*\s*""",
    regex.V1,
)
# These words end in a full stop inside sentences.
_ABBREVIATION = regex.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Lt|Sgt|Rev|Hon|Capt|Gov|Sen|Rep|No|Nos|Vol"
    r"|pp?|vs|etc|cf|ca|approx|e\.g|i\.e|U\.S|U\.K|U\.N|Inc|Ltd|Co|Corp|Fig|Eq|al)\.$"
)
_LONGEST_ABBREVIATION = 16  # characters, with what stands around it: a text full of them is searched in linear time
# What counts as a word: a pair of characters of a script without blanks, or what stands between blanks, if it has at
# most 40 letters. A longer run, such as an encoded file, counts as one word for every five letters.
_PAIR = rf"(?:[{WITHOUT_BLANKS}]\p{{M}}*){{1,2}}\p{{P}}*"
_LETTER = rf"(?![{WITHOUT_BLANKS}]|\s)\X"
_WORD = regex.compile(
    rf"(?:{_PAIR}|(?:{_LETTER}){{1,40}}(?=\s|[{WITHOUT_BLANKS}]|$)|(?:{_LETTER}){{1,5}})\s*"
)


def sentences(text: str) -> list[str]:
    """Splits running text into sentences; white space is normalised to single spaces.

    A full stop after an initial or a common English abbreviation does not end a sentence.
    """
    return [sentence.rstrip() for sentence in _with_blanks(text)]


def split_text(text: str, max_words: int = 100) -> list[str]:
    """Passages of at most ``max_words`` words of whole sentences, as many as fit.

    Words are counted between blanks. In scripts without blanks two characters count as a word; so do five letters of a
    run of more than 40. A sentence that alone has more words is cut at ``max_words``.

    Raises:
      UserError: ``max_words`` is below 1.
    """
    if max_words < 1:
        raise UserError(f"max_words is {max_words}: a passage needs at least one word")
    passages: list[str] = []
    current: list[str] = []
    for sentence in _with_blanks(text):
        words = _WORD.findall(sentence)
        if current and len(current) + len(words) > max_words:
            passages.append("".join(current).rstrip())
            current = []
        current += words
        full = (len(current) - 1) // max_words * max_words
        passages += ["".join(current[i : i + max_words]).rstrip() for i in range(0, full, max_words)]
        current = current[full:]
    if current:
        passages.append("".join(current).rstrip())
    return passages


def _with_blanks(text: str) -> list[str]:
    """The sentences of the text with the blank after each, so that joined they are the text."""
    text = " ".join(text.split())
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        tail = text[max(start, match.end() - _LONGEST_ABBREVIATION) : match.end()]
        if not _ABBREVIATION.search(tail.rstrip()):
            found.append(text[start : match.end()])
            start = match.end()
    return found + [text[start:]] if text[start:] else found
