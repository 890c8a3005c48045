"""The kinds of cases: what is damaged, and which reader it is fed to."""

from __future__ import annotations

import io
import json
import struct
import zlib
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import mquant_jax as mq
from benchmarks.fuzz.bed import CHECKPOINTS, CONFIGS, PROCESSORS, Bed, family_of
from benchmarks.fuzz.damage import NAMES, VALUES, damaged_bytes, damaged_json
from benchmarks.fuzz.pool import case_random
from benchmarks.fuzz.templates import hostile_template
from mquant_jax.checkpoint.check import examine
from mquant_jax.checkpoint.manifest import MANIFEST, Verify, content_hash
from mquant_jax.checkpoint.plan import plan, read_config
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.checkpoint.source import INDEX, SINGLE, Reader
from mquant_jax.layer_plan import target_model
from mquant_jax.models.images import load_image
from mquant_jax.models.registry import family_for
from mquant_jax.presets import RECIPES, resolve_recipe
from mquant_jax.ptq.calibration_data import with_answer
from mquant_jax.ptq.convert import check_ties
from mquant_jax.samples import each, read_samples

# Keys known to readers that the files do not have.
_KEYS = {
    "config.json": (
        "rope_scaling", "rope_parameters", "head_dim", "tie_word_embeddings", "eos_token_id",
        "sliding_window", "layer_types", "quantization_config", "text_config", "vision_config",
        "partial_rotary_factor", "attention_bias", "template", "auto_map",
    ),
    "preprocessor_config.json": (
        "size", "crop_size", "min_pixels", "max_pixels", "image_mean", "image_std", "norm_mean",
        "patch_size", "merge_size", "temporal_patch_size", "min_patches", "max_patches",
        "max_slice_nums", "do_rescale", "do_resize", "rescale_factor", "resample",
        "image_processor_type",
    ),
    "processor_config.json": ("image_processor", "video_processor", "chat_template"),
    "generation_config.json": ("eos_token_id", "chat_format", "max_window_size", "temperature"),
    "tokenizer.json": ("added_tokens", "normalizer", "post_processor", "truncation", "padding"),
    "tokenizer_config.json": (
        "chat_template", "added_tokens_decoder", "bos_token", "pad_token", "tokenizer_class",
        "model_max_length", "add_bos_token", "extra_special_tokens", "additional_special_tokens",
        "padding_side", "auto_map", "clean_up_tokenization_spaces",
    ),
}  # fmt: skip
# Optional files of a folder.
_MORE = {
    "processor_config.json": {"image_processor": {"size": {"shortest_edge": 784}}},
    "video_preprocessor_config.json": {"patch_size": 14, "size": {"longest_edge": 9000}},
    "generation_config.json": {"eos_token_id": [1, 2], "do_sample": True},
    "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "x"},
    "added_tokens.json": {"<extra>": 399},
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "qwen.tiktoken",
                    "vocab.json", "merges.txt", "special_tokens_map.json",
                    "added_tokens.json")  # fmt: skip
_SETTINGS = ("preprocessor_config.json", "processor_config.json", "generation_config.json",
             "video_preprocessor_config.json")  # fmt: skip
Notes = list[str]


def run_case(case: int, seed: int, bed: Bed, notes: Notes) -> None:
    """Damage an input of the case's kind and read it; append to ``notes`` what was done."""
    KINDS[kind_of(case)](case_random(seed, case), bed, notes)


def kind_of(case: int) -> str:
    """Return the kind of a case; kinds take turns."""
    return list(KINDS)[case % len(KINDS)]


def _header(rng: Random, bed: Bed, notes: Notes) -> None:
    folder = bed.root / "tiny"
    _damage_tensors(rng, bed, folder / SINGLE, notes)
    _read_source(folder)
    if rng.random() < 1 / 200:
        _convert(bed, folder, "float")


def _index(rng: Random, bed: Bed, notes: Notes) -> None:
    folder = bed.root / "sharded"
    shards = sorted(folder.glob("*.safetensors"))
    target = rng.choice((folder / INDEX, folder / INDEX, rng.choice(shards)))
    if target.name == INDEX:
        _damage_file(rng, bed, target, notes)
    else:
        _damage_tensors(rng, bed, target, notes)
    _read_source(folder)


def _config(rng: Random, bed: Bed, notes: Notes) -> None:
    folder = bed.root / "configs" / rng.choice(CONFIGS).replace("/", "-")
    _damage_file(rng, bed, folder / "config.json", notes)
    family, todo, _ = _read_source(folder)
    if rng.random() < 0.1:
        target_model(family, todo.config, RECIPES["float"])
    if rng.random() < 1 / 200:
        _convert(bed, folder, "float")


def _tokenizer(rng: Random, bed: Bed, notes: Notes) -> None:
    _try_processor(rng, bed, notes, _TOKENIZER_FILES)


def _preprocessor(rng: Random, bed: Bed, notes: Notes) -> None:
    _try_processor(rng, bed, notes, _SETTINGS)


