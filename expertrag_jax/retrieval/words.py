"""The words by which a text is found: one rule for passages and questions, in any script and any Unicode form.

1. Compatibility forms become plain ones (NFKC), and capitals become small letters (full case folding). Characters that
   cannot be seen, such as soft hyphens and joiners, are removed. So are accents and the vowel points of Arabic and
   Hebrew, and the strokes of letters: "beyonce" finds "Beyoncé", composed or not, and "lodz" finds "Łódź". Signs that a
   script cannot do without stay. Digits of all scripts are the same, and so are the apostrophes in "Hawai'i" and
   "Hawaiʻi". The line that stretches Arabic words is removed.
2. A comma between groups of three digits is removed: "1,000" is "1000". So are full stops between single letters
   ("U.S." is "us") and the endings "'s" and "'t".
3. A word is a run of letters, marks and digits, of any length: "x" and "7" are words, "don't" is "don", and "3.14" is
   "3" and "14".
4. A run in a script without blanks between words (Han, kana, Hangul, Thai, Khmer and others) becomes its characters and
   its pairs of neighbouring characters. A dictionary cuts such a run by what stands around a word: it may find
   "北京大学" in a passage and "大学" in the question. With pairs, every word of a passage finds it.

The index then drops stop words and stems the rest, each of which its settings can turn off.
"""

from __future__ import annotations

import unicodedata

import regex

from expertrag_jax.scripts import WITHOUT_BLANKS

RULE = 3
"""The version of the rule. Version 2 kept strokes, the digits of scripts, U+02BB, U+02BC and U+0640 apart; 1 is bm25s's
own rule: two or more letters or digits, not their marks."""
_UNSEEN = regex.compile(r"[\p{Cf}\p{Variation_Selector}--\u200b]", regex.V1)  # U+200B stands between words
_THOUSANDS = regex.compile(r"(?<=\p{Nd}),(?=\p{Nd}{3}(?!\p{Nd}))")
_ACRONYM = regex.compile(r"(?<![\p{L}\p{N}])\p{L}(?:\.\p{L})+(?![\p{L}\p{N}])")
_ENDING = regex.compile(r"(?<=\p{L})['’ʼ][st](?![\p{L}\p{N}])")
_RUN = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_DIGIT = regex.compile(r"[\p{Nd}--0-9]", regex.V1)
_APOSTROPHE = regex.compile(r"[ʻʼ]")
_ARABIC_LINE = "\u0640"
_STROKES = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ŧ": "t", "ı": "i", "æ": "ae", "œ": "oe"})
_PART_WITHOUT_BLANKS = regex.compile(rf"[{WITHOUT_BLANKS}][{WITHOUT_BLANKS}\p{{M}}]*")
_PART = regex.compile(rf"{_PART_WITHOUT_BLANKS.pattern}|(?:(?![{WITHOUT_BLANKS}]).)+")
_CHARACTER = regex.compile(r"\X")


def words_of(text: str, accents: bool = False, rule: int = RULE) -> list[str]:
    """The words of a text by the rule above, repeated as they occur; texts that are equal in NFKC have equal words.

    Args:
      text: of any length.
      accents: whether to keep them, for a stemmer that needs them.
      rule: its version; an index is searched by the one that it was built with.
    """
    if text.isascii():
        return _RUN.findall(_simplified(text.lower()))
    text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    text = unicodedata.normalize("NFKC", text.casefold())
    if rule > 2:
        text = _DIGIT.sub(lambda match: str(unicodedata.decimal(match.group())), text).replace(_ARABIC_LINE, "")
        text = _APOSTROPHE.sub("'", text)
    words = []
    for run in _RUN.findall(_simplified(text if accents else without_accents(text, rule))):
        for part in [run] if run.isascii() else _PART.findall(run):
            words += _characters_and_pairs(part) if _PART_WITHOUT_BLANKS.match(part) else [part]
    return words


def _simplified(text: str) -> str:
    text = _ACRONYM.sub(lambda match: match.group().replace(".", ""), text)
    return _ENDING.sub("", _THOUSANDS.sub("", text))


def without_accents(text: str, rule: int = RULE) -> str:
    """Small letters without the marks and strokes that people leave out; composed (NFC)."""
    decomposed = unicodedata.normalize("NFD", text)
    plain = unicodedata.normalize("NFC", "".join(char for char in decomposed if not _is_optional_mark(char)))
    return plain.translate(_STROKES) if rule > 2 else plain


def _is_optional_mark(char: str) -> bool:
    """Whether people leave this mark out: a point of Hebrew or Arabic (combining classes 10 to 36) or an accent."""
    combining = unicodedata.combining(char)
    return 10 <= combining <= 36 or combining >= 200


def _characters_and_pairs(part: str) -> list[str]:
    characters = _CHARACTER.findall(part)
    return characters + [first + second for first, second in zip(characters, characters[1:])]
