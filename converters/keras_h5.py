"""Tensors in the HDF5 files that Keras writes: read one by one, and only where they lie plainly in the file itself.

HDF5 can also point elsewhere: links to other files, datasets in other files or put together from several, references to
objects. Keras writes none of them, and none is followed here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import torch
from torch import Tensor

from core.errors import UserError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
DTYPES = {"<f4": torch.float32, "<f2": torch.float16}
LONGEST = 1 << 20  # entries of a group; the largest Gemma has a hundred


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """
    Raises:
        UserError: the file is missing or damaged, also where that shows later, while it is read.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    # h5py turns the errors of HDF5 into whichever of Python's it finds nearest.
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a whole HDF5 file of Keras ({type(error).__name__}: {error})") from None


def dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """The dataset `name` (`layers/…/vars/0`), or None where there is none.

    Raises:
        UserError: it does not lie in this file, or is no plain array of 16 or 32-bit floats.
    """
    found: h5py.Group | h5py.Dataset = file
    for step in name.split("/"):
        if not isinstance(found, h5py.Group) or step not in found:
            return None
        if not isinstance(found.get(step, getlink=True), h5py.HardLink):
            raise UserError(f"{file.filename}: {name} is a link to elsewhere, which is not followed")
        found = found[step]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual or found.chunks is not None:
        raise UserError(f"{file.filename}: {name} is no plain array in this file")
    if found.id.get_storage_size() != found.size * found.dtype.itemsize:
        raise UserError(f"{file.filename}: {name} is not stored whole")
    return found


def dtype_of(found: h5py.Dataset) -> torch.dtype:
    # bfloat16, which HDF5 does not know, stands as two opaque bytes with its name in an attribute.
    if found.dtype.kind == "V" and found.dtype.itemsize == 2 and found.attrs.get("dtype") == "bfloat16":
        return torch.bfloat16
    dtype = DTYPES.get(found.dtype.str)
    if dtype is None:
        raise UserError(f"{found.file.filename}: {found.name} is of {found.dtype}, not of 16 or 32-bit floats")
    return dtype


def tensor_of(found: h5py.Dataset) -> Tensor:
    """
    Raises:
        UserError: it is of another type, or holds a value that is infinite or not a number.
    """
    dtype = dtype_of(found)
    into = torch.empty(found.shape, dtype=dtype)
    raw = into.view(torch.int16).numpy().view(found.dtype) if dtype == torch.bfloat16 else into.numpy()
    if found.size:
        found.read_direct(raw)
    if not torch.isfinite(into).all():
        raise UserError(f"{found.file.filename}: {found.name} holds a value that is infinite or not a number")
    return into


def write_tensor(file: h5py.File, name: str, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        file.create_dataset(name, data=tensor.view(torch.int16).numpy().view("V2"))
        file[name].attrs["dtype"] = "bfloat16"
    else:
        file.create_dataset(name, data=tensor.numpy())
