from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

version: str
compiler: str
cuda: str
cuda_archs: str
header_fields: dict[str, int]

def compile_pattern(mask: NDArray[np.bool_], block: Sequence[int], groups: int = 1) -> list[NDArray[np.generic]]: ...
