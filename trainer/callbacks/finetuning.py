"""`BaseFinetuning`, `BackboneFinetuning`: layers that are frozen at first and trained from some epoch on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError
from trainer.optimizers import parameters_of
from trainer.ranks import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    from trainer.module import Module
    from trainer.trainer import Trainer

_Modules = nn.Module | Iterable[Any]
_BatchNorm = nn.modules.batchnorm._BatchNorm


def multiplicative(epoch: int) -> float:  # noqa: ARG001 - the form of a lambda_func
    """Doubles the backbone's learning rate every epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """Freeze layers before training, and unfreeze them when you say so: override the two methods below.

    Parameters that are unfrozen at the start of an epoch are trained from its first batch on, on any number of ranks;
    which ones, and in which parameter groups, is in the checkpoint.
    """

    def __init__(self) -> None:
        # The groups that were added to each optimizer, with the names of their parameters; and what is trained.
        self._groups: dict[str, list[dict[str, Any]]] = {}
        self._trained: list[str] | None = None

    def freeze_before_training(self, pl_module: Module) -> None:
        """Freeze what shall be frozen at first, with `self.freeze`."""
        raise NotImplementedError

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Called at the start of every epoch for each optimizer: unfreeze with `self.unfreeze_and_add_param_group`."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- to be called in them

    @staticmethod
    def flatten_modules(modules: _Modules) -> list[nn.Module]:
        """All modules that have parameters of their own, or nothing inside, below the given ones."""
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, nn.Module):
            return [
                m for m in modules.modules()
                if not any(m.children()) or next(m.parameters(recurse=False), None) is not None
            ]  # fmt: skip
        return [inner for module in modules for inner in BaseFinetuning.flatten_modules(module)]

    @staticmethod
    def filter_params(modules: _Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that do (or do not) require gradients; without BatchNorm's if train_bn is False."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and not train_bn:
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad == requires_grad:
                    yield parameter

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze the module's own parameters, and the statistics of a BatchNorm."""
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False

    @staticmethod
    def freeze(modules: _Modules, train_bn: bool = True) -> None:
        """Freeze modules; BatchNorm layers are left trainable unless train_bn is False."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                BaseFinetuning.freeze_module(module)

    @staticmethod
    def make_trainable(modules: _Modules) -> None:
        """Unfreeze modules."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm):
                module.track_running_stats = True
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Any]) -> list[Any]:
        """Those parameters that the optimizer does not have yet."""
        known = {id(p) for p in parameters_of(optimizer)}
        chosen = list(params)
        new = [p for p in chosen if id(p) not in known]
        if len(new) < len(chosen):
            rank_zero_warn(
                f"{len(chosen) - len(new)} of the unfrozen parameters are in the optimizer already and stay in their "
                "group; give configure_optimizers() only those that require gradients."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: _Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules and give their parameters to the optimizer, as a group of their own.

        lr: of the new group; by default that of the optimizer's first group divided by initial_denom_lr.
        """
        BaseFinetuning.make_trainable(modules)
        params = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        new = BaseFinetuning.filter_on_optimizer(optimizer, params)
        if new:
            first = optimizer.param_groups[0]["lr"]
            optimizer.add_param_group({"params": new, "lr": first / initial_denom_lr if lr is None else lr})

    # --------------------------------------------------------------------------------- what the Trainer calls

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._trained is None:
            return
        # Resumed: what the earlier run unfroze is unfrozen before its optimizer's state is loaded.
        named = dict(pl_module.named_parameters())
        for module in pl_module.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and any(named[n] is p for n in self._trained for p in own):
                module.track_running_stats = True
        for name, parameter in named.items():
            parameter.requires_grad = name in self._trained
        for number, groups in self._groups.items():
            for group in groups:
                trainer.optimizers[int(number)].add_param_group(group | {"params": [named[n] for n in group["params"]]})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        names = {id(p): n for n, p in pl_module.named_parameters()}
        for number, optimizer in enumerate(trainer.optimizers):
            before = len(optimizer.param_groups)
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            added = self._groups.setdefault(str(number), [])
            for group in optimizer.param_groups[before:]:
                plain = {k: v for k, v in group.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
                added.append(plain | {"params": [names[id(p)] for p in group["params"]]})
        self._trained = [n for n, p in pl_module.named_parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        return {"groups": self._groups, "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._groups, self._trained = state_dict["groups"], state_dict["trained"]


class BackboneFinetuning(BaseFinetuning):
    """Trains all but `model.backbone`, and from an epoch on the backbone too, with a learning rate that grows.

    Args:
        unfreeze_backbone_at_epoch: from 0.
        lambda_func: epoch -> by what the backbone's learning rate is multiplied at its start.
        backbone_initial_ratio_lr: the backbone's first learning rate, as a part of the optimizer's.
        backbone_initial_lr: the same as a number; it wins.
        should_align: the backbone's learning rate stops growing at the optimizer's.
        initial_denom_lr: divides the first learning rate if neither of the two above is given.
        train_bn: leave BatchNorm layers trainable from the start.
        verbose: say the learning rates every epoch. rounding: digits to say.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise ConfigError(f"BackboneFinetuning needs {type(pl_module).__name__}.backbone, a torch module.")
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: Module) -> None:
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        current = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch:
            first = self.backbone_initial_lr
            self.previous_backbone_lr = current * self.backbone_initial_ratio_lr if first is None else first
            self.unfreeze_and_add_param_group(
                pl_module.backbone,
                optimizer,
                self.previous_backbone_lr,
                initial_denom_lr=self.initial_denom_lr,
                train_bn=self.train_bn,
            )
        elif epoch > self.unfreeze_backbone_at_epoch and self.previous_backbone_lr is not None:
            next_lr = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align and next_lr > current:
                next_lr = current
            optimizer.param_groups[-1]["lr"] = self.previous_backbone_lr = next_lr
        else:
            return
        if self.verbose:
            rank_zero_info(
                f"Epoch {epoch}: learning rate {round(current, self.rounding)}, of the backbone "
                f"{round(self.previous_backbone_lr, self.rounding)}."
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
