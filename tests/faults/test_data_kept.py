"""Data are read whole or refused with their line, and what is left out is counted: nothing is lost without a word."""

from __future__ import annotations

import gzip
import logging
import unicodedata

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.evaluation.answers import SCORERS, check_rule, has_answer, score, written_form
from expertrag_jax.retrieval.corpus import Passages, read_passages_tsv, read_questions_jsonl, write_passages_tsv
from expertrag_jax.retrieval.documents import read_documents
from expertrag_jax.retrieval.retriever import tokenize_passages
from expertrag_jax.retrieval.splitting import sentences, split_text
from expertrag_jax.vocabulary import train_vocabulary


def write(folder, content, name):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "rows, message",
    [
        ('1\t"Blue heron is a boat.\tBoats\n2\tThe mayor of Wexo" signed.\tCanal\n', ":1: .*closed on line 2"),
        ('1\t"Blue heron.\tBoats\n2\tSaid the mayor of Wexo"\tCanal\n', ":1: .*closed on line 2"),
        ('1\t"A.\tB\n2\tC.\tD\n3\tE" F.\tG\n', ":1: .*closed on line 3"),
        ('0\tx\ty\n1\ttext\t"Title\n2\ttext\ttitle\n', ":2: .*never closed"),
        ('0\tx\ty\n1\ttext\t"Title\n', ":2: .*never closed"),
        ('0\tx\ty\n1\t"text\ttitle\n', ":2: .*never closed"),
        ('1\t"A ""quoted"" b.\tB\n2\tC" d.\tD\n', ":1: .*closed on line 2"),
        ('1\t"A\tB\n\n2\tC"\tD\n3\te\tf\n', ":1: .*closed on line 3"),
        ('1\t"A\tB\n2\tC\n3\tD"\tE\n', ":1: .*closed on line 3"),
        ('1\ttext\t"Ti\n\n2\ttext\ttitle"\n', ":1: .*closed on line 3"),
        ('1\ttext\t"Ti\n2\ttitle"\n', ":1: .*closed on line 2"),
        ('id\ttext\ttitle\t"url\n1\ta\tb\tc"\n2\td\te\tf\n', ":1: .*closed on line 2"),
    ],
)
def test_quotes_that_take_in_other_rows_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_passages_tsv(write(tmp_path, rows, "p.tsv"))


@pytest.mark.parametrize(
    "rows, texts",
    [
        ('1\t"Hamlet" is a play.\tHamlet\n', ["Hamlet is a play."]),  # as DPR's reader has it
        ('1\tIt is 5" long.\tRuler\n', ['It is 5" long.']),
        ('1\t"He said ""no"". "\tT\n2\tb\tT\n', ['He said "no". ', "b"]),
        ('1\t"two\nlines"\tT\n2\tb\tT\n', ["two\nlines", "b"]),
        ('1\t"a\tb"\tT\n', ["a\tb"]),
        ('1\t"a\tb\tc\nd"\tT\n', ["a\tb\tc\nd"]),
        ('1\ta\t"two\nlines"\n2\tb\tT\n', ["a", "b"]),
        ('1\t"a\nx\ty\tz\nb"\tT\n', ["a\nx\ty\tz\nb"]),
        ("\ufeff1\ta\tT\r\n2\tb\tT\r\n", ["a", "b"]),
    ],
)
def test_quotes_that_were_read_rightly_still_are(tmp_path, rows, texts):
    assert read_passages_tsv(write(tmp_path, rows, "p.tsv")).texts == texts


def test_files_that_were_put_together_repeat_their_beginning(tmp_path):
    members = [f"\ufeffid\ttext\ttitle\n{row}\ta\tT\n".encode() for row in (1, 2)]
    for name, content in (("p.tsv", b"".join(members)), ("p.tsv.gz", b"".join(map(gzip.compress, members)))):
        assert read_passages_tsv(write(tmp_path, content, name)).ids == ["1", "2"]
    content = b"".join(f"\ufeff{row}\ta\tT\n".encode() for row in (1, 2))
    assert read_passages_tsv(write(tmp_path, content, "q.tsv")).ids == ["1", "2"]


