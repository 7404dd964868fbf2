"""Writes the table of all fields of PSAConfig, from the dataclass and its docstring.

python docs/_site/config_table.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from shared_specs.config import PSAConfig

PAGE = Path(__file__).resolve().parents[1] / "reference" / "config.md"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"


def meanings() -> dict[str, str]:
    """Field name -> what the docstring says of it; fields described together share the text."""
    text = inspect.getdoc(PSAConfig).partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \S)", text)
    found = {}
    for entry in entries:
        names, _, meaning = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split())
    return found


def table() -> str:
    """The table as Markdown.

    Raises:
        KeyError: the docstring leaves a field out.
    """
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    said = meanings()
    for field in dataclasses.fields(PSAConfig):
        kind = field.type.replace(" | ", " or ")  # a bar would end the cell
        cells = (f"`{field.name}`", f"`{kind}`", f"`{field.default!r}`", said[field.name])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Put the table between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
