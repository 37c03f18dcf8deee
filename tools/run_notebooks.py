"""Run the notebooks from top to bottom and keep what they print and draw.

python tools/run_notebooks.py                          # all of them, in place
python tools/run_notebooks.py notebooks/1_quick_start.ipynb
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, and without what differs from run to run.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _empty(output)]
    return notebook


def _empty(output: nbformat.NotebookNode) -> bool:
    """What a progress bar leaves behind."""
    return output.output_type == "display_data" and not output.data.get("text/html", "x").strip()


def main(paths: Annotated[list[Path] | None, typer.Argument(help="By default all notebooks.")] = None) -> None:
    """Run notebooks in place."""
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        notebook = run(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
