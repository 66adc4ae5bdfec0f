"""`MusterCLI`: a command line for a Module, a DataModule and the Trainer, by jsonargparse: flags, YAML, subcommands.

python train.py fit --model.lr 0.1 --trainer.max_epochs 3 --optimizer Adam
python train.py fit --print_config > config.yaml;  python train.py fit --config config.yaml
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer import callbacks, loggers
from trainer.callbacks.callback import Callback
from trainer.config import Config
from trainer.data import DataModule
from trainer.errors import ConfigError
from trainer.hparams import given_hyperparameters
from trainer.module import Module
from trainer.seed import seed_everything
from trainer.trainer import Trainer

try:
    import jsonargparse
    from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:
    raise ConfigError("The command line needs jsonargparse: pip install 'jsonargparse[signatures]'.") from error

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ArgsType",
    "ArgumentParser",
    "LRSchedulerCallable",
    "LightningArgumentParser",
    "LightningCLI",
    "MusterCLI",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
]

for package in (callbacks, loggers):
    for public in package.__all__:
        getattr(package, public)  # imported now: a class can be chosen by its name once it is there

# Types for arguments of a Module that a person chooses: `optimizer: OptimizerCallable = torch.optim.Adam` is made in
# configure_optimizers() as `self.optimizer(self.parameters())`, with `--model.optimizer SGD --model.optimizer.lr 0.1`.
OptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]
LRSchedulerCallable = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
ArgsType = list[str] | dict[str, Any] | Namespace | None


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's, with the name of the logged value that it looks at as an argument."""

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


class ArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, with what a MusterCLI needs beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--config", action=ActionConfigFile, help="Path of a YAML file with arguments.")
        # Under which keys there are callbacks, and optimizers and schedulers (a class, or None where one is chosen).
        self.callback_keys: list[str] = []
        self.optimizer_classes: dict[str, type[Any] | None] = {}
        self.scheduler_classes: dict[str, type[Any] | None] = {}

    def add_lightning_class_args(self, made: Any, nested_key: str, **options: Any) -> None:
        """Arguments of a class under `--nested_key`; a Callback is made from them and given to the Trainer."""
        if isinstance(made, type) and issubclass(made, Callback):
            self.callback_keys.append(nested_key)
        self.add_class_arguments(made, nested_key, fail_untyped=False, **options)

    def add_optimizer_args(self, optimizer_class: Any = torch.optim.Optimizer, nested_key: str = "optimizer") -> None:
        """Arguments of an optimizer under `--nested_key`. Of torch's base, or a tuple, a class is chosen there."""
        self.optimizer_classes[nested_key] = self._add_later(optimizer_class, nested_key, "params")

    def add_lr_scheduler_args(
        self, lr_scheduler_class: Any = torch.optim.lr_scheduler.LRScheduler, nested_key: str = "lr_scheduler"
    ) -> None:
        """Arguments of a learning-rate scheduler, likewise."""
        self.scheduler_classes[nested_key] = self._add_later(lr_scheduler_class, nested_key, "optimizer")

    def _add_later(self, made: Any, key: str, own: str) -> type[Any] | None:
        """Arguments of what is made when `own` is there, in configure_optimizers()."""
        if isinstance(made, tuple) or made in (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler):
            self.add_subclass_arguments(made, key, skip={own}, required=False, instantiate=False, fail_untyped=False)
            return None
        self.add_class_arguments(made, key, skip={own}, instantiate=False, fail_untyped=False)
        return made  # type: ignore[no-any-return]


class SaveConfigCallback(Callback):
    """Saves the whole configuration as config.yaml: in the run folder (under `launch`), else in the log's folder.

    Raises:
        ConfigError: another configuration is there already, and overwrite is not set.
    """

    def __init__(
        self, parser: ArgumentParser, config: Namespace, config_filename: str = "config.yaml", overwrite: bool = False
    ) -> None:
        self.parser, self.config = parser, config
        self.config_filename, self.overwrite = config_filename, overwrite

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:  # noqa: ARG002 - the hook's form
        folder = trainer.run_dir or trainer.log_dir
        if trainer.fast_dev_run or folder is None or not trainer.is_global_zero:
            return
        text = self.parser.dump(self.config)
        path = Path(folder) / self.config_filename
        # A restart in its run folder writes the same again.
        if path.exists() and path.read_text() != text and not self.overwrite:
            raise ConfigError(
                f"{path} holds another configuration. Give save_config_kwargs={{'overwrite': True}} to replace it, or "
                "another folder."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)


