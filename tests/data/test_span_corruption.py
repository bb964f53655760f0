"""Span corruption: lengths and spans as T5 has them, nothing lost, the same from any step on."""

import numpy as np
import pytest

from expertrag_jax.data import span_corruption
from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, write_passages_tsv
from expertrag_jax.vocabulary import embedding_rows, train_vocabulary
from tasks.questions import register_questions
from tasks.span_corruption import register_mixture, register_span_corruption

WORDS = "river stone harbour castle market tower bridge garden".split()
TEXTS = [f"The {w} lies east of the {v}. Nobody built the {w}." for w in WORDS for v in WORDS]
LENGTHS = {"inputs": 48, "targets": 24, "query": 8}
SENTINELS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    train_vocabulary(TEXTS, 120, folder / "reader.model")
    names = [f"p{i}" for i in range(len(TEXTS))]
    write_passages_tsv(Passages(names, [w.title() for w in WORDS] * 8, TEXTS), folder / "corpus.tsv")
    (folder / "notes").mkdir()
    (folder / "notes" / "castle.txt").write_text(" ".join(TEXTS))
    (folder / "questions.jsonl").write_text('{"question": "Where?", "answers": ["east"]}\n')
    return folder


@pytest.fixture(scope="module")
def vocabularies(files):
    return Vocabularies(files / "reader.model")


def pipeline(task, **options):
    return Pipeline(task, LENGTHS, 8, process_index=0, process_count=1, **options)


def restore(inputs, targets, first_sentinel):
    """Undoes a corruption: every sentinel of the input gives way to what follows it in the target."""
    lowest, spans, current = first_sentinel - 1000, {}, None
    for token in targets[:-1]:
        if lowest < token <= first_sentinel and token > first_sentinel - SENTINELS:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    return [t for token in inputs[:-1] for t in spans.get(int(token), [int(token)])], spans


def test_lengths_are_those_of_t5():
    # T5's gin: inputs 512, targets 114, 568 tokens (random_spans_helper)
    assert span_corruption.window_length(512, 0.15, 3.0) == 568
    assert span_corruption.corrupted_lengths(568, 0.15, 3.0) == (512, 114)
    with pytest.raises(UserError, match="at least 3 tokens"):
        span_corruption.window_length(2, 0.15, 3.0)


@pytest.mark.parametrize("length", [2, 3, 7, 50, 568])
def test_masks_have_the_rate_and_the_spans_asked_for(length):
    rng = np.random.default_rng(0)
    tokens, spans = span_corruption.num_noise(length, 0.15, 3.0)
    found = np.stack([span_corruption.noise_mask(length, 0.15, 3.0, rng) for _ in range(300)])
    starts = found & ~np.pad(found, ((0, 0), (1, 0)))[:, :-1]
    assert (found.sum(1) == tokens).all() and (starts.sum(1) == spans).all() and not found[:, 0].any()
    if length == 568:
        assert (tokens, spans) == (85, 28)
        np.testing.assert_allclose(found[:, 60:-60].mean(0), 0.15, atol=0.08)  # nowhere more than elsewhere


def test_all_partitions_are_equally_likely():
    rng, seen = np.random.default_rng(0), {}
    for _ in range(6000):
        sizes = tuple(span_corruption._partition(5, 3, rng))
        seen[sizes] = seen.get(sizes, 0) + 1
    assert set(seen) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    np.testing.assert_allclose(np.array(list(seen.values())) / 6000, 1 / 6, atol=0.03)


def test_the_example_of_the_paper():
    text = "thank you for inviting me to your party last week".split()
    ids = np.arange(10, 20, dtype=np.int32)
    mask = np.array([word in ("for", "inviting", "last") for word in text])
    inputs, targets = span_corruption.corrupt(ids, mask, 99)
    assert inputs.tolist() == [10, 11, 99, 14, 15, 16, 17, 98, 19, 1]
    assert targets.tolist() == [99, 12, 13, 98, 18, 1]


