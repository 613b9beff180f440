"""Registration of custom operators, in a namespace of their own for each copy of this code in a process.

Every checkpoint brings its copy of the code. Registering one name twice makes torch free the first operator, which the
first model goes on calling: memory that is no longer its own, and at best the code of another version.
"""

import zlib
from collections.abc import Callable

import torch

_COPY = (__package__ or "").removesuffix(".kernels")
NAMESPACE = "complexity_deep" if _COPY == "complexity_deep" else f"complexity_deep_{zlib.crc32(_COPY.encode()):08x}"


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """`torch.library.custom_op` of this copy: `name` without a namespace."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates_args)
