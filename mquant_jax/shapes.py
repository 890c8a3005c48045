"""Array types for annotations: ``Float[Array, "B T hidden"]`` is a float array of three axes.

The strings are in jaxtyping's language: ``*batch`` stands for any number of axes, ``_`` for any one
axis, ``{n}`` for an argument, ``""`` for no axis; equal names in one signature are equal lengths. A
single name begins with a space, which keeps linters from reading it as a type. Here all of these
are ``typing.Annotated``, so that nothing is checked and jaxtyping need not be there.
``tests/checked_shapes.py`` puts jaxtyping in this module's place.
"""

from typing import Annotated as BFloat16
from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Float32
from typing import Annotated as Float64
from typing import Annotated as Int
from typing import Annotated as Int8
from typing import Annotated as Int32
from typing import Annotated as Num
from typing import Annotated as Shaped
from typing import Annotated as UInt8

from jax import Array

__all__ = [
    "Array", "BFloat16", "Bool", "Float", "Float32", "Float64", "Int", "Int8", "Int32", "Num",
    "Shaped", "UInt8",
]  # fmt: skip