def test_the_passages_of_an_index_may_look_like_rows(tmp_path):
    passages = Passages(["1", "2"], ["T", "U"], ["Blue heron.\tBoats\n2\tSaid the mayor", "x"])
    write_passages_tsv(passages, tmp_path / "p.tsv.gz")
    assert read_passages_tsv(tmp_path / "p.tsv.gz", written_here=True).texts == passages.texts


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("苍鹭是一种水鸟。它在湿地！「好。」他说了？是的。", "苍鹭是一种水鸟。|它在湿地！|「好。」|他说了？|是的。"),
        ("यह एक है। दूसरा वाक्य॥ तीसरा", "यह एक है।|दूसरा वाक्य॥|तीसरा"),
        ("هل هذا؟ نعم۔ لا", "هل هذا؟|نعم۔|لا"),
        ("ሰላም። እንዴት ነህ፧ እሺ", "ሰላም።|እንዴት ነህ፧|እሺ"),
        ("It cost 3.5 pounds. Dr. No paid!", "It cost 3.5 pounds.|Dr. No paid!"),
    ],
)
def test_sentences_end_in_every_script(text, wanted):
    assert sentences(text) == wanted.split("|")


@pytest.mark.parametrize(
    "sentence",
    [
        "苍鹭是一种栖息在湿地的大型水鸟，由林奈命名。",
        "富士山は日本の山である。",
        "ภาษาไทยเป็นภาษา",
        "서울은 수도이다. ",
        "A" * 999 + ". ",
    ],
)
def test_passages_are_bounded_in_every_script(sentence):
    passages = split_text(sentence * 60, 100)
    assert len(passages) > 2 and max(len(passage) for passage in passages) <= 510
    assert "".join(passages).replace(" ", "") == (sentence * 60).replace(" ", "")


def test_what_a_folder_of_documents_leaves_out_is_counted(tmp_path, caplog):
    folder, other = tmp_path / "docs", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    for place, content in (("a.txt", "Text."), ("b.txt", " \n"), ("c.pdf", "x"), ("d.doc", "x"),
                           ("e.md", "# Above\n## Within\nSection."), ("f.md", "\n")):  # fmt: skip
        write(folder, content, place)
    write(other, "Elsewhere.", "e.txt")
    (folder / "linked").symlink_to(other)
    with caplog.at_level(logging.WARNING):
        assert read_documents(folder).texts == ["Text.", "Section."]
    (line,) = caplog.messages
    for part in ("4 files were read", "2 files of other kinds", "1 linked folders", "2 documents without text",
                 "1 headings without text"):  # fmt: skip
        assert part in line


@pytest.mark.parametrize(
    "record, name",
    [
        ('{"_id": "q7", "question": "a"}', "q7"),
        ('{"_id": "q7", "id": "k1", "question": "a"}', "k1"),
        ('{"id": null, "_id": 7, "question": "a"}', "7"),
        ('{"id": null, "question": "a"}', "0"),
        ('{"id": 0, "question": "a"}', "0"),
    ],
)
def test_ids_are_read_under_both_names(tmp_path, record, name):
    assert read_questions_jsonl(write(tmp_path, record, "q.jsonl"), False)[0].id == name
    document = write(tmp_path, record.replace('"question"', '"text"'), "d.jsonl")
    assert read_documents(document).ids == [f"{name}#0" if name != "0" or ": 0" in record else "d.jsonl:1#0"]


def test_several_ids_of_null_are_distinct(tmp_path):
    path = write(tmp_path, '{"id": null, "question": "a"}\n' * 2, "q.jsonl")
    assert [question.id for question in read_questions_jsonl(path, False)] == ["0", "1"]


@pytest.mark.parametrize(
    "record, message",
    [
        ('{"question": "a", "hard_negative_passage_ids": "p3"}', "'hard_negative_passage_ids' must be a list"),
        ('{"question": "a", "gold_passage_ids": "p3"}', "'gold_passage_ids' must be a list of strings"),
        ('{"question": "a", "id": [1]}', "'id' must be a string or a number"),
        ('{"question": "a", "_id": true}', "'_id' must be a string or a number"),
    ],
)
def test_fields_of_another_type_are_refused(tmp_path, record, message):
    with pytest.raises(UserError, match=f"q.jsonl:1: {message}"):
        read_questions_jsonl(write(tmp_path, record, "q.jsonl"), False)


ANSWERS = ("m²", "½", "ＦＵＬＬ", "ﬁne", "soft\u00adhyphen", "a\u00a0b", "e\u0301", "㎡", "ｶﾞ", "zero\u200bwidth")


