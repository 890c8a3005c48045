"""Convert a Hugging Face model folder into a checkpoint folder, part by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax import __version__
from mquant_jax.checkpoint.check import check_result
from mquant_jax.checkpoint.destination import check_destination
from mquant_jax.checkpoint.hub import model_folder
from mquant_jax.checkpoint.journal import Journal, differences
from mquant_jax.checkpoint.manifest import MANIFEST, load_manifest
from mquant_jax.checkpoint.plan import Plan, plan, read_config
from mquant_jax.checkpoint.provenance import hash_files, source_files
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.checkpoint.source import Reader
from mquant_jax.checkpoint.workspace import Workspace, workspace
from mquant_jax.checkpoint.writer import CheckpointWriter, by_part
from mquant_jax.cli_support import progress, warn
from mquant_jax.errors import UserError
from mquant_jax.files import is_file
from mquant_jax.layer_plan import target_model
from mquant_jax.models.base import Config, Family
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import dense_layers
from mquant_jax.ptq.budget import Choice, check_budget, choose, choose_once
from mquant_jax.ptq.calibration_data import (
    Chunks,
    calibration_chunks,
    warn_of_bundled,
    warn_of_few,
    warn_of_little_text,
)
from mquant_jax.ptq.ledger import LEARNED, JournalLedger
from mquant_jax.ptq.pipeline import Conversion, untied
from mquant_jax.ptq.states import States
from mquant_jax.recipe import Recipe
from mquant_jax.stages import stage


def convert(
    src: str | Path,
    dst: Path,
    recipe: Recipe,
    calibration: Path | None = None,
    overwrite: bool = False,
    *,
    resume: bool = False,
    restart: bool = False,
    budget: float | None = None,
) -> dict[str, Any]:
    """Convert ``src`` into the checkpoint ``dst``; cheap checks run first.

    Args:
        src: a model folder, or a Hub name found in the local cache.
        overwrite: replace the checkpoint at ``dst``.
        resume: continue from what a stopped conversion of the same inputs left in ``DST.work``.
        restart: remove that, and start again.
        budget: mean stored bits per weight; bits and groups are first chosen for each layer, as by
            ``mquant_jax allocate``.

    Returns:
        The manifest, as written to mquant.json.

    Raises:
        UserError: bad input; ``dst`` is unchanged.
    """
    options = {"overwrite": overwrite, "resume": resume, "restart": restart}
    check_destination(dst, MANIFEST, **options)
    if calibration is not None and not is_file(calibration):
        raise UserError(f"--calibration {calibration}: no such file")
    reader = Reader(model_folder(src))
    family = family_for(reader.config, reader.folder / "config.json")
    config = read_config(family, reader.config, reader.folder)
    todo = plan(family, config, reader)
    layers = dense_layers(target_model(family, todo.config, recipe))  # checks groups and rules
    check_ties(config, todo, reader)
    if budget is not None:
        check_budget(family, todo.config, recipe, budget)
    family.check_processor(reader.folder, todo.config)
    ledger: JournalLedger | None = None
    base = recipe

    def worth_keeping() -> bool:
        if ledger is None:
            return recipe is not base
        return recipe.needs_calibration and bool(ledger.records)

    with workspace(dst, MANIFEST, **options, keep=worth_keeping) as work:
        states = States(work.states)
        with stage("read calibration"):
            used = recipe.needs_calibration or budget is not None
            chunks = _calibration(family, todo, recipe, reader, calibration, states, used)
        if chunks is not None:
            warn_of_few(chunks, layers, recipe)
            warn_of_little_text(chunks, recipe)
        if budget is not None and chunks is not None:
            recipe = _chosen(work, family, todo, recipe, budget, reader, chunks)
        with stage("hash source"):
            source = hash_files(source_files(reader))
        header = _header(source, recipe, chunks)
        ledger = JournalLedger(Journal(work.journal), header)
        if resume and work.has_result(lambda: _same_inputs(dst, header)):
            return load_manifest(dst)
        manifest = _fill(work, family, todo, recipe, reader, chunks, states, ledger, header)
        with stage("read back"):
            check_result(work.result, family, todo.config)
        work.publish()
    return manifest


def _chosen(
    work: Workspace,
    family: Family,
    todo: Plan,
    recipe: Recipe,
    budget: float,
    reader: Reader,
    chunks: Chunks,
) -> Recipe:
    """Choose bits and groups for each layer within a budget, or take what a stopped run chose."""

    def make() -> Choice:
        params = todo.tensors(reader)
        return choose(family, todo.config, recipe, budget, params, chunks.batches, progress)

    with stage("choose bits"):
        return choose_once(work.choice, recipe, budget, make)


def _header(source: dict[str, Any], recipe: Recipe, chunks: Chunks | None) -> dict[str, Any]:
    """Return everything that the result depends on."""
    return {
        "mquant_jax": __version__,
        "source": source,
        "recipe": recipe.to_json(),
        "calibration": None if chunks is None else chunks.fingerprint,
    }


def _same_inputs(dst: Path, header: dict[str, Any]) -> bool:
    """Return whether a checkpoint is the result of a conversion with this header."""
    manifest = load_manifest(dst, verify=False)
    found = {key: manifest.get(key) for key in header}
    return not list(differences(found, json.loads(json.dumps(header))))


def _fill(
    work: Workspace,
    family: Family,
    todo: Plan,
    recipe: Recipe,
    reader: Reader,
    chunks: Chunks | None,
    states: States,
    ledger: JournalLedger,
    header: dict[str, Any],
) -> dict[str, Any]:
    """Do everything between the checks and the final rename."""
    writer = CheckpointWriter(work.result)
    ledger.check(writer.holds)
    config, params = todo.config, todo.tensors(reader)
    if recipe.rotate:
        config, params = untied(config, params)
    batches = None if chunks is None else chunks.batches
    job = Conversion(
        family, config, recipe, params, batches, states=states, ledger=ledger, progress=progress
    )
    report = job.run(writer.write_part)
    report |= {} if chunks is None else chunks.contents

    def finish() -> dict[str, Any]:
        return writer.finish(
            ledger.files().values(),
            family=family.name,
            hf_config=reader.config,
            recipe=recipe,
            tied_head=config.language.tied_head,
            files=[reader.folder / "config.json", *reader.side_files()],
            report=report if recipe.changes_weights else None,
            source=header["source"],
            calibration=header["calibration"],
        )

    if recipe.learns_whole:
        if ledger.done(f"{LEARNED}/all") is None:
            finish()
            _learn(job, work, writer, ledger)
        report["tuning"] = (ledger.done(f"{LEARNED}/all") or {})["tuning"]
    return finish()


def _learn(
    job: Conversion, work: Workspace, writer: CheckpointWriter, ledger: JournalLedger
) -> None:
    """Learn the scales of the written model. Changed parts get new files, so that a kill leaves the
    old ones intact."""
    made, _ = load_params(work.result, verify=False)
    with stage("learn scales"):
        learned, report = job.learned(made)
    for part, tensors in by_part(made | learned).items():
        if tensors.keys() & learned.keys():
            ledger.commit(f"{LEARNED}/{part}", writer.write_part(f"{part}.{LEARNED}", tensors))
    ledger.commit(f"{LEARNED}/all", {"tuning": report})


def check_ties(config: Config, todo: Plan, reader: Reader) -> None:
    """Check that config and checkpoint agree on whether the head is the embedding.

    Args:
        config: the family's, according to config.json.
        todo: the plan, according to the checkpoint.

    Raises:
        UserError: config.json ties them, but the checkpoint holds a head with other values.
    """
    if todo.tied_head and reader.config.get("tie_word_embeddings") is False:
        warn("config.json says the head is not tied, but the checkpoint has no head of its own; "
             "the embedding is used", "config")  # fmt: skip
    if todo.tied_head or not config.language.tied_head:
        return
    params = todo.tensors(reader)
    head, table = (params[f"language/{n}"] for n in ("head/kernel", "embedding"))
    pairs = zip(head.blocks(), table.blocks(), strict=True)
    if not all(np.array_equal(a, b) for a, b in pairs):
        names = {rule.dst: rule.src for rule in todo.rules}
        raise UserError(
            f"{reader.folder}: config.json has tie_word_embeddings true, but "
            f"{names['language/head/kernel']} differs from {names['language/embedding']}; set it "
            "to false to use the stored head, or remove that tensor to use the embedding"
        )


def _calibration(
    family: Family,
    todo: Plan,
    recipe: Recipe,
    reader: Reader,
    path: Path | None,
    states: States,
    used: bool,
) -> Chunks | None:
    """Read calibration data, before the weights, so that bad data fails early."""
    if not used:
        if path is not None:
            warn(f"--calibration is not used: recipe {recipe.name!r} needs no data", "calibration")
        return None
    if path is None:
        warn_of_bundled(reader.folder, reader.config)
    processor = family.processor(reader.folder, todo.config)
    limit = recipe.calibration.max_samples
    return calibration_chunks(path, processor, states, limit, family.pictures)
