"""The whole package: light to import, imports in one direction only, no torch, no pickle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [p for top in ("mquant_jax", "models", "convert") for p in (ROOT / top).rglob("*.py")]
USERS = [p for top in ("benchmarks", "examples", "tests") for p in (ROOT / top).rglob("*.py")]

# Lowest floor first; a module may import from its own floor and those below it.
FLOORS = (
    ("mquant_jax.shapes", "mquant_jax.per_layer", "mquant_jax.numerics", "mquant_jax.hadamard",
     "mquant_jax.recipe", "mquant_jax.recipe_fields",
     "mquant_jax.sections", "mquant_jax.presets",
     "mquant_jax.errors", "mquant_jax.samples", "mquant_jax.sample_rows", "mquant_jax.schema",
     "mquant_jax.files", "mquant_jax.validate", "mquant_jax.cli_support",
     "mquant_jax.compile_cache", "mquant_jax.cpu_features", "mquant_jax.target",
     "mquant_jax.stages",
     "mquant_jax.lazy", "mquant_jax.runtime.buckets"),
    ("mquant_jax.ops",),
    ("mquant_jax.nn",),
    ("mquant_jax.models",),
    ("mquant_jax.ptq", "mquant_jax.runtime", "mquant_jax.checkpoint", "mquant_jax.loading",
     "mquant_jax.layer_plan"),
    ("mquant_jax.report",),
    ("mquant_jax.api",),
    ("mquant_jax.eval", "mquant_jax.adapters", "mquant_jax.serve"),
    ("mquant_jax.cli", "mquant_jax.commands", "mquant_jax.__main__"),
    ("convert",),
)  # fmt: skip


def floor(module: str) -> int | None:
    for i, names in enumerate(FLOORS):
        if any(module == n or module.startswith(n + ".") for n in names):
            return i
    return None


def module_name(path: Path) -> str:
    """The import name of a source file; the folder ``models`` is ``mquant_jax.models``."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"mquant_jax.{name}" if name.split(".")[0] == "models" else name


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_imports_run_downward() -> None:
    upward = []
    for path in SOURCES:
        name = module_name(path)
        own = floor(name)
        if own is None:
            assert name == "mquant_jax", f"{name} stands on no floor"
            continue
        upward += [(name, m) for m in imports(path) if (floor(m) or 0) > own]
    assert not upward


def test_one_namespace() -> None:
    """The package must not import ``models``: that would load every class twice, and a user's own
    ``models.py`` would shadow it. Nor ``convert``, which only holds command lines."""
    for path in SOURCES + USERS:
        tops = {m.split(".")[0] for m in imports(path)}
        assert "models" not in tops, path
        assert "convert" not in tops or not path.is_relative_to(ROOT / "mquant_jax"), path
        assert "convert" not in tops or not path.is_relative_to(ROOT / "models"), path


def test_only_families_name_families() -> None:
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "models"):
            family = re.compile(r"mquant_jax\.models\.(?!base|images|registry|rules|streams)\w")
            assert not [m for m in imports(path) if family.match(m)], path


def test_no_torch_and_no_pickle() -> None:
    for path in SOURCES:
        assert not {"torch", "torchvision", "pickle", "requests"} & imports(path), path


def _text_without_encoding(node: ast.AST) -> bool:
    """Whether a call reads or writes text in the locale's encoding."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    given = {k.arg for k in node.keywords}
    if name in ("read_text", "write_text"):
        return "encoding" not in given and len(node.args) < (1 if name == "read_text" else 2)
    is_file = getattr(getattr(node.func, "value", None), "id", None) not in ("Image", "os")
    texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    binary = any("b" in mode for mode in texts if set(mode) <= set("rwxabt+"))
    return name == "open" and is_file and not binary and "encoding" not in given


def test_text_files_have_an_encoding() -> None:
    for path in (*SOURCES, *(p for p in USERS if not p.is_relative_to(ROOT / "tests"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [node.lineno for node in ast.walk(tree) if _text_without_encoding(node)]
        assert not lines, f"{path}: line {lines}"


def test_importing_the_package_is_light() -> None:
    heavy = "{'jax', 'flax', 'transformers'}"
    code = f"import sys, mquant_jax; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr
