"""Tiny models for the tests of the native layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import random_model
from mtpbatch.native import Model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random hybrid model with an MTP head that is right about half of the time."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    shape = dataclasses.replace(random_model.RANDOM_SHAPE, vocab=300, width=64, ff=64, layers=2)
    random_model.write_random(path, shape, mix=0.3, seed=1)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Model]:
    """That model, loaded once: contexts of different tests do not touch each other."""
    with Model(tiny_path) as model:
        yield model


@pytest.fixture(scope="session")
def dense(dense_path: Path) -> Iterator[Model]:
    """An attention-only model without MTP heads."""
    with Model(dense_path) as model:
        yield model


@pytest.fixture(scope="session")
def demo(demo_f32_path: Path) -> Iterator[Model]:
    """The real hybrid model."""
    with Model(demo_f32_path) as model:
        yield model


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Attention alone, and an MTP head."""
    path = tmp_path_factory.mktemp("models") / "glm.gguf"
    random_model.write_random_glm4moe(path, vocab=300, mix=0.3)
    with Model(path) as model:
        yield model
