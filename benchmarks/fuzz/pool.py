"""Run cases in a separate process, which is replaced when it hangs, grows or dies."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.fuzz.bed import Bed
from mquant_jax.errors import UserError

Run = Callable[[int, int, Bed, list[str]], None]
ACCEPTED, REFUSED, UNCLEAR, HANG, MEMORY = OUTCOMES = (
    "accepted", "refused", "unclear", "hang", "memory",
)  # fmt: skip
FAULTS = (UNCLEAR, HANG, MEMORY)
_LONGEST = 2000  # characters allowed in a clear message
_POLL = 0.05  # seconds
_START = 300.0  # seconds for a process to become ready
_TIRED = 3 << 30  # bytes at which a process is replaced between cases; compiled programs pile up


class Limits(NamedTuple):
    """Limits of one case: seconds of processor time, which does not depend on other load (and ten
    times as many of wall time), and growth of the process in bytes."""

    seconds: float = 60.0
    grown: int = 1 << 30


DEFAULT = Limits()


def judge(run: Callable[[], None]) -> dict[str, Any]:
    """Run a case; return its ``outcome``, its ``error`` and ``where`` that was raised."""
    try:
        run()
    except UserError as e:
        text = str(e)
        fault = None
        if not text.isprintable():
            fault = "not one printable line"
        elif len(text) > _LONGEST:
            fault = f"{len(text)} characters"
        if fault is None:
            return {"outcome": REFUSED, "error": text, "where": ""}
        return {"outcome": UNCLEAR, "error": f"{fault}: {text[:300]!r}", "where": _where(e)}
    except BaseException as e:
        text = f"{type(e).__name__}: {str(e)[:300]!r}"
        outcome = MEMORY if isinstance(e, MemoryError) else UNCLEAR
        return {"outcome": outcome, "error": text, "where": _where(e)}
    return {"outcome": ACCEPTED, "error": "", "where": ""}


def _where(e: BaseException) -> str:
    """Return the last calls, innermost first."""
    frames = traceback.extract_tb(e.__traceback__)[:-6:-1]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)


class Pool:
    """A process that runs one case at a time.

    Args:
        bed: folder of valid input; each process works on a copy.
        seed: seed of all cases.
        run: ``(case, seed, bed, notes)``; a module-level function, because the process imports it.
    """

    def __init__(self, bed: Path, seed: int, limits: Limits, run: Run):
        self._bed, self._seed, self._limits, self._run = bed, seed, limits, run
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, case: int) -> dict[str, Any]:
        """Return :func:`judge` of a case, with its ``notes`` and ``seconds``."""
        if self._process is None:
            self._start()
        began, before = time.monotonic(), resident(self._process.pid)
        spent = processor_time(self._process.pid)
        self._pipe.send(case)
        while not self._pipe.poll(_POLL):
            waited, grown = time.monotonic() - began, resident(self._process.pid) - before
            seconds = processor_time(self._process.pid) - spent
            if seconds > self._limits.seconds or waited > 10 * self._limits.seconds:
                return self._lost(HANG, f"{seconds:.0f} s, {waited:.0f} on the clock", seconds)
            if grown > self._limits.grown:
                return self._lost(MEMORY, f"grew by {grown >> 20} MiB", seconds)
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            return self._lost(UNCLEAR, f"the process died: {code}", 0.0)
        found["seconds"] = processor_time(self._process.pid) - spent
        grown = found.pop("peak") - before
        if grown > self._limits.grown:
            found |= {"outcome": MEMORY, "error": f"grew by {grown >> 20} MiB: {found['error']}"}
        if resident(self._process.pid) > _TIRED:
            self._stop()
        return found

    def _lost(self, outcome: str, error: str, seconds: float) -> dict[str, Any]:
        self._stop()
        return {"outcome": outcome, "error": error, "where": "", "notes": [], "seconds": seconds}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._bed, self._seed, self._run), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            ready = self._pipe.poll(_START) and self._pipe.recv()
        except EOFError:
            ready = False
        if not ready:
            raise UserError(f"the process that runs cases died or was not ready in {_START:.0f} s")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, pristine: Path, seed: int, run: Run) -> None:
    """Receive case numbers and send outcomes; the main loop of the process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)  # silences warnings and the decoders' messages
    with tempfile.TemporaryDirectory(dir=pristine.parent) as folder:
        work = Path(shutil.copytree(pristine, Path(folder) / "bed", symlinks=True))
        bed = Bed(work)
        pipe.send("ready")
        while True:
            case, notes = pipe.recv(), list[str]()
            _forget_peak()
            found = judge(lambda case=case, notes=notes: run(case, seed, bed, notes))
            bed.restore()
            pipe.send(found | {"notes": notes, "peak": _peak()})


def case_random(seed: int, case: int) -> Random:
    """Return a generator that depends on seed and case alone."""
    return Random(f"{seed}/{case}")


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 where Linux does not report it."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def processor_time(pid: int) -> float:
    """Return a process's processor time in seconds; 0 where Linux does not report it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # the peak then covers the whole life of the process
        pass


def _peak() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0
