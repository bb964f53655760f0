"""Was the answer right: the scoring rules of SQuAD 1.1, SQuAD 2.0, HotpotQA and KILT, regular expressions, and DPR's
``has_answer``.

The rules share one normalisation and differ at its edges: answers that normalise to nothing, yes and no, and
the empty prediction. Scores are fractions of 1, the best over the accepted answers.

``squad1``
    Rajpurkar et al. 2016. An empty normalised answer can match exactly, but its F1 is 0.
``squad2``
    Rajpurkar et al. 2018. Answers that normalise to nothing are dropped; with none left the question is unanswerable
    and only an (effectively) empty prediction is right, EM and F1.
``hotpot``
    Yang et al. 2018. As squad1, but F1 is 0 when either side is yes, no or noanswer and they differ.
``kilt``
    Petroni et al. 2021. The prediction is stripped, and an empty one scores 0. Adds ``accuracy`` (equal without
    normalisation) and ``rougel`` (no normalisation either).
``regex``
    The answers are regular expressions, as CuratedTrec has them (Karpukhin et al. 2020): one that is found anywhere in
    the text is right, ignoring case.

A vocabulary writes text in one form only, and "m\u00b2" comes back as "m2". So what a reader predicts is compared by
``score``, which brings both sides into that form; the rules themselves are the official ones.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import regex

from expertrag_jax.errors import UserError
from expertrag_jax.scripts import WITHOUT_BLANKS

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOKEN = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{N}}\p{{M}}]--[{WITHOUT_BLANKS}]]+|(?=[{WITHOUT_BLANKS}])\X|[^\p{{Z}}\p{{C}}]"
)
_BLANK = regex.compile(r"[\u061c\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd]")
_UNSEEN = regex.compile(r"[\p{Cf}\x7f\x8f\x9f]")
_SECONDS = 2.0  # that a regular expression may search a passage
_CLOSED_ANSWERS = ("yes", "no", "noanswer")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles (a, an, the), single spaces: SQuAD's rule."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised answer, else 0.0.

    Raises:
      ValueError: no answers.
    """
    return _best(lambda p, a: float(normalise(p) == normalise(a)), prediction, answers)


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the bag of normalised tokens; 0 when they share none."""
    predicted, expected = normalise(prediction).split(), normalise(answer).split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad1(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """{"em", "f1"} of SQuAD 1.1; ValueError without answers."""
    return {"em": exact_match(prediction, answers), "f1": _best(token_f1, prediction, answers)}


def squad2(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """{"em", "f1"} of SQuAD 2.0; no answers means that the question has none."""
    answers = [answer for answer in answers if normalise(answer)] or [""]
    return {"em": exact_match(prediction, answers), "f1": _best(_squad2_f1, prediction, answers)}


def hotpot(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """{"em", "f1"} of HotpotQA's answer task; ValueError without answers."""
    return {"em": exact_match(prediction, answers), "f1": _best(_hotpot_f1, prediction, answers)}


