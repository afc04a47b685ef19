"""Every notebook runs from an empty machine, and is stored as it ran.

After a change, store it anew: ``jupyter execute --inplace notebooks/quickstart.ipynb``, with its data already collected
(a progress bar would be stored too).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEGABYTE = 1_000_000
# Absolute paths of whoever ran it: Unix folders, Windows drives, file addresses.
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(home|Users|root|tmp|work|mnt|opt|usr|var|private|content)/|\b[A-Z]:\\|file://")
NOISE = re.compile(r"warn|deprecat|GPU available", re.IGNORECASE)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """Source and textual outputs of a cell."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found += [output.get("text", ""), *map(str, output.get("traceback", []))]
        found += [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def test_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1.5 * MEGABYTE

    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    for cell in notebook.cells:
        for text in texts(cell):
            assert not LOCAL_PATH.search(text), text
        for text in texts(cell)[1:]:
            assert not NOISE.search(text), text


@pytest.mark.slow
def test_runs_from_an_empty_machine(
    path: Path, tmp_path: Path, minari_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(temporary))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(here)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert not list(here.iterdir())  # it needs nothing from its folder and leaves nothing there
