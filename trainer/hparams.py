"""`save_hyperparameters`: what a module was built with, kept, put into checkpoints and shown by loggers."""

from __future__ import annotations

import copy
import inspect
from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import torch.nn as nn

from trainer.errors import CheckpointError, ModuleError
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import CodeType, FrameType

_given: ContextVar[dict[str, Any] | None] = ContextVar("given_hyperparameters", default=None)


@contextmanager
def given_hyperparameters(values: dict[str, Any]) -> Iterator[None]:
    """Inside, `save_hyperparameters()` keeps `values` instead of the arguments of `__init__`.

    A command line uses it: what the user wrote in the config is what shall be kept, not the objects made from it.
    """
    token = _given.set(values)
    try:
        yield
    finally:
        _given.reset(token)


class AttributeDict(dict[str, Any]):
    """A dict whose string keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are: {sorted(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 3
        rows = [f"{chr(34) + str(key) + chr(34) + ':':{width}} {value}" for key, value in self.items()]
        return "\n".join(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttributeDict:
        return AttributeDict({copy.deepcopy(k, memo): copy.deepcopy(v, memo) for k, v in self.items()})


class HyperParameters:
    """Mixin of Module and DataModule: `save_hyperparameters`, `hparams`, `hparams_initial`."""

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"

    _log_hyperparams = False
    # A cast: torch.jit evaluates annotations of classes, and does not know this one.
    _hparams_name = cast("str | None", None)
    if TYPE_CHECKING:
        _hparams: Any

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of `__init__` in `self.hparams`, in every checkpoint, and in the loggers.

        args: names of the arguments to keep (default: all), or one object (dict, Namespace, dataclass) to keep
        instead. ignore: names to leave out. logger: whether loggers get them. frame: whose arguments to take
        (default: the caller's `__init__` and those of its subclasses).
        """
        self._log_hyperparams = logger
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        given = _given.get()
        if given is not None:
            found = dict(given)
        elif own := getattr(type(self), "__dataclass_fields__", None):
            found = {name: getattr(self, name) for name, f in own.items() if f.init}
        else:
            start = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
            found = _init_arguments(start, self)
        found = {k: v for k, v in found.items() if k not in left_out}

        objects = [a for a in args if not isinstance(a, str)]
        if len(objects) > 1 or (objects and len(args) > 1):
            raise ModuleError("save_hyperparameters() takes names of arguments, or one object; not both, not several.")
        if objects:
            kept = _as_mapping(objects[0])
            self._hparams_name = next((k for k, v in found.items() if v is objects[0]), None)
            kept = {k: v for k, v in kept.items() if k not in left_out} if isinstance(kept, dict) else kept
        else:
            missing = [a for a in args if a not in found]
            if missing:
                raise ModuleError(f"save_hyperparameters() was given {missing}, but __init__ has {sorted(found)}.")
            kept = {a: found[a] for a in args} if args else found
            self._hparams_name = "kwargs" if kept else self._hparams_name
        self._set_hparams(kept)
        for name in left_out:
            self._hparams.pop(name, None)
        for name, value in self._hparams.items():
            if isinstance(value, nn.Module):
                rank_zero_warn(
                    f"save_hyperparameters() keeps the module {name!r}, whose weights are in the checkpoint anyway. "
                    f"Leave it out: save_hyperparameters(ignore=[{name!r}])."
                )
        self._hparams_initial = copy.deepcopy(self._hparams)

    def _set_hparams(self, values: Any) -> None:
        values = _as_mapping(values)
        if isinstance(values, dict) and isinstance(self.hparams, dict):
            self.hparams.update(values)
        else:
            self._hparams = values

    @property
    def hparams(self) -> Any:
        """What `save_hyperparameters` kept; may be changed by the user."""
        if "_hparams" not in self.__dict__:
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> Any:
        """A copy of what was kept when `save_hyperparameters` was called."""
        return copy.deepcopy(self.__dict__.get("_hparams_initial", AttributeDict()))


def _as_mapping(values: Any) -> Any:
    if isinstance(values, Namespace):
        return AttributeDict(vars(values))
    if is_dataclass(values) and not isinstance(values, type):
        return AttributeDict({f.name: getattr(values, f.name) for f in fields(values)})
    if isinstance(values, dict):
        return AttributeDict(values)
    if isinstance(values, MutableMapping) or hasattr(values, "_content"):
        return values  # omegaconf and the like keep their own type
    raise ModuleError(
        f"save_hyperparameters() cannot keep a {type(values).__name__}. Allowed: names of arguments, a dict, a "
        "Namespace, a dataclass, a mapping."
    )


def _init_arguments(frame: FrameType | None, owner: object) -> dict[str, Any]:
    """The arguments of every `__init__` of `owner` on the stack: a subclass passes its own on to its base."""
    found: dict[str, Any] = {}
    inside = False
    while frame is not None:
        local = frame.f_locals
        # Python keeps the class in the frame only if __init__ says super().
        defined = (c for c in type(owner).__mro__ if _code_of(c) is frame.f_code)
        cls: type[Any] | None = local.get("__class__") or next(defined, None)
        if frame.f_code.co_name == "__init__" and cls is not None:
            parameters = inspect.signature(cls.__init__).parameters
            names = list(parameters)
            if names and local.get(names[0]) is owner:
                inside = True
                for name, parameter in list(parameters.items())[1:]:
                    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                        found.update(local.get(name, {}))
                    elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and name in local:
                        found[name] = local[name]
            elif inside:
                break
        elif inside:
            break
        frame = frame.f_back
    return found


def _code_of(cls: type[Any]) -> CodeType | None:
    """The code of the `__init__` that a class itself defines."""
    return getattr(vars(cls).get("__init__"), "__code__", None)


def storable(values: Any) -> tuple[dict[str, Any], list[str]]:
    """What of hyperparameters a checkpoint can hold, paths as str; and the names of the others, such as modules."""
    from trainer.checkpoint.values import encode

    kept, left_out = {}, []
    for name, value in values.items():
        plain = _plain(value)
        try:
            encode({"": plain})
        except CheckpointError:
            left_out.append(str(name))
        else:
            kept[name] = plain
    return kept, left_out


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if type(value) is list else value


def build_from_hparams(cls: type[Any], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Make a `cls` from the hyperparameters in a checkpoint, `overrides` winning; unknown ones are left out.

    Raises:
        ModuleError: `__init__` wants an argument that neither holds.
    """
    saved = dict(checkpoint.get(HyperParameters.CHECKPOINT_HYPER_PARAMS_KEY) or {})
    saved = {k: v for k, v in saved.items() if not k.startswith("_")} | {
        k: v for k, v in overrides.items() if k in saved
    }
    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    name = checkpoint.get(HyperParameters.CHECKPOINT_HYPER_PARAMS_NAME)
    if name and name != "kwargs" and name in parameters:
        saved = {name: AttributeDict(saved)}
    arguments = saved | overrides
    if not takes_any:
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ModuleError(
            f"{cls.__name__} cannot be built from the checkpoint: {error}. The checkpoint holds the hyperparameters "
            f"{sorted(saved)}; give the others to load_from_checkpoint(path, name=value), or call "
            "self.save_hyperparameters() in __init__ before training."
        ) from error
    return cls(**arguments)
