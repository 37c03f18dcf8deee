"""`collapse-probe inspect`: what a file of weights is, and whose; no model is built."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.words import neutral


@with_exit_codes
def inspect(
    source: Annotated[str, typer.Argument(help="A weights file, or a folder that holds one.", show_default=False)],
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Look at the averaged weights of a checkpoint.")] = False,
    key: Annotated[str | None, typer.Option(help="Look at the weights under this key, for example student.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads of each block, where you know them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a weights file holds and which architecture it belongs to, without running anything in it.

    [bold]collapse-probe inspect model.pt[/bold]
    """
    import collapse_probe.models  # noqa: F401 - registers the bundled architectures
    from collapse_probe.cli.output import printing
    from collapse_probe.loading import inspect_weights

    found = inspect_weights(source, use_ema=use_ema, key=key, num_heads=num_heads)
    with printing():
        if as_json:
            print(json.dumps(found, indent=2))
            return
        for title, rows in (
            ("File", _file(found)),
            ("Keys and shapes show", found["anatomy"].items()),
            ("Architecture", _architecture(found)),
        ):
            _print(title, rows)
        print(neutral(_closing(source, found)))


def _file(found: dict[str, Any]) -> list[tuple[str, str]]:
    file, stored = found["file"], found["stored"]
    under = f"under {file['key']!r}" if file["key"] else "at the top level"
    cut = f", prefix {file['prefix_cut']!r} cut" if file["prefix_cut"] else ""
    rows = [
        ("path", file["path"]),
        ("format", file["format"] + (f" ({file['note']})" if file["note"] else "")),
        ("size", f"{file['size_bytes'] / 1e6:.1f} MB"),
        ("sha256", file["sha256"]),
        ("weights", f"{file['tensors']} tensors of {file['dtype'] or 'no floating type'}, {under}{cut}"),
        ("key names", file["scheme"] or "as they are"),
    ]
    if file["left_out"]:
        rows.append(("left out", _listed(file["left_out"])))
    if stored["architecture"] or stored["model_kwargs"]:
        arguments = " ".join(f"{name}={value}" for name, value in stored["model_kwargs"].items())
        rows.append(("stored", f"{stored['architecture'] or 'no architecture'} {arguments}".rstrip()))
    for name, words in (("non_finite", "NaN or infinities"), ("constant", "one number throughout")):
        if found[name]:
            rows.append((words, f"{len(found[name])} tensors: {_listed(found[name])}"))
    return rows


def _architecture(found: dict[str, Any]) -> list[tuple[str, str]]:
    if not found["candidates"]:
        near = f"; of about that size: {', '.join(found['nearest'])}" if found["nearest"] else ""
        return [("none", f"that is known has these weights{near}")]
    rows = []
    for item in found["candidates"]:
        arguments = " ".join(f"{name}={value}" for name, value in item["arguments"].items())
        rows.append((item["name"], f"takes every tensor{f', with {arguments}' if arguments else ''}"))
        if item["heads"] is not None:
            rows.append(("  heads", f"{item['heads']} ({item['heads_from']})"))
        if item["same"]:
            rows.append(("  also named", f"{', '.join(item['same'])} (preprocessing may differ)"))
    rows += [
        (name, "takes every tensor at this image size, too, and computes something else") for name in found["also"]
    ]
    return rows


def _closing(source: str, found: dict[str, Any]) -> str:
    file = shlex.quote(source)
    if found["non_finite"] or found["constant"]:
        return "These weights are stopped by analyze, unless --allow-bad-weights is given."
    if len(found["candidates"]) == 1 or found["stored"]["architecture"]:
        return f"Analyse it: collapse-probe analyze {file} --images FOLDER"
    if found["candidates"]:
        names = " or ".join(item["name"] for item in found["candidates"][:4])
        return f"They differ in what they compute: choose {names} with --model."
    return f"Name its architecture: collapse-probe analyze {file} --model NAME --images FOLDER"


def _print(title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {neutral(name):{width}}  {neutral(value)}")
    print()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
