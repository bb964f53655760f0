"""``Pipeline``: the batches of a SeqIO task or mixture, from any step on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.batch import Batch
from expertrag_jax.data.bridge import user_errors
from expertrag_jax.data.feature_converters import TOKEN_FEATURES, converter_for
from expertrag_jax.data.order import Mixed, Order
from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Count, Natural, Seed, checked

_READ = 1024  # examples fetched from tf.data at a time
_PACKING_SHUFFLE = 1 << 20  # examples shuffled before they are packed

Arrays = dict[str, np.ndarray]


@checked
@dataclasses.dataclass(eq=False)
class Pipeline:
    """``pipeline(start_step)`` yields batches; the position in the data is the step number.

    One global order, fixed by the seed: the batch of step s holds positions s * batch_size up to
    (s + 1) * batch_size, and process i of n gets its i-th contiguous slice. Starting at any step gives the
    same batches as running up to it, on any number of processes (but see ``shard_source``).

    With TriviaQA registered as ``trivia_qa``::

      pipeline = Pipeline("trivia_qa", {"inputs": 64, "targets": 16, "query": 64}, batch_size=32)
      batch = next(pipeline(start_step=100))

    Attributes:
      mixture_or_task: a registered name, a ``seqio.Task`` or a ``seqio.Mixture``.
      task_feature_lengths: lengths of the token features ("inputs", "targets", "query", "passages": the
        length of one passage). Features of the task that are no tokens need none; those the task lacks are
        ignored.
      batch_size: B of the global batch, over all processes.
      split: of the task.
      seed: of order, shuffling and the task's own randomness.
      shuffle: a new order in every pass; else the source's order.
      repeat: endlessly; else one pass, whose last batch is filled with zero rows (example id -1, loss weight
        0).
      pack: several examples per row (``inputs`` and ``targets`` only).
      feature_converter: a ``seqio.FeatureConverter`` giving Batch fields; None chooses by the task's
        features.
      materialise: read the task once into memory as padded arrays and batch in numpy; preprocessing
        (retrieval included) then happens once in each process, which gathers its own rows of a batch. False
        streams through tf.data: any size, shuffled within SeqIO's buffer, every process prepares the whole
        batch, and resuming replays the stream up to the step.
      shard_source: each process reads and prepares its own part of the source alone: its files, where there are
        at least as many as processes, else its share of the examples. Then the batches depend on the number of
        processes, and a run goes on exactly with that number only. For endless data: passes over parts of different
        sizes would end at different steps.
      use_cached: read SeqIO's offline cache of the task.
      process_index, process_count: None asks JAX.
    """

    mixture_or_task: str | seqio.Task | seqio.Mixture
    task_feature_lengths: Mapping[str, Count]
    batch_size: Count
    split: str = "train"
    seed: Seed = 0
    shuffle: bool = True
    repeat: bool = True
    pack: bool = False
    feature_converter: seqio.FeatureConverter | None = None
    materialise: bool = True
    shard_source: bool = False
    use_cached: bool = False
    process_index: Natural | None = None
    process_count: Count | None = None

    def __post_init__(self) -> None:
        self._reading, self._rows = threading.Lock(), None

    def __call__(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches of numpy arrays [batch_size / process_count, ...] from ``start_step`` on.

        Raises:
          UserError: no such task or split, no examples, an example that does not fit, a batch size that the
            processes do not divide.
        """
        batches = self._materialised if self.materialise else self._streamed
        for arrays in batches(start_step, *self._place()):
            yield Batch(**arrays)

    def check(self) -> None:
        """Reads what it serves, the first batch of a stream; raises what ``__call__`` would."""
        if self.materialise:
            self._place()
            self._arrays  # noqa: B018
        else:
            next(self(), None)

    def example_batches(self, start_step: int = 0) -> list[Batch]:
        """A batch of the one shape, where the rows are in memory; none of a stream, which would be read for it."""
        return [next(self())] if self.materialise and self.num_examples else []

    @functools.cached_property
    def provider(self) -> seqio.Task | seqio.Mixture:
        """The task or mixture.

        Raises:
          UserError: no task of that name, or no such split.
        """
        provider = self.mixture_or_task
        if isinstance(provider, str):
            try:
                provider = seqio.get_mixture_or_task(provider)
            except ValueError as error:
                raise UserError(f"MIXTURE_OR_TASK_NAME: {str(error).splitlines()[0]}") from None
        if self.split not in provider.splits:
            raise UserError(
                f"task {provider.name} has no split {self.split!r}: "
                f"choose one of {', '.join(sorted(provider.splits))}"
            )
        return provider

    @functools.cached_property
    def converter(self) -> seqio.FeatureConverter:
        """The feature converter that was given, or the one that fits the task."""
        return self.feature_converter or converter_for(self.provider.output_features, self.pack)

    @property
    def num_examples(self) -> int:
        """Rows of one pass, with ``shard_source`` of this process's part; materialises the task."""
        return sum(len(next(iter(arrays.values()))) for arrays in self._arrays)

    @property
    def steps_per_pass(self) -> int:
        """Batches of one pass, the last partial one included; materialises the task."""
        return -(-self.num_examples // self.batch_size)

    def _process(self) -> tuple[int, int]:
        """(index of this process, how many there are)."""
        if self.process_index is not None and self.process_count is not None:
            return self.process_index, self.process_count
        import jax  # here, so that reading data on one host starts no JAX backend before it is needed

        return jax.process_index(), jax.process_count()

    def _place(self) -> tuple[int, slice]:
        """(rows of a batch of what this process reads, its own among them)."""
        index, count = self._process()
        if self.batch_size % count:
            raise UserError(f"BATCH_SIZE {self.batch_size} is not a multiple of the {count} processes")
        if self.shard_source and not self.repeat:
            raise UserError(
                f"{self.provider.name}: shard_source is for data without an end (repeat): the processes' parts of the "
                "source differ in size and one pass would end at different steps. Bind it for the training's "
                "pipelines alone, by their scopes (closed_book/pipeline.Pipeline.shard_source = True)."
            )
        local = self.batch_size // count
        if self.shard_source:  # all that it reads is its own
            return local, slice(0, local)
        return self.batch_size, slice(index * local, (index + 1) * local)

    def _lengths(self) -> dict[str, int]:
        """A length for every feature of the converter: SeqIO wants one, 1 for those that are no tokens."""
        lengths = {}
        for name in self.converter.TASK_FEATURES:
            if name in TOKEN_FEATURES and name not in self.task_feature_lengths:
                raise UserError(
                    f"task {self.provider.name} needs a length for {name!r}: set TASK_FEATURE_LENGTHS"
                )
            lengths[name] = int(self.task_feature_lengths.get(name, 1))
        return lengths

    def dataset(self, provider: seqio.Task | seqio.Mixture | None = None, **options) -> tf.data.Dataset:
        """The converted tf.data set of single rows, in ``Batch``'s field names.

        Args:
          provider: a task of the mixture; None for the whole.
          **options: of ``get_dataset``: shuffle, num_epochs.
        """
        _leave_accelerators_to_jax()
        lengths = self._lengths()
        self._check_cached()
        shard = seqio.ShardInfo(*self._process()) if self.shard_source else None
        ds = (provider or self.provider).get_dataset(
            lengths,
            split=self.split,
            seed=self.seed,
            use_cached=self.use_cached,
            shard_info=shard,
            trim_output_features=False,  # the converter cuts whole chunks, at a tenth of the cost
            **options,
        )
        if self.pack and self.materialise and self.shuffle:
            ds = ds.shuffle(_PACKING_SHUFFLE, seed=self.seed, reshuffle_each_iteration=False)
        return self.converter(ds, lengths)

    def _check_cached(self) -> None:
        missing = [task.name for task in self._sources if self.use_cached and not task.cache_dir]
        if missing:
            raise UserError(
                f"USE_CACHED_TASKS is True, but task {missing[0]} has no complete cache in "
                f"{list(seqio.get_global_cache_dirs())}: name its folder with --seqio_additional_cache_dirs, write it "
                "with seqio_cache_tasks (extra 'beam'), or set USE_CACHED_TASKS to False."
            )

    @functools.cached_property
    def _sources(self) -> list[seqio.Task]:
        tasks = self.provider.tasks if isinstance(self.provider, seqio.Mixture) else [self.provider]
        return [task for task in tasks if self.split in task.splits]

    @property
    def _arrays(self) -> list[Arrays]:
        """Per source, every row of one pass; read once, whichever thread asks first."""
        with self._reading:  # functools.cached_property would let no two pipelines read at a time
            if self._rows is None:
                once = {"shuffle": False, "num_epochs": 1, "try_in_mem_cache": False}
                self._rows = [_read(self.dataset(task, **once), f"{task.name}/{self.split}") for task in self._sources]
            return self._rows

    def _materialised(self, start_step: int, batch_size: int, part: slice) -> Iterator[Arrays]:
        """The rows ``part`` of each batch of ``batch_size``; no others are gathered."""
        arrays = self._arrays
        orders = [Order(len(next(iter(a.values()))), self.seed, self.shuffle) for a in arrays]
        mixture = len(arrays) > 1
        if mixture and not self.repeat:
            raise UserError(
                f"{self.provider.name} is a mixture, which has no end: evaluate its tasks one by one"
            )
        rates = tuple(self.provider.get_rate(task) for task in self._sources) if mixture else ()
        mixed = Mixed(tuple(orders), rates, self.seed)
        steps = itertools.count(start_step) if self.repeat else range(start_step, self.steps_per_pass)
        for step in steps:
            positions = step * batch_size + np.arange(part.start, part.stop)
            if mixture:
                yield _gather_mixed(arrays, *mixed.at(positions))
            elif self.repeat:
                yield _gather(arrays[0], orders[0].at(positions))
            else:
                here = orders[0].at(positions[positions < orders[0].count])
                yield _filled(_gather(arrays[0], here), len(positions))

    def _streamed(self, start_step: int, batch_size: int, part: slice) -> Iterator[Arrays]:
        """The rows ``part`` of each batch of ``batch_size``.

        A process prepares all rows of it: what comes before may drop, split and shuffle examples, so that a row's place
        in the batch is known only when nothing is left to do to it.
        """
        ds = self.dataset(shuffle=self.shuffle, num_epochs=None if self.repeat else 1)
        ds = ds.batch(batch_size).skip(start_step).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        with user_errors():
            for arrays in ds.with_options(options).as_numpy_iterator():
                yield {name: array[part] for name, array in _filled(arrays, batch_size).items()}


def _leave_accelerators_to_jax() -> None:
    """TensorFlow takes all memory of the GPUs it sees; here it only reads data."""
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):  # devices are in use already: whoever started them chose so
            tf.config.set_visible_devices([], kind)


def _read(ds: tf.data.Dataset, name: str) -> Arrays:
    """All rows of a finite dataset, field by field."""
    with user_errors():
        parts = list(ds.batch(_READ).as_numpy_iterator())
    if not parts:
        raise UserError(f"{name} has no examples")
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}


def _gather(arrays: Arrays, rows: np.ndarray) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}


def _gather_mixed(arrays: list[Arrays], source: np.ndarray, rows: np.ndarray) -> Arrays:
    out = {name: np.empty((len(rows), *a.shape[1:]), a.dtype) for name, a in arrays[0].items()}
    for s in np.unique(source):
        here = source == s
        for name, array in arrays[s].items():
            out[name][here] = array[rows[here]]
    return out


def _filled(arrays: Arrays, size: int) -> Arrays:
    """Fills a last, partial batch with zero rows, whose example id is -1."""
    missing = size - len(next(iter(arrays.values())))
    if not missing:
        return arrays
    filled = {
        name: np.concatenate([a, np.zeros((missing, *a.shape[1:]), a.dtype)]) for name, a in arrays.items()
    }
    if "example_ids" in filled:
        filled["example_ids"][-missing:] = -1
    return filled
