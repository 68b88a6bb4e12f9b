"""Fixtures which several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fanin_compile import rewriting


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Dynamo without graphs of other tests, and warnings that were given once before."""
    torch._dynamo.reset()
    rewriting.warn_once.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads as it was before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
