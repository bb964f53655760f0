"""Two-hop questions: both articles are needed, and a retriever finds only the first."""

import itertools

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import read_passages_tsv, read_questions_jsonl
from expertrag_jax.retrieval.index import Queries, make_index
from tasks.almanac import two_hop
from tasks.almanac.two_hop_files import main, write_two_hop

NAMES = [f"{first} {last}" for first in ("Ada", "Bo", "Cy") for last in ("Korv", "Lund", "Moss")]


def test_the_chain_leads_to_the_answer_and_nothing_else_does():
    examples = list(itertools.islice(two_hop.two_hop_examples(NAMES, np.random.default_rng(0)), 200))
    known, second = set(two_hop.words(NAMES)), []
    for example in examples:
        passages = {passage["title"]: passage for passage in example["passages"]}
        assert len(passages) == two_hop.PASSAGES == 8
        person = " ".join(example["question"].split()[-2:])
        instrument, town = example["answers"][0].split()
        employer = next(word for word in passages[person]["text"].split() if word in passages)
        assert instrument in passages[person]["text"].split() and town in passages[employer]["text"].split()
        relevant = {title for title, passage in passages.items() if passage["relevance"]}
        assert relevant == {person, employer}
        for title in set(passages) - relevant:
            assert not {instrument, town, employer} & set(passages[title]["text"].split())
        assert example["passages"][0]["title"] == person  # its name is in the question
        second.append(example["passages"][1]["title"] == employer)
        texts = [example["question"], *example["answers"], *(f"{t} {p['text']}" for t, p in passages.items())]
        assert set(" ".join(texts).split()) <= known
    assert 0.05 < np.mean(second) < 0.35
    again = next(two_hop.two_hop_examples(NAMES, np.random.default_rng(0)))
    assert again == examples[0]


def test_files_of_questions_and_passages(tmp_path):
    """A lexical index finds the person first, and the companies of the register; no person stands in two of them."""
    folder = tmp_path / "two_hop"
    write_two_hop(folder, {"train": 900, "test": 100}, seed=1)
    passages = read_passages_tsv(folder / "corpus.tsv.gz")
    index = make_index("bm25").build(passages, None)
    persons, found = [], []
    for split, size, before in (("train", 900, 0), ("test", 100, 900)):
        questions = read_questions_jsonl(folder / f"{split}.jsonl")
        assert len(questions) == size
        rows, _ = index.search(Queries([question.question for question in questions]), 8)
        for number, (question, read) in enumerate(zip(questions, rows.tolist()), before):
            register = range(8 * number, 8 * number + 8)
            companies = {row for row in register if " " not in passages.titles[row]}
            gold = {int(name[1:]) for name in question.gold_passage_ids}
            assert len(companies) == 4 and len(gold) == 2 and len(gold & companies) == 1 and gold < set(register)
            assert passages.titles[read[0]] == question.question.rsplit(" of ", 1)[1] and read[0] in gold
            found.append(companies < set(read))
            persons += [passages.titles[row] for row in set(register) - companies]
    assert np.mean(found) > 0.99
    assert len(persons) == len(set(persons)) == 4 * 1000
    with pytest.raises(UserError, match="not an empty folder"):
        write_two_hop(folder)


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / "there").write_text("x")
    monkeypatch.setattr("sys.argv", ["two_hop_files", "--output_dir", str(tmp_path / "there")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "not an empty folder" in capsys.readouterr().err
