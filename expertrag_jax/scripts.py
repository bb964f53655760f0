"""Which characters are of scripts that are written without blanks between words."""

WITHOUT_BLANKS = "".join(rf"\p{{Line_Break={name}}}" for name in ("SA", "ID", "CJ", "NS", "H2", "H3", "JL", "JV", "JT"))
"""Characters of such scripts, inside a class of ``regex``: Unicode's line breaking classes (UAX #14) of complex
context, ideographs, kana and Hangul."""
