"""The notebook is run as a reader would run it, cell by cell."""

import json
import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "first-finetune.ipynb"


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_notebook_trains_compares_and_merges(tmp_path, monkeypatch):
    nbclient = pytest.importorskip(
        "nbclient", reason="the test extra of setup.cfg is not installed as a whole"
    )
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "⟦It is Beijing.<|im_end|>⟧" in said
    assert "exact answers to training questions: base 0 of 12 (0.0%), my 12 of 12 (100.0%)" in said
    assert (tmp_path / "merged" / "my" / "model.safetensors").is_file()
