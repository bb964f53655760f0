"""Packaging: the library, its SeqIO tasks, its gin files and the `expertrag` command.

The exact versions that were run stand in constraints.txt: `pip install -c constraints.txt -e .[test]`.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "expertrag_jax/__init__.py").read_text()).group(1)
README = HERE / "README.md"

# TensorFlow Text and ScaNN have wheels for Linux x86-64 only, and SeqIO needs TensorFlow Text. Elsewhere the
# core installs without them: it trains from saved batches and searches with the exact index.
ON_LINUX_X86 = "; sys_platform == 'linux' and platform_machine == 'x86_64'"

CORE = [
    "jax>=0.10,<0.12",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "flatbuffers>=24.3",  # jax.export writes its programs with it
    "numpy>=2.0",
    "scipy>=1.14",
    "gin-config>=0.5,<0.6",
    "sentencepiece>=0.2.1,<0.3",
    "bm25s>=0.3,<0.4",
    "PyStemmer>=3.0,<4",
    "regex>=2024.11",
    "tensorboardX>=2.6.4,<3",  # writes TensorBoard files without TensorFlow
    "absl-py>=2.1",
    "annotated-types>=0.7,<1",
    "matplotlib>=3.9,<4",
    "rich>=13.7",
    "tqdm>=4.66",
]
DATA = [
    "tensorflow>=2.20,<2.21",  # ScaNN's operations load beside 2.20 only
    "tensorflow-text>=2.20,<2.21",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources>=6.4",  # TensorFlow Datasets 4.9.10 imports it without requiring it
    "seqio>=0.0.20,<0.1",
    "scann>=1.4.2,<1.5",
]

setup(
    name="expertrag_jax",
    version=VERSION,
    description="Sharded training of retrieval-augmented mixture-of-experts models in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # gin/ holds no Python (an __init__.py there would hide gin-config) and is installed inside the package.
    packages=find_packages(include=["expertrag_jax", "expertrag_jax.*", "tasks", "tasks.*"])
    + ["expertrag_jax.gin"],
    package_dir={"expertrag_jax.gin": "gin"},
    package_data={
        "expertrag_jax.gin": ["*.gin", "**/*.gin"],
        "expertrag_jax": ["**/*.json"],
        "tasks": ["**/*.json", "**/*.txt", "**/*.tsv"],
    },
    install_requires=CORE + [requirement + ON_LINUX_X86 for requirement in DATA],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # Beam's protobuf agrees with this SentencePiece, constraints.txt has another: leave it out for Beam.
        "beam": ["apache-beam", "sentencepiece==0.2.1", "google-crc32c"],
        "t5x": ["t5x @ git+https://github.com/google-research/t5x"],  # not on the package index
        "hf": ["transformers>=5,<6", "torch>=2.9"],  # tests beside Hugging Face's RAG; torch for the CPU is enough
        "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["expertrag = expertrag_jax.main:main"]},
)
