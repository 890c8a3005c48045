"""Publishing a one-file checkpoint through a workspace, for tests."""

from __future__ import annotations

from pathlib import Path

from mquant_jax.checkpoint.workspace import workspace


def publish(dst: Path, content: str = "new", **options) -> None:
    with workspace(dst, "mark", **options) as work:
        (work.result / "mark").write_text(content)
        work.publish()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
