"""Write the map of packages and modules into docs/architecture.md: ``-m tools.package_map``.

Each file has one phrase: the first sentence of its docstring, up to its colon or full stop.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: begin -->", "<!-- map: end -->"

ORDER = (
    *("core", "picturebook", "lora", "models", "data", "inference", "evaluation", "training"),
    *("memory", "merging", "report", "hub", "pipeline", "experiments", "display", "api"),
    *("studio", "cli"),
)
"""The packages; each imports only what stands before it."""


def draw_map(root: Path = ROOT) -> str:
    """Draw the tree of the package, in the packages' order, and that of the tools."""
    source = root / "src" / "dreamloom"
    lines = [_say("src/dreamloom/", source / "__init__.py", 0)]
    for package in ORDER:
        lines += _draw_folder(source / package, 1)
    lines.append("tools/")
    lines += _draw_folder(root / "tools" / "picturebook", 1)
    return "```text\n" + "\n".join(lines) + "\n```"


def _draw_folder(folder: Path, depth: int) -> list[str]:
    lines = [_say(f"{folder.name}/", folder / "__init__.py", depth)]
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(_say(path.name, path, depth + 1))
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").is_file():
            lines += _draw_folder(inner, depth + 1)
    return lines


def _say(name: str, path: Path, depth: int) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return f"{'  ' * depth}{name}".ljust(34) + " " + " ".join(text.split("\n\n")[0].split())


def write_map(page: str) -> str:
    """Put the tree between the page's two marks."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{draw_map()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(write_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
