"""Pure: texts without what looks like a secret, before they leave the run folder.

By its name (`--api-key x`, `PASSWORD=x`, `token: "x"`) or by its own form (a token of a well-known service, a key, the
password of a URL). What has another name and no such form cannot be told from anything else.

A supervisor does this too, to whatever stands in somebody's files, and `re` lets no other thread run meanwhile: every
pattern has one way to match a text, and what it has looked at it does not look at again from the next letter.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HIDDEN", "arguments", "of_name", "scrubbed"]

HIDDEN = "[hidden]"

# The last word of a name; `max_tokens` and the tokens of a tokenizer are no secrets.
_SECRET = re.compile(
    r"(?:(?:^|[_.-])(?:(?:access|auth|refresh)?token|secret|credentials?|(?:api|access|private|secret)[_-]?key)|"
    r"passw(?:or)?d|passphrase|(?:^|[_.-])authorization)$",
    re.IGNORECASE,
)
_OF_A_TOKENIZER = re.compile(r"(?:^|[_.-])(?:pad|eos|bos|unk|sep|cls|mask)_token$", re.IGNORECASE)
_LAST_WORDS = 40  # characters of a name: more than any of those

# A name with what leads to its value: `=`, `:`, `"name":`, `name: str =`.
_NAMED = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]+)[\"']?[ \t]*"
    r"(?::[ \t]*(?:str|bytes)(?:[ \t]*\|[ \t]*None)?[ \t]*=|[:=]=?>?)[ \t]*"
)
# Left open, it goes on to the end of the line.
_QUOTED = r"\"\"\"[^\"\n]*(?:\"\"\")?|'''[^'\n]*(?:''')?|\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?"
_VALUE = re.compile(rf"{_QUOTED}|[^\s\"',;&(){{}}\[\]]+")
_HEADER = re.compile(rf"{_QUOTED}|[^\"'\n]+")  # of more than one word: Authorization: Basic x
_CODE = re.compile(r"[^\W\d][\w.]{0,199}[(\[]")  # what is called or looked up
_NOTHING = ("None", "True", "False", "null", "true", "false")

_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|"
    r"xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|(?<!-)eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"[\s\S]*?(?:-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
_URL = re.compile(r"://[^/\s:@\"']*:[^/\s@\"']+@")
# Whose address is the secret.
_HOOK = re.compile(
    r"(?P<place>hooks\.slack\.com/|discord(?:app)?\.com/api/webhooks/|webhook\.office\.com/|api\.telegram\.org/bot)"
    r"[^\s\"'<>]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<scheme>\bbearer[ \t]+)[\w.~+/=-]{8,}", re.IGNORECASE)


def scrubbed(text: str) -> str:
    """The text with secrets replaced by `HIDDEN`. It takes as long as the text is long."""
    text = _HOOK.sub(rf"\g<place>{HIDDEN}", text)
    text = _URL.sub(f"://{HIDDEN}@", text)
    text = _FORMS.sub(HIDDEN, text)
    return _BEARER.sub(rf"\g<scheme>{HIDDEN}", _without_named(text))


def arguments(words: Iterable[str]) -> list[str]:
    """A command line's, in which an option and its value may be two words."""
    found: list[str] = []
    hide = False
    for word in words:
        name, equals, value = word.partition("=")
        is_option = word.startswith("--") or (len(word) == 2 and word.startswith("-"))
        if hide and not is_option:
            found.append(HIDDEN)
        else:
            found.append(f"{name}={of_name(name, value)}" if equals else scrubbed(word))
        hide = word.startswith("-") and not equals and _is_secret(word)
    return found


def of_name(name: str, value: str) -> str:
    """The value of what is called `name`: an option, a variable. Nothing of it is shown if that is a secret's name."""
    if value and _is_secret(name):
        return HIDDEN
    return scrubbed(value)


def _is_secret(name: str) -> bool:
    end = name[-_LAST_WORDS:]
    return _SECRET.search(end) is not None and _OF_A_TOKENIZER.search(end) is None


def _without_named(text: str) -> str:
    found: list[str] = []
    at = 0
    for named in _NAMED.finditer(text):
        name, begin = named["name"], named.end()
        if begin <= at or not _is_secret(name) or _CODE.match(text, begin):
            continue
        header = name.lower().endswith("authorization")
        value = (_HEADER if header else _VALUE).match(text, begin)
        if value is None or value[0] in _NOTHING or (value[0].isdecimal() and name.lower().endswith("token")):
            continue  # the number of a token is one of many
        found += [text[at:begin], HIDDEN]
        at = value.end()
    return "".join([*found, text[at:]])
