"""Pipelines: contents against a plain-Python reading of the records, order, resuming, errors."""

import concurrent.futures
import copy
import itertools
import time

import numpy as np
import pytest
import seqio
import tensorflow as tf

from expertrag_jax import evidence
from expertrag_jax.data import pipeline as pipeline_module
from expertrag_jax.data.order import Order
from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.preprocessors import record
from expertrag_jax.data.question_tasks import question_task, register
from expertrag_jax.errors import UserError
from expertrag_jax.gate import policy

LENGTHS = {"inputs": 24, "targets": 8, "query": 24}
FIELDS = ("example_ids", "encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens")


def make(task, batch_size=8, lengths=LENGTHS, **options):
    options = {"process_index": 0, "process_count": 1} | options
    return Pipeline(task, lengths, batch_size, **options)


def padded(ids, length):
    return np.array([*ids, *[0] * (length - len(ids))][:length], np.int32)


def assert_same(batch, other):
    for field, value in vars(batch).items():
        if value is None:
            assert getattr(other, field) is None, field
        else:
            np.testing.assert_array_equal(value, getattr(other, field), err_msg=field)


@pytest.mark.parametrize("materialise", [True, False])
def test_closed_book_batches_hold_the_records(questions, vocabulary, materialise):
    pipeline = make(questions.task(), repeat=False, shuffle=False, materialise=materialise)
    batches = list(pipeline(0))
    assert len(batches) == 5 and all(batch.size == 8 for batch in batches)
    for place, example in enumerate(questions.records):
        batch, row = batches[place // 8], place % 8
        question = vocabulary.encode(example["question"])
        answer = vocabulary.encode(example["answers"][0])[:7]
        assert batch.example_ids[row] == example["id"]
        np.testing.assert_array_equal(batch.encoder_input_tokens[row], padded([*question, 1], 24))
        np.testing.assert_array_equal(batch.query_tokens[row], padded([*question, 1], 24))
        np.testing.assert_array_equal(batch.decoder_target_tokens[row], padded([*answer, 1], 8))
        np.testing.assert_array_equal(batch.decoder_input_tokens[row], padded([0, *answer, 1], 8))
        np.testing.assert_array_equal(batch.decoder_loss_weights[row], padded([1] * (len(answer) + 1), 8))
    assert batches[-1].example_ids[5:].tolist() == [-1] * 3
    assert not batches[-1].decoder_loss_weights[5:].any() and not batches[-1].encoder_input_tokens[5:].any()
    assert batches[0].passage_tokens is None and batches[0].retrieve is None


def test_an_example_is_a_batch_where_the_rows_are_in_memory(questions):
    (example,) = make(questions.task()).example_batches(7)
    assert_same(example, next(make(questions.task())(0)))
    assert make(questions.task(), materialise=False).example_batches() == []


def test_one_is_read_once_and_two_at_a_time(questions, monkeypatch):
    reading, most, reads = [], [], []

    def read(ds, name):
        reading.append(name)
        time.sleep(0.3)  # long enough for whoever else is allowed in
        most.append(len(reading))
        reading.remove(name)
        reads.append(name)
        return original(ds, name)

    original = pipeline_module._read
    monkeypatch.setattr(pipeline_module, "_read", read)
    one, two = make(questions.task()), make(questions.task())
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda pipeline: pipeline.check(), (one, one, two)))
    assert len(reads) == 2 and max(most) == 2
    assert_same(next(one(0)), next(two(0)))


@pytest.mark.parametrize("materialise", [True, False])
def test_resuming_gives_the_same_batches(questions, materialise):
    through = list(itertools.islice(make(questions.task(), seed=3, materialise=materialise)(0), 14))
    for start in (1, 5, 9):
        resumed = make(questions.task(), seed=3, materialise=materialise)(start)
        for expected in through[start:]:
            assert_same(next(resumed), expected)
    other = next(make(questions.task(), seed=4, materialise=materialise)(0))
    assert (other.example_ids != through[0].example_ids).any()
    seen = np.concatenate([batch.example_ids for batch in through])
    if materialise:
        assert sorted(seen[:37]) == sorted(seen[37:74]) == [r["id"] for r in questions.records]
    else:
        assert set(seen) == {r["id"] for r in questions.records}


def mixture_of(questions):
    """Two tasks, 3 to 1; ids under 1,000 are the first's."""
    for name, first in (("mixed_a", 0), ("mixed_b", 1000)):
        if name not in seqio.TaskRegistry.names():
            records = [r | {"id": first + i} for i, r in enumerate(questions.records)]
            register(questions.task(name=name, records=records))
    return seqio.Mixture("mixed", [("mixed_a", 3), ("mixed_b", 1)])


