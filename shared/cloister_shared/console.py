"""How every command of Cloister ends: a sentence and an exit code, never a traceback for a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cloister_shared.errors import CloisterError, PackageMissing, PlanRefused, Refusal

REFUSED, BROKEN, INTERRUPTED = 1, 2, 130
"""Exit codes: the platform said no; something broke; the user pressed Ctrl-C."""


EXTRAS = {
    "captum": "export",
    "dicomweb_client": "imaging",
    "duckdb": "records",
    "fhir": "records",
    "hl7": "records",
    "monai": "imaging",
    "nibabel": "imaging",
    "onnx": "export",
    "onnxruntime": "export",
    "orjson": "records",
    "PIL": "imaging",
    "psycopg": "postgres",
    "pydicom": "imaging",
    "rdkit": "molecules",
    "sqlalchemy": "records",
    "wfdb": "waveforms",
}
"""Packages that not everybody installs, by the name that is imported, and the extra of Cloister that brings each."""


def one_core() -> None:
    """Before anything heavy is imported: one process keeps to one core."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextmanager
def extras_named() -> Generator[None, None, None]:
    """Say of a package that is missing which extra brings it.

    Raises:
        PackageMissing: it is one of ``EXTRAS``.
    """
    try:
        yield
    except ModuleNotFoundError as absent:
        name = (absent.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        said = f"This needs {name}, which is not installed."
        raise PackageMissing(said, mend=f"Run pip install 'cloister[{EXTRAS[name]}]'.") from None


@contextmanager
def plain_errors() -> Generator[None, None, None]:
    """Turn our errors, and those of files that cannot be used, into a line on stderr and an exit code."""
    try:
        with extras_named():
            yield
    except CloisterError as error:
        _say(str(error))
        raise SystemExit(REFUSED if isinstance(error, Refusal) else BROKEN) from None
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        _say(f"{error.filename or 'A file'} could not be read or written ({error.strerror or error}).")
        raise SystemExit(BROKEN) from None
    except KeyboardInterrupt:
        _say("Interrupted. What was finished is kept.")
        raise SystemExit(INTERRUPTED) from None


def _say(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")


def read_text(path: Path) -> str:
    """A text file that a user named.

    Raises:
        PlanRefused: it is not there, or not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanRefused(f"{path} is not there.", mend="Give the path of a plan in YAML.") from None
    except IsADirectoryError:
        raise PlanRefused(f"{path} is a folder.", mend="Give the path of a plan in YAML.") from None
    except UnicodeDecodeError:
        raise PlanRefused(f"{path} is not UTF-8 text.", mend="Save it as plain UTF-8 YAML.") from None
