"""Arrays that numpy stored (.npy), as volumes to convert."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from lsdseg.data_utils.formats import Source, Volume
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.mapped import MappedArray
from lsdseg.errors import UserError


@contextmanager
def open_npy(path: Path) -> Iterator[Source]:
    """Open an array with three axes.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    try:
        load = partial(np.load, path, mmap_mode="r", allow_pickle=False)
        data = load()
    except Exception as error:  # ValueError, EOFError, tokenize.TokenError and others, whatever is wrong
        raise UserError(f"{path} is no array of numpy or damaged ({str(error)[:100]}): use another copy") from error
    if not isinstance(data, np.ndarray) or data.ndim != 3 or data.size == 0 or data.dtype.kind not in "buif":
        what = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else "no single array"
        raise UserError(f"{path} holds {what}: store numbers with the axes z, y, x")
    yield Source([Volume(RAW, MappedArray(load), {}, lambda: path.stat().st_size, data.shape)], [])