def kilt(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """{"accuracy", "em", "f1", "rougel"} of KILT; ValueError without a non-blank answer."""
    prediction = prediction.strip()
    answers = [answer.strip() for answer in answers if answer.strip()]
    scores = {
        "accuracy": _best(lambda p, a: float(p == a), prediction, answers),
        "em": exact_match(prediction, answers),
        "f1": _best(token_f1, prediction, answers),
        "rougel": _best(rouge_l, prediction, answers),
    }
    return scores if prediction else dict.fromkeys(scores, 0.0)


def regular_expression(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """{"em"}: whether an answer, a regular expression, is found in the prediction; ValueError without answers."""
    return {"em": _best(lambda text, pattern: float(_found(pattern, text)), prediction, answers)}


SCORERS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "squad1": squad1,
    "squad2": squad2,
    "hotpot": hotpot,
    "kilt": kilt,
    "regex": regular_expression,
}


def score(rule: str, prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Every score of ``rule`` (a key of SCORERS) for what a reader predicts; ValueError as the rule has it."""
    form = _written_pattern if rule == "regex" else written_form
    return SCORERS[rule](written_form(prediction), [form(answer) for answer in answers])


def written_form(text: str) -> str:
    """The text as a SentencePiece vocabulary writes it (its rule nmt_nfkc): NFKC, nothing unseen, blanks single."""
    return " ".join(unicodedata.normalize("NFKC", _written_characters(text)).split())


def _written_characters(text: str) -> str:
    return _UNSEEN.sub("", _BLANK.sub(" ", unicodedata.normalize("NFKC", text)))


def _written_pattern(pattern: str) -> str:
    """The regular expression with every character that ``written_form`` replaces as what takes its place."""
    parts, in_class, escaped = [], False, False
    for character in pattern:
        written = character if character.isascii() else _written_characters(character)
        if written != character and not escaped:
            written = regex.escape(written) if in_class or len(written) < 2 else f"(?:{regex.escape(written)})"
        if not escaped and character in "[]":
            in_class = character == "["
        escaped = character == "\\" and not escaped
        parts.append(written)
    return "".join(parts)


def check_rule(rule: str, answers: Iterable[Sequence[str]] = ()) -> None:
    """Checks a rule's name, and that it can read the answers.

    Raises:
      UserError: no such rule, an answer that is no regular expression (``regex``), or no answer with text (``kilt``).
    """
    if rule not in SCORERS:
        raise UserError(f"--rule={rule} is unknown: choose one of {', '.join(SCORERS)}.")
    for accepted in answers if rule in ("regex", "kilt") else ():
        if rule == "kilt" and not any(map(written_form, accepted)):
            raise UserError(f"the answers {list(accepted)} hold no text, which --rule=kilt needs: mend or remove them.")
        for pattern in accepted if rule == "regex" else ():
            try:
                for form in (pattern, _written_pattern(pattern)):
                    _pattern(form).search("", timeout=_SECONDS)  # (?R) compiles and never ends
            except (regex.error, ValueError, RecursionError, MemoryError, OverflowError, TimeoutError) as error:
                raise UserError(
                    f"the answer {pattern[:80]!r} is no regular expression ({str(error) or 'it is too deep'}), which "
                    "--rule=regex needs: mend it."
                ) from None


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 as the ``rouge`` package 1.0.1 computes it, which KILT uses: summary level, over sets of
    words.

    Sentences end at every full stop. Per reference sentence, the words of its longest common subsequences
    with each predicted sentence are united into one set over all sentences. With u its size, precision is u /
    (distinct predicted words), recall is u / (distinct reference words), and F1 = 2pr / (p + r + 1e-8). 0
    without a sentence on a side.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    united: set[str] = set()
    for reference_words in expected:
        for words in predicted:
            united |= _common_subsequence(reference_words, words)
    precision = len(united) / len({word for words in predicted for word in words})
    recall = len(united) / len({word for words in expected for word in words})
    return 2 * precision * recall / (precision + recall + 1e-8)


def has_answer(text: str, answers: Iterable[str], rule: str = "squad1") -> bool:
    """Whether an answer occurs in ``text`` as a run of whole tokens (DPR, Karpukhin et al. 2020), ignoring
    case; by the rule ``regex``, whether one is found in it as a regular expression.

    A token is a run of letters, digits and marks, or any other single character that is neither blank nor
    control; both sides are decomposed (NFD) first. An answer without tokens occurs nowhere. Unlike in DPR, each
    character is a token in scripts that are written without blanks, where DPR finds no answer inside a sentence.
    """
    if rule == "regex":
        return any(_found(pattern, text) for pattern in answers)
    tokens = simple_tokens(text)
    return any(_contains(tokens, simple_tokens(answer)) for answer in answers)


def simple_tokens(text: str) -> list[str]:
    """DPR's tokens of a text, lower case, after NFD."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def _found(pattern: str, text: str) -> bool:
    """Whether the regular expression is found in the text, both decomposed; one that takes seconds is not."""
    try:
        return _pattern(pattern).search(unicodedata.normalize("NFD", text), timeout=_SECONDS) is not None
    except TimeoutError:
        return False


@functools.lru_cache(maxsize=4096)
def _pattern(text: str) -> regex.Pattern[str]:
    return regex.compile(unicodedata.normalize("NFD", text), regex.IGNORECASE | regex.MULTILINE)


def _contains(tokens: list[str], run: list[str]) -> bool:
    return bool(run) and any(tokens[i : i + len(run)] == run for i in range(len(tokens) - len(run) + 1))


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("a prediction is scored against at least one answer")
    return max(score(prediction, answer) for answer in answers)


def _squad2_f1(prediction: str, answer: str) -> float:
    if not normalise(prediction) or not normalise(answer):
        return float(normalise(prediction) == normalise(answer))
    return token_f1(prediction, answer)


def _hotpot_f1(prediction: str, answer: str) -> float:
    predicted, expected = normalise(prediction), normalise(answer)
    if predicted != expected and (predicted in _CLOSED_ANSWERS or expected in _CLOSED_ANSWERS):
        return 0.0
    return token_f1(prediction, answer)


def _sentences(text: str) -> list[list[str]]:
    """Words per sentence; a blank sentence holds the one word "", as in the package."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_subsequence(reference: list[str], predicted: list[str]) -> set[str]:
    """The words of one longest common subsequence; among several, the one that the package takes."""
    rows, columns = len(reference), len(predicted)
    length = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            if reference[i - 1] == predicted[j - 1]:
                length[i][j] = length[i - 1][j - 1] + 1
            else:
                length[i][j] = max(length[i - 1][j], length[i][j - 1])
    i, j, words = rows, columns, set()
    while i and j:
        if reference[i - 1] == predicted[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
