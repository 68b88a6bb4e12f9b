"""oneMKL's inspector-executor sparse routines as a peer, through ctypes, where the `mkl` wheel is installed."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_OPERATION_NON_TRANSPOSE = 10
_LAYOUT_ROW_MAJOR, _LAYOUT_COLUMN_MAJOR = 101, 102


class _Descr(ctypes.Structure):
    """matrix_descr of a general matrix."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


_GENERAL = _Descr(20, 0, 0)


@functools.cache
def library() -> ctypes.CDLL | None:
    """libmkl_rt of the `mkl` wheel, sequential for one thread; None where it is not installed."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.startswith("libmkl_rt.so"):
            return ctypes.CDLL(str(Path(str(file.locate())).resolve()))
    return None


def _call(name: str, *args: object) -> None:
    mkl = library()
    assert mkl is not None
    status = getattr(mkl, name)(*args)
    if status:
        raise RuntimeError(f"oneMKL's {name} returned status {status}")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def onemkl(model: nn.Module, x: Tensor) -> Callable[[], Tensor] | None:
    """mkl_sparse_s_mv for one batch row, mkl_sparse_s_mm for more, on x and y as they are; torch adds the bias."""
    mkl = library()
    if mkl is None or not isinstance(model, nn.Linear):
        return None
    mkl.MKL_Set_Num_Threads(torch.get_num_threads())
    weight = model.weight.detach()
    csr = weight.to_sparse_csr()
    rows, columns = weight.shape
    start, index = csr.crow_indices().int(), csr.col_indices().int()
    values = csr.values().contiguous()
    handle = ctypes.c_void_p()
    ends = ctypes.c_void_p(start.data_ptr() + start.element_size())
    _call(
        "mkl_sparse_s_create_csr",
        *(ctypes.byref(handle), 0, rows, columns, _pointer(start), ends, _pointer(index), _pointer(values)),
    )
    batch, one, zero = x.shape[0], ctypes.c_float(1), ctypes.c_float(0)
    hint = (handle, _OPERATION_NON_TRANSPOSE, _GENERAL)
    if batch == 1:
        _call("mkl_sparse_set_mv_hint", *hint, 1000)
    else:
        _call("mkl_sparse_set_mm_hint", *hint, _LAYOUT_COLUMN_MAJOR, batch, 1000)
    _call("mkl_sparse_optimize", handle)
    y, bias = x.new_empty(batch, rows), model.bias.detach()
    args: list[object]
    if batch == 1:
        run, args = mkl.mkl_sparse_s_mv, [one, handle, _GENERAL, _pointer(x), zero, _pointer(y)]
    else:
        # x [batch, in] by rows is [in, batch] by columns
        run = mkl.mkl_sparse_s_mm
        shape = (_LAYOUT_COLUMN_MAJOR, _pointer(x), batch, columns)
        args = [one, handle, _GENERAL, *shape, zero, _pointer(y), rows]

    def product(_pointed_to: object = (start, index, values)) -> Tensor:
        run(_OPERATION_NON_TRANSPOSE, *args)
        return y + bias

    return product
