"""Array types for annotations: ``Float[Array, "B T hidden"]`` is a float array of three axes.

The strings are jaxtyping's: equal names in one signature are equal lengths, ``*batch`` stands for
any number of axes, ``_`` for one, ``{n}`` for an argument, and ``""`` says that there is no axis. A
string that is also a Python expression begins with a space, or linters would read it as a type.

Here all of these are ``typing.Annotated``: nothing is checked, and jaxtyping is not needed. In
tests jaxtyping takes this module's place, see ``tests/checked_shapes.py``.
"""

from typing import Annotated as BFloat16
from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Float32
from typing import Annotated as Float64
from typing import Annotated as Int
from typing import Annotated as Int4
from typing import Annotated as Int8
from typing import Annotated as Int32
from typing import Annotated as Num
from typing import Annotated as Shaped
from typing import Annotated as UInt8

from jax import Array

__all__ = [
    "Array", "BFloat16", "Bool", "Float", "Float32", "Float64", "Int", "Int4", "Int8", "Int32",
    "Num", "Shaped", "UInt8",
]  # fmt: skip
