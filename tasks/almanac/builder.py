"""The almanac as a TensorFlow Datasets builder: generates the world and writes its splits."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os

import numpy as np
import tensorflow_datasets as tfds

from tasks.almanac.config import AlmanacConfig
from tasks.almanac.examples import splits
from tasks.almanac.world import World

VERSION = "1.1.0"  # of what the same configuration generates


@dataclasses.dataclass(eq=False, repr=False)
class AlmanacBuilderConfig(tfds.core.BuilderConfig):
    """A world's configuration under a name of its own, so that different worlds share one data directory.

    Attributes:
      world: the configuration.
    """

    world: AlmanacConfig = AlmanacConfig()

    @classmethod
    def of(cls, world: AlmanacConfig) -> AlmanacBuilderConfig:
        """Names the configuration by entities, seed and digest of all fields."""
        name = f"e{world.num_entities}_s{world.seed}_{world.digest}"
        return cls(name=name, description=f"{world.num_entities} entities, seed {world.seed}", world=world)


class Almanac(tfds.core.GeneratorBasedBuilder):
    """A generated world's examples.

    Splits: train_closed_book, train_open_book_<lesson>, train_retriever, gate, validation, test_edition_1,
    test_edition_2. All have the same features (see ``examples.py``). Files keep the order of generation,
    which is random already. Needs no network.
    """

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [AlmanacBuilderConfig(name="default", description="The default world.")]

    # Nothing is downloaded, so there are no checksums to look for beside this file.
    url_infos = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="A world generated from a seed: closed-book, open-book, retriever and gate examples.",
            features=tfds.features.FeaturesDict(
                {
                    "id": np.int64,
                    "question": tfds.features.Text(),
                    "answers": tfds.features.Sequence(tfds.features.Text()),
                    "relation": np.int32,
                    "entity": np.int32,
                    "stratum": tfds.features.Text(),
                    "asked": np.int32,
                    "weight": np.float32,
                    "changed": np.int32,
                    "passages": tfds.features.Sequence(
                        {
                            "title": tfds.features.Text(),
                            "text": tfds.features.Text(),
                            "relevance": np.float32,
                        }
                    ),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        world = World(self.builder_config.world)
        return {split: enumerate(examples) for split, examples in splits(world).items()}

    def _generate_examples(self, examples):
        return examples


def tfds_name(config: AlmanacConfig) -> str:
    """The name by which ``tfds.load`` and ``seqio.TfdsDataSource`` find a prepared world in its data_dir."""
    return f"{Almanac.name}/{AlmanacBuilderConfig.of(config).name}:{VERSION}"


def prepare(
    config: AlmanacConfig, data_dir: str | os.PathLike, progress: bool = True
) -> tfds.core.DatasetBuilder:
    """Writes the splits below ``data_dir`` unless they are there, and returns the builder.

    Args:
      config: the world.
      data_dir: TFDS's data directory; the world gets a folder of its own in it, complete or absent.
      progress: whether TFDS may print its progress.

    Raises:
      AlmanacError: the configuration cannot be satisfied; nothing is written.
    """
    World(config).popularity  # noqa: B018 - its checks run before TFDS creates a directory
    builder = Almanac(config=AlmanacBuilderConfig.of(config), data_dir=os.fspath(data_dir))
    download_config = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.ExitStack() as stack:
        if not progress:
            tfds.disable_progress_bar()
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        builder.download_and_prepare(download_config=download_config)
    return builder