@pytest.mark.parametrize("rule", SCORERS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_perfect_reader_is_right_in_the_form_of_its_vocabulary(rule, answer):
    vocabulary = train_vocabulary([answer, "m2 1⁄2 FULL fine softhyphen a b é zero width"] * 9, 300, byte_fallback=True)
    predicted = vocabulary.decode(vocabulary.encode(answer))
    assert all(value > 0.99 for value in score(rule, predicted, [answer]).values())


def test_the_written_form_is_the_vocabularys_for_every_character():
    vocabulary = train_vocabulary(["abc def"] * 50, 300, byte_fallback=True)
    characters = (chr(code) for code in range(0x20, 0x30000))
    texts = [f"a{char}b" for char in characters if unicodedata.category(char) not in ("Cs", "Cn", "Co")]
    written = map(vocabulary.decode, vocabulary.encode_batch(texts))
    assert [text for text, found in zip(texts, written) if written_form(text) != written_form(found)] == []


@pytest.mark.parametrize(
    "pattern, text, right",
    [
        (r"19[0-9]{2}", "It was in 1912.", True),
        (r"19[0-9]{2}", "It was in 191.", False),
        (r"(J\.?\s*)?tolkien", "J. R. R. Tolkien wrote it", True),
        (r"^Paris$", "in Paris", False),
        (r"Beyonce\u0301", "Beyoncé", True),
        (r"(a+)+$", "a" * 60 + "b", False),  # takes for ever
    ],
)
def test_answers_may_be_regular_expressions(pattern, text, right):
    assert has_answer(text, [pattern], "regex") is right
    assert score("regex", text, ["no such", pattern]) == {"em": float(right)}


@pytest.mark.parametrize("pattern", ["(a", "(?La)x", "(?R)", "(" * 5000 + ")" * 5000, "*a"])
def test_an_answer_that_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(UserError, match="is no regular expression"):
        check_rule("regex", [["a"], [pattern]])
    check_rule("squad1", [[pattern]])


@pytest.mark.parametrize("answers", [[" "], [""], ["\u200b", "\u00ad"]])
def test_answers_without_text_are_refused_by_the_rule_that_cannot_read_them(answers):
    with pytest.raises(UserError, match="hold no text"):
        check_rule("kilt", [["a", *answers], answers])
    check_rule("squad1", [answers])


@pytest.mark.parametrize(
    "pattern, text",
    [("m[²³]", "m2"), ("²+", "22"), (r"\(½\)", "(1⁄2)"), ("a（b）", "a(b)"), (r"\d{4}年?", "2008年"), ("½+", "1⁄21⁄2")],
)
def test_a_regular_expression_is_read_in_the_form_of_the_vocabulary(pattern, text):
    assert score("regex", text, [pattern]) == {"em": 1.0}


@pytest.mark.parametrize(
    "answer, text, there",
    [
        ("北京大学", "他在北京大学读书，后来成了作家。", True),
        ("北京大学", "他在北京上大学。", False),
        ("서울", "서울은 크다", True),
        ("서우", "서울은 크다", False),
        ("กรุงเทพ", "เขาเรียนที่กรุงเทพฯ", True),
        ("東京タワー", "昨日は東京タワーに行った。", True),
        ("2008", "建于2008年。", True),
        ("cat", "concatenate", False),
        ("Lodz", "Łódź", False),
    ],
)
def test_an_answer_is_found_in_scripts_without_blanks(answer, text, there):
    assert has_answer(text, [answer]) is there


@pytest.mark.parametrize("text", ["zyx " * 2000, "zyx " * 30000, "zyx ▅ " * 9])
def test_a_vocabulary_is_trained_on_every_text(text):
    vocabulary = train_vocabulary(["abc def"] * 50 + [text] * 3, 60)
    assert vocabulary.writes("zyx") and len(vocabulary.encode("zyx")) == 1 and not vocabulary.writes("q")


def test_a_vocabulary_on_a_sample_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        train_vocabulary(["abc def"] * 150, 40, max_sentences=120)
    assert "a sample of 120 of 150 texts" in caplog.text


def test_passages_that_are_cut_are_counted(caplog):
    passages = Passages(["0", "1", "2"], ["", "", ""], ["a", "a a a", "a a a a"])
    with caplog.at_level(logging.WARNING):
        tokens = tokenize_passages(passages, lambda text: [5] * len(text.split()), 3)
    assert caplog.messages == ["2 of 3 passages are longer than 3 tokens and were cut"] and tokens.shape == (3, 3)
