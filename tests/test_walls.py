"""The walls between the rooms, the public names, and how light an import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import collapse_probe

PACKAGE = Path(collapse_probe.__file__).parent
ROOMS = {"capture", "metrics", "models", "loading", "plots", "report", "conditions"}
COMMANDS = ["analyze", "compare", "inspect", "look", "merge", "metrics", "models", "report", "track"]
SHARED = {
    "comparison",
    "differences",
    "errors",
    "files",
    "look",
    "ratio",
    "readings",
    "references",
    "result",
    "rollout",
    "series",
    "shards",
    "skipping",
    "words",
}
ALLOWED = {"report": {"plots"}, "conditions": {"diagnosis"}}


def imports_of(path):
    """Modules that a file imports, wherever in it the statement stands, except for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(room):
    return sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_do_not_import_each_other(room):
    files = files_of(room)
    assert files
    for path in files:
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "collapse_probe" and len(parts) > 1:
                own = {room} | SHARED | ALLOWED.get(room, set())
                assert parts[1] in own, f"{path.name} of {room} imports {name}"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("plots", {"torch", "timm", "torchmetrics"}),
        ("report", {"torch", "timm", "torchmetrics"}),
        ("conditions", {"torch", "timm", "torchmetrics", "matplotlib", "seaborn"}),
        ("metrics", {"timm", "PIL", "matplotlib", "seaborn"}),
        ("capture", {"timm", "PIL", "matplotlib"}),
    ],
)
def test_rooms_keep_to_their_libraries(room, forbidden):
    for path in files_of(room):
        assert not forbidden & {name.split(".")[0] for name in imports_of(path)}, path


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import collapse_probe",
        "import collapse_probe.cli",
        "import collapse_probe.plots",
        "from collapse_probe import Look",
        "import collapse_probe.report",
        "import collapse_probe.conditions",
        "import collapse_probe.diagnosis",
        "from collapse_probe import Analysis, Finding",
    ],
)
def test_no_torch_is_loaded(statement):
    assert "torch" not in loaded_after(statement)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_quick(arguments):
    statement = f"import collapse_probe.cli.app as a\ntry:\n    a.app({arguments})\nexcept SystemExit:\n    pass"
    assert not {"torch", "numpy", "pandas", "matplotlib"} & loaded_after(statement)


def test_that_test_can_fail():
    assert "torch" in loaded_after("from collapse_probe import capture")


def test_public_names():
    assert sorted(collapse_probe.__all__) == sorted(
        [
            "Analysis",
            "AttentionMap",
            "CollapseProbeError",
            "Comparison",
            "Finding",
            "Look",
            "Series",
            "analyze",
            "capture",
            "compare",
            "load_model",
            "look_at",
            "measure",
            "merge",
            "track",
        ]
    )
    for name in collapse_probe.__all__:
        assert getattr(collapse_probe, name) is not None
        assert name in dir(collapse_probe)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        collapse_probe.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "module", ["capture", "metrics", "metrics.functional", "models", "loading", "plots", "report", "conditions"]
)
def test_every_exported_name_exists_and_is_documented(module):
    import importlib

    room = importlib.import_module(f"collapse_probe.{module}")
    assert room.__doc__
    assert room.__all__
    for name in room.__all__:
        assert getattr(room, name).__doc__, f"{module}.{name} has no docstring"


def test_every_file_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_doctests():
    import doctest
    import importlib

    ran = 0
    for module in (
        "metrics.functional.cross_layer",
        "metrics.cross_layer",
        "metrics.cross_head",
        "metrics.entropy",
        "capture.context",
    ):
        result = doctest.testmod(importlib.import_module(f"collapse_probe.{module}"))
        assert result.failed == 0, module
        ran += result.attempted
    assert ran >= 10
