"""Defaults for options, from files, each with the file that it came from.

What the command line says wins over the environment (PET_*), that over the project's files, those over the user's and
those over the site's. Nearest first:

launch.toml, or [tool.launch] of pyproject.toml, in the working directory or the nearest folder above it that has one
~/.config/launch/config.toml      (XDG_CONFIG_HOME)
/etc/launch/config.toml           (LAUNCH_SITE_CONFIG names another one; empty: none)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Default", "apply", "files", "load"]

_SITE = "/etc/launch/config.toml"

# These say what this one run is, and are no defaults for others.
_PER_RUN = {"nodes", "run", "module", "no_python", "dry_run", "array", "sweep", "sweep_file", "job_name", "dependency"}

# Only one of each group can hold: to say one is to take back a default of the others.
_GROUPS = (
    {"gpus", "procs", "nproc_per_node"},
    {"nodes", "nnodes"},
    {"preload", "no_preload"},
    {"snapshot", "no_snapshot"},
)


@dataclass(frozen=True)
class Default:
    """The value of an option, as the command line would have given it, and the file that says so."""

    value: Any
    file: Path


def files(cwd: Path, environ: Mapping[str, str]) -> list[Path]:
    """The files that are looked for, whether they are there or not; the one that wins comes first."""
    found = [
        next((folder / name for folder in (cwd, *cwd.parents) if (folder / name).is_file()), cwd / name)
        for name in ("launch.toml", "pyproject.toml")
    ]
    home = environ.get("XDG_CONFIG_HOME") or (f"{environ['HOME']}/.config" if environ.get("HOME") else None)
    if home is not None:
        found.append(Path(home) / "launch" / "config.toml")
    site = environ.get("LAUNCH_SITE_CONFIG", _SITE)
    return [*found, *([Path(site)] if site else [])]


def load(options: Sequence[click.Parameter], cwd: Path, environ: Mapping[str, str]) -> dict[str, Default]:
    """The defaults that hold, by the names of the options. Raises `UsageError` on what no file may say."""
    known = _known(options)
    found: dict[str, Default] = {}
    for file in files(cwd, environ):
        layer = {}
        for key, value in _read(file).items():
            option = known.get(key.replace("_", "-"))
            if option is None or option.name is None:
                raise UsageError(
                    f"{file}: {key!r} is no default that can be set; allowed are {', '.join(sorted(known))}"
                )
            if option.name in layer:
                raise UsageError(f"{file}: {key!r} is said twice, under both of its names ({' '.join(option.opts)})")
            layer[option.name] = Default(_check(option, key, value, file), file)
        taken = _with_group(found)
        for name, default in layer.items():
            if name == "sbatch" and name in found:
                # Each key for itself; the last of the same key holds, so the nearer file goes behind.
                found[name] = Default((*default.value, *found[name].value), found[name].file)
            elif name not in taken:
                found[name] = default
    return found


def apply(values: dict[str, Any], given: set[str], defaults: Mapping[str, Default]) -> dict[str, Any]:
    """The options of a command line with the defaults put in where nothing was said. given: the options that were."""
    taken = _with_group(given)
    merged = dict(values)
    for name, default in defaults.items():
        if name == "sbatch" and name in given:
            merged[name] = (*default.value, *values[name])
        elif name not in taken:
            merged[name] = default.value
    return merged


def _with_group(names: Iterable[str]) -> set[str]:
    told = set(names)
    return told.union(*(group for group in _GROUPS if group & told))


def _known(options: Sequence[click.Parameter]) -> dict[str, click.Option]:
    """Key -> option; an option of several long names has as many keys. torchrun's spellings are for command lines."""
    return {
        text.removeprefix("--"): option
        for option in options
        if isinstance(option, click.Option) and option.expose_value and option.name not in _PER_RUN
        if not (option.hidden and option.envvar)
        for text in option.opts
        if text.startswith("--")
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is no TOML: {error}") from error
    if file.name == "pyproject.toml":
        data = data.get("tool", {}).get("launch", {})
    if not isinstance(data, dict):
        raise UsageError(f"{file}: [tool.launch] must be a table of options, not {data!r}")
    return data


def _check(option: click.Option, key: str, value: Any, file: Path) -> Any:
    """The value as the command line would give it. Raises `UsageError` on one of another type."""
    where = f"{file}: {key} = {_toml(value)}"
    if option.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: give true or false")
        return value
    if option.multiple:
        return _several(option, value, where)
    if isinstance(option.type, click.Choice):
        if value not in option.type.choices:
            raise UsageError(f"{where}: give one of {', '.join(map(repr, option.type.choices))}")
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(option.type, click.types.IntParamType):
        if not number or isinstance(value, float):
            raise UsageError(f"{where}: give a whole number")
        return value
    if isinstance(option.type, click.types.FloatParamType):
        if not number:
            raise UsageError(f"{where}: give a number")
        return float(value)
    if not isinstance(value, str) and not number:
        raise UsageError(f"{where}: give a text")
    return str(value)


def _several(option: click.Option, value: Any, where: str) -> tuple[str, ...]:
    if option.name == "sbatch" and isinstance(value, dict):
        if not all(isinstance(one, str | int) for one in value.values()):
            raise UsageError(f"{where}: the values are texts, numbers, or true for an option without a value")
        return tuple(name if one is True else f"{name}={one}" for name, one in value.items() if one is not False)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        table = ", or a table" if option.name == "sbatch" else ""
        raise UsageError(f"{where}: give a list of texts{table}")
    return tuple(value)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
