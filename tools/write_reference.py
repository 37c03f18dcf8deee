"""Write the reference: `docs/command_line.md` from the commands' help, `docs/api.md` from the docstrings.

python tools/write_reference.py           # writes both
python tools/write_reference.py --check   # says which is not what the code says, exit code 1
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from collapse_probe.cli.app import app

DOCS = Path(__file__).resolve().parent.parent / "docs"

#: Modules whose public names are documented, in reading order.
MODULES = [
    "collapse_probe",
    *(
        f"collapse_probe.{name}"
        for name in (
            "capture", "metrics", "metrics.functional", "plots", "report", "conditions", "models", "errors",
        )
    ),
]  # fmt: skip


_ORIGIN = "Written by `tools/write_reference.py` from {}."


def command_line() -> str:
    """Every command with its arguments and options, as typer documents them."""
    command = get_command(app)
    context: Any = command.make_context("collapse-probe", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="collapse-probe", title="Command line")
    text = re.sub(r"\[bold\](.*?)\[/bold\]", lambda found: f"    {found[1]}", text)
    return (
        text.replace(
            "# Command line\n", f"# Command line\n\n{_ORIGIN.format('the help of the commands')}\n", 1
        ).rstrip()
        + "\n"
    )


def api() -> str:
    """Every public name with its signature and docstring."""
    lines = ["# API reference", "", _ORIGIN.format("the docstrings"), ""]
    modules = [importlib.import_module(name) for name in MODULES]
    lines += [f"- [`{module.__name__}`](#{_anchor(module.__name__)})" for module in modules]
    for module in modules:
        lines += ["", f"## {module.__name__}", "", _text(module), ""]
        for name in sorted(_public(module), key=str.lower):
            lines += _entry(module.__name__, name, getattr(module, name))
    return "\n".join(lines).rstrip() + "\n"


def _public(module: ModuleType) -> list[str]:
    named = getattr(module, "__all__", None)
    if named is not None:
        return list(named)
    return [name for name, item in vars(module).items() if inspect.isclass(item) and item.__module__ == module.__name__]


def _anchor(name: str) -> str:
    return name.replace(".", "")


def _entry(module: str, name: str, item: Any) -> list[str]:
    if inspect.ismodule(item) or not (inspect.isclass(item) or callable(item)):
        return []
    lines = ["", f"### {name}", "", "```python", f"{module}.{name}{_signature(item)}", "```", "", _text(item)]
    if inspect.isclass(item) and not issubclass(item, BaseException):
        for own, member in sorted(vars(item).items()):
            function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if own.startswith("_") or not inspect.getdoc(function) or not _is_method(function):
                continue
            label = f"{name}.{own}" + ("" if isinstance(function, property) else _signature(function, bound=True))
            lines += ["", f"**`{label}`**", "", _text(function)]
    return lines


def _is_method(item: Any) -> bool:
    return inspect.isfunction(item) or isinstance(item, property)


def _signature(item: Any, bound: bool = False) -> str:
    try:
        signature = inspect.signature(item)
    except (TypeError, ValueError):
        return "(…)"
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in list(signature.parameters.values())[1 if bound else 0 :]
    ]
    return re.sub(r"<(function|object|class)[^>]*>", "…", str(inspect.Signature(parameters)))


def _text(item: Any) -> str:
    """A docstring: its first paragraph as text, the rest with its lines as they are."""
    words = inspect.getdoc(item) or ""
    words = re.sub(
        r":(?:class|func|meth|mod|data|attr):`~?([^`]*)`", lambda found: f"`{found[1].split('.')[-1]}`", words
    )
    first, _, rest = words.partition("\n\n")
    return f"{first}\n\n```text\n{rest.rstrip()}\n```" if rest.strip() else first


PAGES = {"command_line.md": command_line, "api.md": api}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; say what is not up to date.")] = False,
) -> None:
    """Write the reference, or check it."""
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: {len(text.splitlines())} lines")
    if stale:
        print(f"Not what the code says: {', '.join(stale)}. Run python tools/write_reference.py.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
