"""Pure: texts without what looks like a secret, before they leave the run folder.

By its name (`--api-key x`, `PASSWORD=x`, `token: "x"`) or by its own form (a token of a well-known service, a key, the
password of a URL). What has another name and no such form cannot be told from anything else.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HIDDEN", "arguments", "scrubbed"]

HIDDEN = "[hidden]"

# The last word of a name; `max_tokens` and the tokens of a tokenizer are no secrets.
_NAME = (
    r"(?<![\w.-])(?!(?:pad|eos|bos|unk|sep|cls|mask)_token\b)"
    r"(?P<name>-{0,2}(?:[\w]+[_.-])*?(?:token|secret|passw(?:or)?d|passphrase|credentials?|api[_-]?key|access[_-]?key|"
    r"private[_-]?key|secret[_-]?key))"
)
_QUOTED = r"\"[^\"\n]*\"|'[^'\n]*'"
# A number is a size; what is called or looked up is code.
_BARE = r"(?!(?:\d+|None|True|False|null|true|false)\b)[^\s\"',;&(){}\[\]]+(?![^\s,;&]*[(\[])"
_NAMED = re.compile(rf"{_NAME}(?P<mid>[\"']?\s*(?:=|:)\s*)(?P<value>{_QUOTED}|{_BARE})", re.IGNORECASE)
_OPTION = re.compile(rf"^{_NAME}$", re.IGNORECASE)
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|"
    r"xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s:@\"']+:[^/\s@\"']+@", re.IGNORECASE)


def scrubbed(text: str) -> str:
    """The text with secrets replaced by `HIDDEN`."""
    text = _URL.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _FORMS.sub(HIDDEN, text)
    return _NAMED.sub(rf"\g<name>\g<mid>{HIDDEN}", text)


def arguments(words: Iterable[str]) -> list[str]:
    """A command line's, in which an option and its value may be two words."""
    found: list[str] = []
    hide = False
    for word in words:
        found.append(HIDDEN if hide and not word.startswith("-") else scrubbed(word))
        hide = word.startswith("-") and _OPTION.fullmatch(word) is not None
    return found