def test_no_token_of_the_corpus_is_lost(files, vocabularies):
    task = register_span_corruption(vocabularies, files / "corpus.tsv", sentinels=SENTINELS)
    batches = list(pipeline(task, shuffle=False, repeat=False)(0))
    inputs = np.concatenate([batch.encoder_input_tokens for batch in batches])
    targets = np.concatenate([batch.decoder_target_tokens for batch in batches])
    whole = (inputs != 0).all(1)
    assert whole.sum() == len(inputs) - 1 - (inputs == 0).all(1).sum()  # static shapes: only the last one is shorter
    pieces = vocabularies.reader.vocab_size
    first = pieces + SENTINELS - 1
    stream = []
    for row, (some, hidden) in enumerate(zip(inputs, targets)):
        if some.any():
            tokens, spans = restore(some[some > 0], hidden[hidden > 0], first)
            assert list(spans) == list(range(first, first - len(spans), -1)), row
            stream += tokens
    encode = vocabularies.reader.tokenizer.encode
    titles = [w.title() for w in WORDS] * 8
    assert stream == [t for title, text in zip(titles, TEXTS) for t in (*encode(title), 1, *encode(text), 1)]
    assert max(inputs.max(), targets.max()) == first < embedding_rows(files / "reader.model", 8, SENTINELS)


def test_the_same_examples_from_any_step_on(files, vocabularies):
    def make(**options):
        task = register_span_corruption(vocabularies, files / "corpus.tsv", sentinels=SENTINELS, **options)
        return pipeline(task)

    long, late = make()(0), make()(5)
    for _ in range(5):
        next(long)
    for ours, theirs in zip((next(long) for _ in range(8)), late):
        np.testing.assert_array_equal(ours.encoder_input_tokens, theirs.encoder_input_tokens)
        np.testing.assert_array_equal(ours.decoder_target_tokens, theirs.decoder_target_tokens)
    assert (next(make(seed=1)(0)).encoder_input_tokens != next(make()(0)).encoder_input_tokens).any()
    twice, once = make(copies=2), make()
    assert twice.num_examples == 2 * once.num_examples
    assert len({tuple(row) for batch in list(zip(range(99), twice(0))) for row in batch[1].encoder_input_tokens}) == (
        twice.num_examples
    )


def test_raw_documents_and_a_mixture_with_questions(files, vocabularies):
    text = register_span_corruption(vocabularies, documents=files / "notes", name="notes", sentinels=SENTINELS)
    asked = register_questions("asked", files / "questions.jsonl", vocabularies)
    mixture = register_mixture("notes_and_questions", [text, "asked"], [3, 1])
    register_mixture("notes_and_questions", [text, asked], [3, 1])  # registering again replaces
    batches = [batch for _, batch in zip(range(128), pipeline(mixture)(0))]
    ids = np.concatenate([batch.example_ids for batch in batches])
    targets = np.concatenate([batch.decoder_target_tokens for batch in batches])
    is_text = (targets >= vocabularies.reader.vocab_size).any(1)
    assert len(ids) == 1024 and is_text.sum() == 768


def test_what_does_not_fit_is_one_sentence(files, vocabularies):
    corpus = files / "corpus.tsv"

    def read(lengths, **options):
        task = register_span_corruption(vocabularies, corpus, **options)
        next(Pipeline(task, lengths, 8, process_index=0, process_count=1)(0))

    with pytest.raises(UserError, match=r"raise TASK_FEATURE_LENGTHS\['targets'\] to 114"):
        read({"inputs": 512, "targets": 113, "query": 1})
    with pytest.raises(UserError, match="28 gaps, but there are 27 sentinels"):
        read({"inputs": 512, "targets": 114, "query": 1}, sentinels=27)
    with pytest.raises(UserError, match="either CORPUS"):
        register_span_corruption(vocabularies)
    with pytest.raises(UserError, match="each is a number above 0"):
        register_mixture("none", ["span_corruption"], [0])
