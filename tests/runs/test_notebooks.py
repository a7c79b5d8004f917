"""The notebooks are committed with the outputs of a whole run, and their assertions still hold.

`python tests/runs/test_notebooks.py transformer_sizing.ipynb` runs one and writes its outputs into it.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
LIMIT_S = 180
LIMIT_BYTES = 400_000
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def hash_code(notebook: Any) -> str:
    """SHA-256 of all code cells. `execute` stores it in the metadata, so that outdated outputs are found."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


@each_notebook
def test_notebook_has_the_outputs_of_a_whole_run(path: Path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not [cell["id"] for cell in notebook["cells"] if cell["metadata"]]  # neither times nor settings of an editor
    assert path.stat().st_size < LIMIT_BYTES
    assert notebook["metadata"]["code_sha256"] == hash_code(notebook), f"run python tests/runs/{Path(__file__).name}"


@pytest.mark.slow
@each_notebook
def test_notebook_runs_from_top_to_bottom(path: Path):
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", path.name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


def execute(path: Path) -> None:
    """Run a notebook and write its outputs into it, without metadata that differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.clear()
    NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True).execute(cwd=ROOT)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.metadata["code_sha256"] = hash_code(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
