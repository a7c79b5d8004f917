"""The notebooks: committed as a whole run left them, and each of their assertions holds again.

`python tests/test_notebooks.py transformer_sizing.ipynb` runs one and writes its outputs into it.
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

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
LIMIT_S, LIMIT_BYTES = 180, 400_000


def hash_of_code(notebook: Any) -> str:
    """Of all code cells; `run_again` leaves it in the metadata, so that outputs older than their code are seen."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_run_from_top_to_bottom(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not [cell["id"] for cell in notebook["cells"] if cell["metadata"]]  # when it ran is nobody's business
    assert path.stat().st_size < LIMIT_BYTES
    assert notebook["metadata"]["code_sha256"] == hash_of_code(notebook), f"python tests/test_notebooks.py {path.name}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", path.name]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout


def run_again(path: Path) -> None:
    """Run a notebook and write its outputs into it, without what another run or machine would change for nothing."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.clear()
    NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True).execute(cwd=ROOT)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.metadata["code_sha256"] = hash_of_code(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_again(Path(name))
