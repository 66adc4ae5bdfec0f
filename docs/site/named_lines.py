"""Docstrings here tell of arguments in lines like `lr: the rate`; on a page they become a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

# A name, or several, and a colon, where a sentence may begin: at a line's start.
_NAMED = re.compile(r"^(?P<names>\*{0,2}[a-z_][\w*]*(?:, \*{0,2}[a-z_][\w*]*)*): (?=\S)")


class NamedLines(Extension):
    """Turns such lines of every docstring into items."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """The same text with its named lines as a Markdown list; sections like `Raises:` and code stay as they are."""
    text = re.sub(r"<(?=[A-Za-z])", "&lt;", text)  # a placeholder like <NAME> is no HTML
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        named = _NAMED.match(line)
        if named:
            if not inside:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in named["names"].split(", "))
            lines.append(f"- {names}: {line[named.end() :]}")
            inside = True
        else:
            inside = inside and bool(line.strip())
            lines.append(line)
    return "\n".join(lines)