def processes(pipeline, count):
    """The pipelines of ``count`` processes; what this one has read already, they have too."""
    pipelines = [copy.copy(pipeline) for _ in range(count)]
    for index, each in enumerate(pipelines):
        each.process_index, each.process_count = index, count
    return pipelines


ORDERS = {  # options, and the batches of 8 that are looked at: of 37 examples, so a pass ends inside a batch
    "shuffled": ({}, 12),
    "unshuffled": ({"shuffle": False}, 12),
    "one pass": ({"repeat": False}, 5),
    "mixture": ({}, 140),  # more than a block
    "one streamed pass": ({"repeat": False, "materialise": False}, 5),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_slices_of_the_processes_make_up_every_global_batch(questions, kind):
    options, length = ORDERS[kind]
    pipeline = make(mixture_of(questions) if kind == "mixture" else questions.task(), **options)
    whole = list(itertools.islice(pipeline(0), length))
    assert len(whole) == length
    if kind in ("shuffled", "unshuffled"):
        ids = np.concatenate([batch.example_ids for batch in whole])
        np.testing.assert_array_equal(ids, 100 + Order(37, 0, kind == "shuffled").at(np.arange(8 * length)))
    for count in (1, 2, 4):
        parts = [part(0) for part in processes(pipeline, count)]
        for batch in whole:
            slices = [next(part) for part in parts]
            assert all(part.size == 8 // count for part in slices)
            for field in FIELDS:
                joined = np.concatenate([getattr(part, field) for part in slices])
                np.testing.assert_array_equal(joined, getattr(batch, field), err_msg=f"{count} {field}")
        if not pipeline.repeat:
            assert [next(part, None) for part in parts] == [None] * count


def test_any_number_of_processes_goes_on_at_any_step(questions):
    pipeline = make(questions.task())
    whole = list(itertools.islice(pipeline(0), 8))
    for count, start in ((4, 3), (2, 7)):
        parts = [next(part(start)) for part in processes(pipeline, count)]
        joined = np.concatenate([part.example_ids for part in parts])
        np.testing.assert_array_equal(joined, whole[start].example_ids)
    with pytest.raises(UserError, match="not a multiple of the 3 processes"):
        next(processes(pipeline, 3)[0](0))


@pytest.fixture
def four_files(vocabularies, tmp_path):
    """(their paths, a task over them): 12 lines each of id, question and answer; file f has ids from 100 f."""
    paths = [tmp_path / f"questions-{number}.tsv" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_text("".join(f"{100 * number + i}\twhat is red {i}\tblue\n" for i in range(12)))

    def to_record(line):
        number, question, answer = tf.unstack(tf.strings.split(line, "\t"), 3)
        return record(question, answer[None], tf.strings.to_number(number, tf.int64), None, None)

    source = seqio.FileDataSource(tf.data.TextLineDataset, {"train": [str(path) for path in paths]})
    return paths, question_task("four_files", source, to_record, vocabularies, "closed_book")


@pytest.mark.parametrize("materialise", [True, False])
def test_with_shard_source_a_process_reads_its_own_files(four_files, materialise):
    paths, task = four_files
    for path in paths[::2]:
        path.write_text("no number\twhat\tblue\n")  # whoever reads it, fails
    first, second = (
        make(task, materialise=materialise, shuffle=materialise, shard_source=True, process_index=i, process_count=2)
        for i in (0, 1)  # SeqIO shuffles a stream over the ends of passes
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="no number"):
        next(first(0))
    batches = list(itertools.islice(second(0), 12))
    assert [batch.size for batch in batches] == [4] * 12
    ids = np.concatenate([batch.example_ids for batch in batches]).reshape(2, 24)
    expected = [100 + i for i in range(12)] + [300 + i for i in range(12)]
    assert sorted(ids[0]) == sorted(ids[1]) == expected  # two passes
    assert (ids[0].tolist() != ids[1].tolist()) == materialise
    assert_same(next(second(7)), batches[7])


@pytest.mark.parametrize("materialise", [True, False])
def test_with_shard_source_and_one_file_the_processes_share_its_examples(questions, materialise):
    seen = []
    for index, count in enumerate((10, 9, 9, 9)):
        part = make(questions.task(), 4, shard_source=True, materialise=materialise, shuffle=materialise)
        part.process_index, part.process_count = index, 4
        seen += [batch.example_ids.item() for batch in itertools.islice(part(0), count)]
    assert sorted(seen) == sorted(r["id"] for r in questions.records)


def test_with_shard_source_one_pass_is_refused(four_files):
    with pytest.raises(UserError, match="one pass would end at different steps"):
        next(make(four_files[1], shard_source=True, repeat=False)(0))


@pytest.mark.parametrize("kind", ["shuffled", "one pass", "mixture"])
def test_a_process_gathers_its_own_rows_alone(questions, kind, monkeypatch):
    gathered = []

    def counted(gather):
        def run(*arguments):
            gathered.append(len(arguments[-1]))  # the rows
            return gather(*arguments)

        return run

    for name in ("_gather", "_gather_mixed"):
        monkeypatch.setattr(pipeline_module, name, counted(getattr(pipeline_module, name)))
    pipeline = make(mixture_of(questions) if kind == "mixture" else questions.task(), **ORDERS[kind][0])
    assert next(pipeline(0)).size == gathered.pop() == 8
    for index, part in enumerate(processes(pipeline, 4)):
        gathered.clear()
        assert len(list(itertools.islice(part(0), 5))) == 5
        last = (2, 2, 1, 0)[index] if kind == "one pass" else 2  # of 37 examples the fifth batch holds 5
        assert gathered == [2, 2, 2, 2, last]


def test_both_arms_have_passages_for_every_row(questions, retriever, vocabulary):
    task = questions.task("both_arms", retriever=retriever, num_passages=3)
    pipeline = make(task, lengths=LENGTHS | {"passages": 32}, repeat=False, shuffle=False)
    batches = list(pipeline(0))
    for place, example in enumerate(questions.records):
        batch, row = batches[place // 8], place % 8
        rows = retriever.rows(example["question"], 3)
        assert batch.passage_rows[row].tolist() == rows
        question = vocabulary.encode(example["question"])
        np.testing.assert_array_equal(batch.encoder_input_tokens[row], padded([*question, 1], 24))
        for k, passage in enumerate(rows):
            tokens = retriever.tokens[passage].tolist()
            cut = tokens.index(1)
            text = [t for t in tokens[cut + 1 :] if t]
            expected = evidence.assemble(question, tokens[:cut], text, 32)
            np.testing.assert_array_equal(batch.passage_tokens[row, k], expected)
        known = [float(f"p{r}" in example["gold"]) for r in rows] if example["gold"] else [np.nan] * 3
        np.testing.assert_array_equal(batch.passage_relevance[row], known)
        np.testing.assert_array_equal(batch.retrieval_needed[row], example["needed"])
        np.testing.assert_allclose(batch.passage_scores[row, 0], len(example["question"]) / 10, rtol=1e-6)


@pytest.mark.parametrize(
    "chosen",
    [
        policy.Always(),
        policy.Never(),
        policy.Random(rate=0.4),
        policy.Oracle(when_unknown=False),
        policy.Threshold(threshold=3.0),
        policy.Learned(threshold=0.5),
    ],
    ids=lambda p: type(p).__name__,
)
def test_decided_mode_concatenates_where_the_policy_retrieves(questions, retriever, vocabulary, chosen):
    records = questions.records
    p_ret = {tuple(vocabulary.encode(r["question"])): (i % 4) / 3 for i, r in enumerate(records)}

    def gate(tokens):
        return np.array([p_ret[tuple(row[row != 0][:-1])] for row in tokens], np.float32)

    task = questions.task("decided", retriever=retriever, num_passages=2, policy=chosen, p_ret=gate)
    batches = list(make(task, lengths=LENGTHS | {"inputs": 48}, repeat=False, shuffle=False)(0))
    retrieve = chosen.decide(
        policy.PolicyInputs(
            example_ids=np.array([r["id"] for r in records]),
            p_ret=np.array([p_ret[tuple(vocabulary.encode(r["question"]))] for r in records]),
            passage_scores=np.array([[len(r["question"]) / 10] for r in records]),
            retrieval_needed=np.array([r["needed"] for r in records]),
        )
    )
    if not isinstance(chosen, (policy.Always, policy.Never)):
        assert 0 < retrieve.sum() < len(records)
    for place, example in enumerate(records):
        batch, row = batches[place // 8], place % 8
        assert batch.retrieve[row] == retrieve[place]
        tokens = [*vocabulary.encode(example["question"]), 1]
        if retrieve[place]:
            for passage in retriever.rows(example["question"], 2):
                tokens += [*(t for t in retriever.tokens[passage].tolist() if t), 1]
            if len(tokens) > 48:
                tokens = [*tokens[:47], 1]
        np.testing.assert_array_equal(batch.encoder_input_tokens[row], padded(tokens, 48))
        assert batch.passage_tokens is None
    # A skipped question costs no search.
    searched = [text for call in retriever.calls for text in call]
    paid = retrieve if "passage_scores" not in chosen.needs else np.ones(len(records), bool)
    assert searched == [r["question"] for r, p in zip(records, paid) if p]


def test_packing_makes_a_skip_save_rows(questions, retriever):
    rows = {}
    for rate in (0.0, 0.5, 1.0):
        task = questions.task("decided", retriever=retriever, num_passages=1, policy=policy.Random(rate))
        pipeline = make(task, 4, {"inputs": 96, "targets": 96}, pack=True, repeat=False)
        rows[rate] = pipeline.num_examples
        batch = next(pipeline(0))
        segments = batch.encoder_segment_ids
        assert (batch.encoder_input_tokens[segments > 0] != 0).all() and segments.max() > 1
        starts = batch.decoder_positions == 0
        assert (batch.decoder_input_tokens[starts] == 0).all()
        inside = (batch.decoder_segment_ids > 0) & ~starts
        rowwise = np.roll(batch.decoder_target_tokens, 1, axis=1)
        np.testing.assert_array_equal(batch.decoder_input_tokens[inside], rowwise[inside])
        assert batch.example_ids is None and batch.retrieve is None
    assert rows[0.0] < rows[0.5] < rows[1.0]


def test_a_mixture_draws_by_rate(questions):
    mixture = mixture_of(questions)
    pipeline = make(mixture, batch_size=64)
    ids = np.concatenate([batch.example_ids for batch in itertools.islice(pipeline(0), 16)])
    assert (ids < 1000).sum() == 768
    assert_same(next(make(mixture, batch_size=64)(7)), next(itertools.islice(pipeline(0), 7, None)))


def test_errors_name_what_is_wrong(questions, retriever):
    with pytest.raises(UserError, match="MIXTURE_OR_TASK_NAME.*no_such_task"):
        next(make("no_such_task")(0))
    with pytest.raises(UserError, match="no split 'validation'.*train"):
        next(make(questions.task(), split="validation")(0))
    with pytest.raises(UserError, match="length for 'targets'"):
        next(make(questions.task(), lengths={"inputs": 24, "query": 24})(0))
    with pytest.raises(UserError, match="has no retriever"):
        questions.task("decided")
    long = [
        r | {"question": "what is the " + "red " * 40} if r["id"] == 117 else r for r in questions.records
    ]
    for materialise in (True, False):
        with pytest.raises(UserError, match=r"question of example 117 has \d+ tokens, but inputs holds 24"):
            list(make(questions.task(records=long), repeat=False, materialise=materialise)(0))
        with pytest.raises(UserError, match="question of example 117"):
            make(questions.task(records=long[:18]), repeat=False, shuffle=False, materialise=materialise).check()
        make(questions.task(), materialise=materialise).check()
    mode = {"retriever": retriever, "policy": policy.Learned()}
    with pytest.raises(UserError, match="Learned needs p_ret"):
        next(make(questions.task("decided", **mode))(0))


def test_a_target_that_is_cut_is_told_of_once(questions, told):
    lengths = {"inputs": 24, "targets": 40, "query": 24}
    list(make(questions.task(), lengths=lengths, repeat=False)(0))
    assert not told()
    lengths["targets"] = 2
    batches = list(make(questions.task(), lengths=lengths, repeat=False)(0))
    (message,) = told()
    assert "tokens, but targets holds 2: it is cut" in message
    assert {tuple(np.flatnonzero(row == 1)) for b in batches for row in b.decoder_target_tokens if row.any()} == {(1,)}


def test_stock_seqio_converters_work_too(questions):
    pipeline = make(
        questions.task(),
        lengths={"inputs": 24, "targets": 8},
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        repeat=False,
        shuffle=False,
    )
    ours = make(questions.task(), repeat=False, shuffle=False)
    for batch, expected in zip(pipeline(0), ours(0), strict=True):
        np.testing.assert_array_equal(batch.encoder_input_tokens, expected.encoder_input_tokens)
        np.testing.assert_array_equal(batch.decoder_input_tokens, expected.decoder_input_tokens)
