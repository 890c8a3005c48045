"""Parse compiled HLO text into computations and instructions, as far as the cost model needs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: element type, dimensions, and the memory space that holds it.

    Memory space 0 is the device's main memory (HBM), 5 is the host's, and others are on chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without tile padding; token and opaque types take none."""
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype, 0)
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        arrays: the result's arrays, tuples flattened.
        operands: names of instructions of the same computation.
        called: role (``body``, ``calls``, ...) -> computation names.
        attributes: the text after the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    attributes: str
    arguments: str
    root: bool = False

    @functools.cached_property
    def config(self) -> dict:
        """The backend config; empty if there is none."""
        at = self.attributes.find("backend_config=")
        if at < 0:
            return {}
        text = self.attributes[at + len("backend_config=") :]
        try:
            value, _ = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}

    @functools.cached_property
    def notes(self) -> dict[str, str]:
        """The metadata given to a Triton kernel's ``pallas_call``; empty if there is none."""
        found = re.search(r'serialized_metadata = "([^"]*)"', self.attributes)
        return json.loads(found.group(1).replace(r"\22", '"')) if found else {}

    @property
    def cycles(self) -> int | None:
        """XLA's estimate for one run of this instruction."""
        value = self.config.get("window_config", {}).get("estimated_cycles")
        return None if value is None else int(value)

    @property
    def source(self) -> str:
        """The JAX operation that produced it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, key: str) -> str | None:
        """Return a plain attribute's text, such as ``direction`` or ``custom_call_target``."""
        found = re.search(rf'\b{key}="?([^",\s]+)', self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in program order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Parse all arrays in a shape's text, such as ``(f32[2,3]{1,0:S(1)}, s8[4])``."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
        space = _SPACE.search(layout)
        out.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(out)


def _closing(text: str, at: int) -> int:
    """Return the index after the bracket that closes the one at ``at``; strings are skipped."""
    depth, quoted, i = 0, False, at
    while i < len(text):
        c = text[i]
        if quoted:
            i += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return i + 1
        i += 1
    raise ValueError(f"unbalanced brackets in HLO line: {text[at : at + 80]}")


def parse_instruction(line: str) -> Instruction | None:
    """Parse one line; return ``None`` if it is not an instruction."""
    head = _LINE.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    open_at = rest.index("(")
    close = _closing(rest, open_at)
    opcode, inside, attributes = rest[:open_at], rest[open_at + 1 : close - 1], rest[close:]
    operands = () if opcode in ("parameter", "constant") else tuple(_NAME.findall(inside))
    called: dict[str, tuple[str, ...]] = {k: (v,) for k, v in _CALLED.findall(attributes)}
    branches = _BRANCHES.search(attributes)
    if branches:
        called["branches"] = tuple(n.strip().lstrip("%") for n in branches.group(1).split(","))
    return Instruction(
        head.group(2), opcode, parse_arrays(shape), operands, called, attributes, inside,
        bool(head.group(1)),
    )  # fmt: skip


def parse(text: str) -> Module:
    """Parse ``compiled.as_text()`` into a :class:`Module`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = Computation(head.group(2), {})
            computations[current.name] = current
            entry = current if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = parse_instruction(line)
            if instruction:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: this is not a compiled HLO module's text")
    return Module(computations, entry)


def trip_count(module: Module, loop: Instruction) -> int:
    """Return a ``while``'s trip count: the compiler's note, or the bound tested by its condition.

    Raises:
        ValueError: neither is known; a guess would make every sum wrong.
    """
    noted = loop.config.get("known_trip_count", {}).get("n")
    if noted is not None:
        return int(noted)
    condition = module.computations[loop.called["condition"][0]]
    test = condition.root
    if test.opcode == "fusion":  # the comparison, and possibly its constant, are inside the fusion
        inner = module.computations[test.called["calls"][0]]
        outer = [condition.instructions[n] for n in test.operands]
        test, condition = inner.root, inner
    else:
        outer = []
    bounds = []
    for name in test.operands:
        value = condition.instructions[name]
        if value.opcode == "parameter" and outer:
            value = outer[int(value.arguments)]
        if value.opcode == "constant":
            bounds.append(int(value.arguments))
    # lax.scan counts from zero in steps of one.
    if test.opcode == "compare" and test.attribute("direction") == "LT" and len(bounds) == 1:
        return bounds[0]
    raise ValueError(f"no trip count for loop %{loop.name}")
