"""Voxels that lie in a file in one piece."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class MappedArray:
    """An array that reads what is sliced.

    The file is mapped to memory for each read anew, because what was read through a mapping counts as memory of the
    process until the mapping is closed.

    Args:
        open_map: maps the file and returns the array, of any shape and type.
    """

    def __init__(self, open_map: Callable[[], NDArray[Any]]) -> None:
        whole = open_map()
        self.open_map, self.shape, self.dtype = open_map, whole.shape, whole.dtype

    def __getitem__(self, where: Any) -> NDArray[Any]:
        return np.array(self.open_map()[where])
