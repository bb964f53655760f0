"""The words by which a text is found."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import regex

from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.lexical_index import LexicalIndex
from expertrag_jax.retrieval.protocol import Queries
from expertrag_jax.retrieval.words import words_of


@pytest.mark.parametrize(
    "text, words",
    [
        ("Malcolm X's 1,000 cars", "malcolm x 1000 cars"),
        ("1,2,3 and 12,345,678.9, not 1,0000", "1 2 3 and 12345678 9 not 1 0000"),
        ("don't; O’Brien; l'homme; Model T", "don o brien l homme model t"),
        ("snake_case e-mail 3.14", "snake case e mail 3 14"),
        ("the U.S.A.; U.S.Army; Malcolm X. Y.", "the usa us army malcolm x y"),
        ("Beyonce\u0301 BEYONCÉ beyonce", "beyonce beyonce beyonce"),
        ("ＦＵＬＬ ﬁne m² Ⅳ", "full fine m2 iv"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zero width"),
        ("İstanbul straße", "istanbul strasse"),
        ("हिन्दी भाषा", "हिन्दी भाषा"),
        ("مُحَمَّد محمد שָׁלוֹם", "محمد محمد שלום"),
        ("北京大学abc", "北 京 大 学 北京 京大 大学 abc"),
        ("カ\u3099 ｶﾞ サーバー", "ガ ガ サ ー バ ー サー ーバ バー"),
        ("서울에서", "서 울 에 서 서울 울에 에서"),
        ("Łódź Lodz; smørrebrød; Đà Nẵng; Kadıköy; œuvre", "lodz lodz smorrebrod da nang kadikoy oeuvre"),
        ("١٢٣ 123 ১২৩", "123 123 123"),
        ("كـــتاب كتاب", "كتاب كتاب"),
        ("Hawaiʻi Hawai'i п’ять пʼять", "hawai i hawai i п ять п ять"),
        ("", ""),
        ("... !", ""),
    ],
)
def test_the_words_of_a_text(text, words):
    assert words_of(text) == words.split()


def test_an_index_is_searched_by_the_rule_that_it_was_built_with(tmp_path):
    index = LexicalIndex(language=None, stopwords=None)
    index._word_rule = 2
    index.build(Passages(["0", "1"], ["", ""], ["Łódź ١٢٣", "Lodz"])).save(tmp_path)
    rows, _ = LexicalIndex().load(tmp_path).search(Queries(["Łódź", "lodz", "١٢٣"]), 2)
    assert rows.tolist() == [[0, -1], [1, -1], [0, -1]]
    assert words_of("Łódź ١٢٣", rule=2) == ["łodz", "١٢٣"]


SENTENCES = {
    "Chinese": "苍鹭是一种栖息在湿地的大型水鸟，由林奈于1758年命名。",
    "Japanese": "富士山は静岡県と山梨県に跨る活火山である。サーバー",
    "Korean": "서울특별시는 대한민국의 수도이자 최대 도시이다.",
    "Thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "Khmer": "ភ្នំពេញគឺជារាជធានីនៃប្រទេសកម្ពុជា",
}


@pytest.mark.parametrize("script", SENTENCES)
@pytest.mark.parametrize("form", ("NFC", "NFD", "NFKC", "NFKD"))
def test_every_part_of_a_passage_without_blanks_finds_it(script, form):
    passages = Passages(list(SENTENCES), [""] * len(SENTENCES), list(SENTENCES.values()))
    index = LexicalIndex(stopwords=None).build(passages)
    runs = [regex.findall(r"\X", run) for run in regex.findall(r"[\p{L}\p{M}]+", SENTENCES[script])]
    parts = {"".join(run[a:b]) for run in runs for a in range(len(run)) for b in range(a + 1, a + 7)}
    typed = [unicodedata.normalize(form, part) for part in sorted(parts)]
    rows, _ = index.search(Queries(typed), len(SENTENCES))
    missed = [part for part, found in zip(typed, rows.tolist()) if passages.row_of()[script] not in found]
    assert len(typed) > 50 and not missed


def test_other_languages_are_stemmed_with_their_accents_and_found_without():
    passages = Passages(["0", "1"], ["", ""], ["Les forêts créées", "Un château"])
    index = LexicalIndex(language="french", stopwords="french").build(passages)
    rows, _ = index.search(Queries(["FORÊT", "foret", "créé", "chateau"]), 1)
    np.testing.assert_array_equal(rows[:, 0], [0, 0, 0, 1])
