"""Draw the pictures again that tests compare figures with, after looks were changed on purpose.

Run it from the root of the repository, and look at every picture that `git diff` names before it is committed:

    python tools/draw_baselines.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.plots.baselines import DRAWN, FOLDER, MADE_BY, rendered, versions


def main() -> None:
    """Write all of them, and remove those of figures that are no longer drawn."""
    FOLDER.mkdir(exist_ok=True)
    for name in DRAWN:
        (FOLDER / f"{name}.png").write_bytes(rendered(name))
    MADE_BY.write_text(json.dumps(versions()) + "\n")
    for path in FOLDER.glob("*.png"):
        if path.stem not in DRAWN:
            path.unlink()
    size = sum(path.stat().st_size for path in FOLDER.glob("*.png"))
    print(f"{len(DRAWN)} pictures in {FOLDER}, {size / 1000:.0f} kB together.")


if __name__ == "__main__":
    main()