def _try_processor(rng: Random, bed: Bed, notes: Notes, names: tuple[str, ...]) -> None:
    folder = bed.root / "processors" / rng.choice(PROCESSORS)
    family, config = family_of(folder)
    files = [n for n in names if (folder / n).exists()] + [n for n in names if n in _MORE]
    _damage_file(rng, bed, folder / rng.choice(files), notes)
    family.check_processor(folder, config)


def _template(rng: Random, bed: Bed, notes: Notes) -> None:
    folder = bed.root / "tiny"
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    source = hostile_template(rng, config["chat_template"])
    named = [{"name": rng.choice(("default", "tool_use", 3)), "template": source}]
    value = rng.choice((source, source, source, named, {"default": source}, [source]))
    name = rng.choice(("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
    notes.append(f"{name}: {source[:300]!r}")
    if name == "chat_template.jinja":
        bed.put(folder / name, source.encode("utf-8", "surrogatepass"))
    else:
        base = config if name == "tokenizer_config.json" else {}
        bed.put(folder / name, json.dumps(base | {"chat_template": value}).encode())
    family, config = bed.family
    processor = family.processor(folder, config)
    processor.prompt("Hello")
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    processor.messages(said)


def _recipe(rng: Random, bed: Bed, notes: Notes) -> None:
    data = json.dumps(RECIPES[rng.choice(list(RECIPES))].to_json()).encode()
    path = bed.scratch("recipe.json")
    path.write_bytes(data)
    _damage_file(rng, bed, path, notes)
    recipe = resolve_recipe(str(path))
    folder = bed.root / "tiny"
    if rng.random() < 0.3:
        family, todo, _ = _read_source(folder)
        target_model(family, todo.config, recipe)
    if rng.random() < 1 / 60:
        _convert(bed, folder, recipe)


def _calibration(rng: Random, bed: Bed, notes: Notes) -> None:
    folder = bed.root / "samples"
    path = folder / rng.choice(("samples.jsonl",) * 4 + ("samples.npz", "cat.png"))
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        lines = path.read_bytes().splitlines()
        at = rng.randrange(len(lines))
        note, lines[at] = damaged_json(rng, lines[at], ("images", "messages", "conversations"))
        notes.append(f"line {at + 1}: {note}")
        bed.put(path, b"\n".join(lines))
    else:
        _damage_file(rng, bed, path, notes)
    limit = rng.choice((None, None, 1))
    samples = read_samples(folder / "samples.jsonl", limit)
    each(samples, lambda sample: with_answer(sample, bed.processor))


def _picture(rng: Random, bed: Bed, notes: Notes) -> None:
    files = sorted((bed.root / "pictures").iterdir())
    path = rng.choice(files)
    if rng.random() < 0.15:
        load_image(_no_picture(rng, path, notes), "image 0")
        return
    data = path.read_bytes()
    change = _damaged_png if path.suffix == ".png" and rng.random() < 0.5 else damaged_bytes
    note, data = change(rng, data)
    notes.append(f"{path.name}: {note}")
    forms: dict[str, Callable[[], Any]] = {
        "bytes": lambda: data,
        "file": lambda: io.BytesIO(data),
        "url": lambda: "data:image/png;base64," + b64encode(data).decode(),
        "path": lambda: _placed(bed, data, rng.choice((path.suffix, ".png", ".eps", ""))),
    }
    form = rng.choice(list(forms))
    notes.append(form)
    load_image(forms[form](), "image 0")


def _placed(bed: Bed, data: bytes, suffix: str) -> Path:
    path = bed.scratch("picture" + suffix)
    path.write_bytes(data)
    return path


def _no_picture(rng: Random, path: Path, notes: Notes) -> Any:
    """Return a value that a caller may pass by mistake."""
    name = rng.choice(NAMES)
    array = np.full(rng.choice(((4, 4), (4, 4, 3), (0, 4), (4,), (2, 2, 2, 3), (4, 4, 2))),
                    rng.choice((0, 7, 0.5, -1, np.nan, 1e30, True)))  # fmt: skip
    choices = (
        name, f"{path}{name}", path.parent / name.replace("\0", "0"), "data:" + name,
        "data:image/png;base64," + name, json.loads(rng.choice(VALUES[:19])), array,
        array.astype(np.float16), open, object(), rng.randbytes(50),
    )  # fmt: skip
    value = rng.choice(choices)
    notes.append(f"given {repr(value)[:80]}")
    return value


def _damaged_png(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Change a chunk, huge image sizes included, and correct its checksum."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    if kind == b"IHDR" and rng.random() < 0.5:
        side = [rng.choice((0, 1, 10_000, 13_000, 65_535, 2**31 - 1)) for _ in range(2)]
        note, body = f"size {side}", struct.pack(">II", *side) + body[8:]
    elif rng.random() < 0.2:
        kind, body = b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))
        note = "a large text"
    else:
        note, body = damaged_bytes(rng, body)
    chunks.insert(i, (kind, body)) if rng.random() < 0.2 else chunks.__setitem__(i, (kind, body))
    out = data[:8]
    for name, content in chunks:
        check = zlib.crc32(name + content).to_bytes(4, "big")
        out += len(content).to_bytes(4, "big") + name + content + check
    return f"{kind.decode('latin-1')}: {note}", out


def _converted(rng: Random, bed: Bed, notes: Notes) -> None:
    folder = bed.root / rng.choice(CHECKPOINTS)
    verify: Verify = rng.choice((True, "tensors", False))
    notes.append(f"{folder.name}, verify={verify}")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = folder / MANIFEST
    target = rng.choice((manifest, manifest, rng.choice(files), rng.choice(files)))
    before = target.read_bytes()
    if target.suffix == ".safetensors":
        _damage_tensors(rng, bed, target, notes)
    elif target == manifest and folder.name != "v2" and rng.random() < 0.6:
        _reseal(rng, bed, manifest, notes)
    else:
        _damage_file(rng, bed, target, notes)
    changed = target.is_symlink() or not target.is_file() or not _holds(target, before)
    border = rng.random()
    if border < 0.2:
        examine(folder)
        return
    if border < 0.6 and folder.name != "v2":
        mq.load(folder, verify=verify)
    else:
        load_params(folder, verify)
    if verify is True and changed and target != manifest and folder.name != "v2":
        raise AssertionError(f"{target.name} was changed, but the checkpoint was accepted")


def _holds(path: Path, data: bytes) -> bool:
    return path.stat().st_size == len(data) and path.read_bytes() == data


def _reseal(rng: Random, bed: Bed, path: Path, notes: Notes) -> None:
    """Damage the manifest, and update its hash if it can still be hashed."""
    note, text = damaged_json(rng, path.read_bytes())
    try:
        data = json.loads(text)
        data["sha256"] = content_hash(data)
        text = json.dumps(data).encode()
        note += ", resealed"
    except (ValueError, RecursionError, TypeError):
        pass
    notes.append(note)
    bed.put(path, text)


def _damage_file(rng: Random, bed: Bed, path: Path, notes: Notes) -> None:
    """Damage a file, or create an optional one in damaged form."""
    choice = rng.random()
    is_json = path.suffix == ".json"
    if choice < 0.08:
        notes.append(f"{path.name}: {bed.put_special(rng, path)}")
        return
    more = json.dumps(_MORE.get(path.name, {})).encode()
    data = path.read_bytes() if path.is_file() else more
    if is_json and choice < 0.75:
        note, data = damaged_json(rng, data, _KEYS.get(path.name, ()))
    else:
        note, data = damaged_bytes(rng, data)
    notes.append(f"{path.parent.name}/{path.name}: {note}")
    bed.put(path, data)


def _damage_tensors(rng: Random, bed: Bed, path: Path, notes: Notes) -> None:
    """Damage a safetensors file: header, length, values, or the whole file."""
    choice = rng.random()
    if choice < 0.1:
        notes.append(f"{path.name}: {bed.put_special(rng, path)}")
        return
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    if choice < 0.5:
        note, header = damaged_json(rng, header, ("__metadata__", "extra"))
    elif choice < 0.6:
        note, header = damaged_bytes(rng, header)
    elif choice < 0.7:
        note, values = damaged_bytes(rng, values)
    if choice < 0.7:
        header += b" " * (-len(header) % 8)
        data = len(header).to_bytes(8, "little") + header + values
    elif choice < 0.8:
        note, size = damaged_bytes(rng, data[:8])
        data = size[:8].ljust(8, b"\0") + data[8:]
    else:
        note, data = damaged_bytes(rng, data)
    notes.append(f"{path.name}: {note}")
    bed.put(path, data)


def _read_source(folder: Path) -> tuple[Any, Any, Any]:
    """Read all that a conversion reads before it begins."""
    reader = Reader(folder)
    family = family_for(reader.config, folder / "config.json")
    config = read_config(family, reader.config, folder)
    todo = plan(family, config, reader)
    check_ties(config, todo, reader)
    todo.read(reader)
    return family, todo, reader


def _convert(bed: Bed, folder: Path, recipe: Any) -> None:
    """Run a whole conversion and check that the result is sound."""
    dst = bed.scratch("converted")
    bed.scratch("converted.work")
    calibration = bed.root / "samples" / "samples.jsonl"
    mq.convert(folder, dst, recipe, calibration)
    if wrong := examine(dst):
        raise AssertionError(f"wrote a bad checkpoint: {wrong[0]}")


KINDS: dict[str, Callable[[Random, Bed, Notes], None]] = {
    "header": _header,
    "index": _index,
    "config": _config,
    "tokenizer": _tokenizer,
    "preprocessor": _preprocessor,
    "template": _template,
    "recipe": _recipe,
    "calibration": _calibration,
    "picture": _picture,
    "converted": _converted,
}
