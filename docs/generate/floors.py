"""The picture of the floors, drawn from the import contract and from the imports that there are.

    python -m docs.generate.floors            # writes docs/assets/floors.svg
    python -m docs.generate.floors --check    # exit code 1 if it is not what the contract and the imports give

A row is a floor of the contract in ``pyproject.toml`` (`tool.importlinter`), from the top. The square of a module
stands on the diagonal; a dot to the right of it is a floor below that it imports.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from docs.generate.sources import PACKAGE, ROOT, files, imported_modules, path_of, summary

PICTURE = ROOT / "docs" / "assets" / "floors.svg"

CELL, TOP = 17, 26
NAMES, CAPTIONS, GRID = 122, 134, 520
LONGEST = 66
"""Letters of a caption."""

# On the site the colours are the theme's; a file shown by itself follows the system.
STYLE = """
.floors text{font:12px ui-sans-serif,system-ui,sans-serif;fill:var(--md-default-fg-color,#1f2933)}
.floors .name{font-weight:600;text-anchor:end}
.floors .caption{font-size:11px;fill:var(--md-default-fg-color--light,#52606d)}
.floors .line{stroke:var(--md-default-fg-color--lightest,#d9dee3)}
.floors .dot{fill:var(--md-default-fg-color--light,#52606d)}
@media (prefers-color-scheme:dark){
.floors text{fill:var(--md-default-fg-color,#e4e7eb)}
.floors .caption{fill:var(--md-default-fg-color--light,#9aa5b1)}
.floors .line{stroke:var(--md-default-fg-color--lightest,#3e4c59)}
.floors .dot{fill:var(--md-default-fg-color--light,#9aa5b1)}
}
"""


def floors() -> list[list[str]]:
    """The floors of the contract from the top; modules that stand side by side are on one. Without those that do not
    exist (yet), and without ``__main__``, which only starts ``cli``."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    found = [[name.strip(" ()") for name in layer.split(":")] for layer in contract["layers"]]
    there = [[name for name in floor if name != "__main__" and _exists(name)] for floor in found]
    return [floor for floor in there if floor]


def _exists(name: str) -> bool:
    try:
        path_of(f"graphopt.{name}")
    except ModuleNotFoundError:
        return False
    return True


def imports() -> dict[str, set[str]]:
    """For each module directly in graphopt, those that its files import."""
    found: dict[str, set[str]] = {}
    for path in files():
        parts = path.relative_to(PACKAGE).parts
        mine = parts[0].removesuffix(".py")
        for module in imported_modules(path):
            theirs = module.split(".")[1]
            if theirs != mine:
                found.setdefault(mine, set()).add(theirs)
    return found


def caption(name: str) -> str:
    """The first line of the module's docstring, as a caption."""
    text = summary(f"graphopt.{name}").replace("`", "")
    before, colon, behind = text.partition(": ")
    if colon and (
        before.replace("_", "").lower() == name.replace("_", "") or (before[:1].isupper() and " " not in before)
    ):
        text = behind[:1].upper() + behind[1:]
    text = text.removesuffix(".")
    if len(text) <= LONGEST:
        return text
    return text[:LONGEST].rpartition(" ")[0].rstrip(",;:") + " …"


def svg() -> str:
    """The picture."""
    rows = [name for floor in floors() for name in floor]
    at = {name: k for k, name in enumerate(rows)}
    used = imports()
    width, height = GRID + CELL * len(rows) + 6, TOP + CELL * len(rows) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="floors" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="The floors of graphopt: imports point down only">',
        f"<style>{' '.join(STYLE.split())}</style>",
        f'<text class="caption" x="{GRID}" y="14">imports: each dot a floor below</text>',
    ]
    top = 0
    for floor in floors():
        y = TOP + CELL * top
        lines.append(f'<line class="line" x1="0" x2="{width}" y1="{y}" y2="{y}"/>')
        top += len(floor)
    for name, k in at.items():
        y = TOP + CELL * k
        hue = 265 - round(85 * k / max(len(rows) - 1, 1))
        lines.append(f'<text class="name" x="{NAMES}" y="{y + 13}">{escape(name)}</text>')
        lines.append(f'<text class="caption" x="{CAPTIONS}" y="{y + 13}">{escape(caption(name))}</text>')
        x = GRID + CELL * k
        lines.append(
            f'<rect x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" rx="3" fill="hsl({hue} 55% 55%)">'
            f"<title>{escape(name)}</title></rect>"
        )
        for other in sorted(used.get(name, set()) & set(at), key=at.__getitem__):
            across, what = GRID + CELL * at[other] + CELL / 2, f"{name} imports {other}"
            lines.append(
                f'<circle class="dot" cx="{across}" cy="{y + CELL / 2}" r="3"><title>{escape(what)}</title></circle>'
            )
    return "\n".join([*lines, "</svg>", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    drawn = svg()
    if given == ["--check"]:
        return int(not PICTURE.exists() or PICTURE.read_text() != drawn)
    Path(PICTURE).write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
