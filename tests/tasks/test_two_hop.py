"""Two-hop questions: both articles are needed, and a retriever finds only the first."""

import itertools

import numpy as np

from tasks.almanac import two_hop

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