class MusterCLI:
    """Reads the command line, makes model, data and Trainer from it, and runs what it says.

    Args:
        model_class, datamodule_class: a class, or a function that returns one's object; None: any subclass, chosen
            by its import path (`--model my.module.Net`, `--data ...`).
        save_config_callback: keeps config.yaml beside the logs; None: nothing is kept. save_config_kwargs: for it.
        trainer_class: a subclass of Trainer. trainer_defaults: other defaults of its arguments; callbacks in it are
            always there.
        seed_everything_default: a seed, True (one is drawn) or False (none).
        parser_kwargs: for the parser (or, by subcommand, for its parser).
        subclass_mode_model, subclass_mode_data: a subclass of the given one may be chosen too.
        args: in place of sys.argv[1:]: a list as there, or a dict or Namespace with values.
        run: whether there are subcommands (fit, validate, test, predict) and the one that was given runs; otherwise
            only the objects are made.
        auto_configure_optimizers: whether there are `--optimizer` and `--lr_scheduler`. Those that are given replace
            the model's configure_optimizers().

    Attributes: parser, config, subcommand, model, datamodule, trainer.

    Override `add_arguments_to_parser`, `before_fit`, `after_fit`, ... for what your program needs beside it.
    """

    def __init__(
        self,
        model_class: type[Module] | Callable[..., Module] | None = None,
        datamodule_class: type[DataModule] | Callable[..., DataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | None = None,
        parser_class: type[ArgumentParser] = ArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: list[str] | dict[str, Any] | Namespace | None = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
    ) -> None:
        self.model_class, self.datamodule_class = model_class, datamodule_class
        self.save_config_callback, self.save_config_kwargs = save_config_callback, save_config_kwargs or {}
        self.trainer_class, self.trainer_defaults = trainer_class, trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self.auto_configure_optimizers = auto_configure_optimizers
        self._parser_class = parser_class
        self._parsers: dict[str, ArgumentParser] = {}
        self.parser = self._make_parser(parser_kwargs or {}, run=run)
        self.config = self._parse(args)
        self.subcommand: str | None = self.config.subcommand if run else None
        seed = self._config.get("seed_everything", False)
        if seed is not False:
            # Drawn here, so that the saved configuration has it.
            self._config["seed_everything"] = seed_everything(None if seed is True else int(seed))
        self.before_instantiate_classes()
        self._instantiate()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run(self.subcommand)

    # ------------------------------------------------------------------------------------ what may be overridden

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Add arguments, callbacks (`add_lightning_class_args`), links (`link_arguments`), defaults."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that can be run, and the arguments that do not come from the command line."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def before_instantiate_classes(self) -> None:
        """Called when the command line is read, before anything is made."""

    def after_instantiate_classes(self) -> None:
        """Called when model, data and Trainer are made."""

    # ---------------------------------------------------------------------------------------------- the parsers

    def _make_parser(self, options: dict[str, Any], *, run: bool) -> ArgumentParser:
        commands = self.subcommands()
        parser = self._parser_class(**{k: v for k, v in options.items() if k not in commands})
        if not run:
            self._add_arguments(parser)
            return parser
        subparsers = parser.add_subcommands()
        for name, skip in commands.items():
            self._parsers[name] = sub = self._parser_class(**options.get(name, {}))
            self._add_arguments(sub)
            sub.add_method_arguments(self.trainer_class, name, skip=skip, fail_untyped=False)
            subparsers.add_subcommand(name, sub, help=f"Run Trainer.{name}.")
        return parser

    def _add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=bool | int, default=self.seed_everything_default,
            help="A seed; true draws one, false sets none.",
        )  # fmt: skip
        parser.add_class_arguments(Config, "trainer", instantiate=False, fail_untyped=False)
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})
        self._add_object(parser, "model", self.model_class, Module, choose=self.subclass_mode_model, required=True)
        self._add_object(parser, "data", self.datamodule_class, DataModule, choose=self.subclass_mode_data)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser.optimizer_classes:
                parser.add_optimizer_args()
            if not parser.scheduler_classes:
                parser.add_lr_scheduler_args()

    @staticmethod
    def _add_object(
        parser: ArgumentParser, key: str, given: Any, base: type[Any], *, choose: bool, required: bool = False
    ) -> None:
        if choose:
            parser.add_subclass_arguments(given or base, key, required=required, fail_untyped=False)
        else:
            parser.add_class_arguments(given, key, fail_untyped=False)

    def _parse(self, args: Any) -> Namespace:
        if isinstance(args, (dict, Namespace)):
            return self.parser.parse_object(args)  # type: ignore[no-any-return, unused-ignore]
        return self.parser.parse_args(sys.argv[1:] if args is None else args)  # type: ignore[no-any-return, unused-ignore]

    # ---------------------------------------------------------------------------------------------- the objects

    @property
    def _config(self) -> Namespace:
        """The part of the configuration that the subcommand's parser read."""
        return self.config if self.subcommand is None else self.config[self.subcommand]

    @property
    def _parser(self) -> ArgumentParser:
        return self.parser if self.subcommand is None else self._parsers[self.subcommand]

    def _instantiate(self) -> None:
        parser, config = self._parser, self._config
        makers = [
            *_keeping_what_was_written(config.get("model"), self.model_class, choose=self.subclass_mode_model),
            *_keeping_what_was_written(config.get("data"), self.datamodule_class, choose=self.subclass_mode_data),
        ]
        made = parser.instantiate(config, instantiators=makers)
        self.model: Module = made.model
        self.datamodule: DataModule | None = made.get("data")
        self.trainer = self._make_trainer(made)
        self._configure_optimizers()

    def _make_trainer(self, made: Namespace) -> Trainer:
        arguments = made.trainer.as_dict()
        own = self.trainer_defaults.get("callbacks") or []
        callbacks = [*_listed(arguments.pop("callbacks", None)), *_listed(own)]
        callbacks += [made[key] for key in self._parser.callback_keys]
        if self.save_config_callback is not None and not arguments["fast_dev_run"]:
            callbacks.append(self.save_config_callback(self._parser, self._config, **self.save_config_kwargs))
        return self.trainer_class(callbacks=callbacks, **arguments)

    def _configure_optimizers(self) -> None:
        """Replace the model's configure_optimizers() if the command line names an optimizer."""
        parser, config = self._parser, self._config
        chosen = [k for k in parser.optimizer_classes if config.get(k) is not None]
        if not self.auto_configure_optimizers or not chosen:
            return
        if len(chosen) > 1 or len(parser.scheduler_classes) > 1:
            raise ConfigError(
                "With several optimizers or schedulers, make them in configure_optimizers() of the model."
            )
        [key] = chosen
        scheduler_key = next((k for k in parser.scheduler_classes if config.get(k) is not None), None)
        model = self.model

        def configure_optimizers() -> Any:
            parameters = (p for p in model.parameters() if p.requires_grad)
            optimizer = _make(parser.optimizer_classes[key], config[key], parameters)
            if scheduler_key is None:
                return optimizer
            scheduler = _make(parser.scheduler_classes[scheduler_key], config[scheduler_key], optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
            return [optimizer], [scheduler]

        model.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def _run(self, name: str) -> None:
        arguments = {
            k: v for k, v in self._config.items(branches=True)
            if k in _parameters(self.trainer_class, name) and k not in self.subcommands()[name]
        }  # fmt: skip
        for when in (f"before_{name}", name, f"after_{name}"):
            if when == name:
                getattr(self.trainer, name)(self.model, datamodule=self.datamodule, **arguments)
            elif callable(hook := getattr(self, when, None)):
                hook()


def _keeping_what_was_written(config: Any, given: Any, *, choose: bool) -> Iterator[tuple[Any, type[Any], bool]]:
    """Let save_hyperparameters keep the configuration; objects made from it cannot stand in a checkpoint."""
    if config is None:
        return
    kept = _class_at(config["class_path"]) if choose else given
    if not isinstance(kept, type):
        return
    written = config.get("init_args") if choose else config
    plain = {k: v for k, v in ({} if written is None else written.as_dict()).items() if not _has_objects(v)}

    def make(class_type: type[Any], *args: Any, **kwargs: Any) -> Any:
        with given_hyperparameters(plain):
            return class_type(*args, **kwargs)

    yield make, kept, False


def _class_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _parameters(owner: type[Any], name: str) -> set[str]:
    return set(inspect.signature(getattr(owner, name)).parameters)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _has_objects(value: Any) -> bool:
    """Whether a value of the configuration describes an object, or holds one that does."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_has_objects, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_objects, value))


def _make(made: type[Any] | None, config: Namespace, *arguments: Any) -> Any:
    """The object that a configuration describes."""
    options = config.as_dict()
    if made is None:
        made, options = _class_at(options["class_path"]), options.get("init_args", {})
    return made(*arguments, **options)


LightningCLI, LightningArgumentParser = MusterCLI, ArgumentParser
