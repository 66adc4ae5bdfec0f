"""`ModelPruning`: weights set to zero during training, by torch.nn.utils.prune."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import prune

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError
from trainer.ranks import rank_zero_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from trainer.module import Module
    from trainer.trainer import Trainer

_BY_NAME: dict[str, type[prune.BasePruningMethod]] = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}


class ModelPruning(Callback):
    """Prunes parameters at the end of epochs.

    A checkpoint's "state_dict" has the pruned weights under their plain names; what only training needs (the masks,
    the weights below them) is in the callback's state, so that a resumed run goes on exactly.

    Args:
        pruning_fn: "l1_unstructured", "random_unstructured", "ln_structured", "random_structured", or a class derived
            from torch's BasePruningMethod.
        parameters_to_prune: pairs (module, name of a parameter); default: parameter_names of all modules.
        parameter_names: default: "weight" and "bias".
        use_global_unstructured: prune over all parameters together rather than each one alone.
        amount: a fraction in [0, 1], a number of values, or a function of the epoch that returns one; 0: not now.
        apply_pruning: whether to prune, or a function of the epoch that says it.
        make_pruning_permanent: at the end of training, leave plain parameters behind.
        use_lottery_ticket_hypothesis: after pruning, set what is left to its first values (or a function of the epoch
            that says whether).
        resample_parameters: with it, take the first values of a re-initialised layer instead.
        pruning_dim, pruning_norm: of the structured methods.
        verbose: 1 says how much is pruned, 2 says it of every parameter.
        prune_on_train_epoch_end: False prunes at the end of validation.

    Raises:
        ConfigError: an argument is not allowed, or (in fit) there is nothing to prune, or the weights are sharded.
    """

    def __init__(
        self,
        pruning_fn: str | type[prune.BasePruningMethod],
        parameters_to_prune: Sequence[tuple[nn.Module, str]] | None = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: float | Callable[[int], float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        method = _BY_NAME.get(pruning_fn) if isinstance(pruning_fn, str) else pruning_fn
        if not (isinstance(method, type) and issubclass(method, prune.BasePruningMethod)):
            raise ConfigError(
                f"ModelPruning({pruning_fn!r}). Allowed: {', '.join(_BY_NAME)}, or a class derived from "
                "torch.nn.utils.prune.BasePruningMethod."
            )
        structured = method in (prune.LnStructured, prune.RandomStructured)
        if use_global_unstructured and getattr(method, "PRUNING_TYPE", None) != "unstructured":
            raise ConfigError(
                f"ModelPruning({pruning_fn!r}) is not unstructured, so it cannot be applied over all parameters "
                "together: give use_global_unstructured=False."
            )
        if structured and pruning_dim is None:
            raise ConfigError(f"ModelPruning({pruning_fn!r}) needs pruning_dim.")
        if method is prune.LnStructured and pruning_norm is None:
            raise ConfigError(f"ModelPruning({pruning_fn!r}) needs pruning_norm.")
        if not callable(amount):
            whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0
            if not whole and not (isinstance(amount, float) and 0 <= amount <= 1):
                raise ConfigError(f"ModelPruning(amount={amount!r}): a float in [0, 1] or an int >= 0.")
        if verbose not in (0, 1, 2):
            raise ConfigError(f"ModelPruning(verbose={verbose!r}). Allowed: 0, 1, 2.")
        self._method = method
        self._options: dict[str, Any] = {"dim": pruning_dim} if structured else {}
        if method is prune.LnStructured:
            self._options["n"] = pruning_norm
        self._given = list(parameters_to_prune or ())
        self._names = parameter_names or ["weight", "bias"]
        self._global = use_global_unstructured
        self._amount = amount
        self._apply = apply_pruning
        self._permanent = make_pruning_permanent
        self._lottery = use_lottery_ticket_hypothesis
        self._resample = resample_parameters
        self._verbose = verbose
        self._on_train_epoch_end = prune_on_train_epoch_end
        # By name in the model: the module and its parameter's own name. Their first values, if those are needed.
        self._pruned: dict[str, tuple[nn.Module, str]] = {}
        self._first: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------------------- what the Trainer calls

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.parallel.sharded:
            raise ConfigError("ModelPruning does not work on sharded weights; use strategy='ddp'.")
        paths = {id(m): name for name, m in pl_module.named_modules()}
        if missing := [type(m).__name__ for m, _ in self._given if id(m) not in paths]:
            raise ConfigError(f"ModelPruning: these modules are not in {type(pl_module).__name__}: {missing}.")
        chosen = self._given or [
            (m, n) for m in pl_module.modules() for n in self._names
            if any(isinstance(m._parameters.get(k), nn.Parameter) for k in (n, f"{n}_orig"))
        ]  # fmt: skip
        self._pruned = {f"{paths[id(m)]}.{n}".lstrip("."): (m, n) for m, n in chosen}
        if not self._pruned:
            raise ConfigError(f"ModelPruning finds no parameters named {self._names} in {type(pl_module).__name__}.")
        if self._lottery and not self._first:
            self._first = {key: self._first_value(m, n) for key, (m, n) in self._pruned.items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._on_train_epoch_end:
            self._prune(trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._on_train_epoch_end and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._prune(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._permanent:
            with _places_kept(self._pruned.values()):
                for module, name in self._pruned.values():
                    if _is_pruned(module, name):
                        prune.remove(module, name)  # type: ignore[no-untyped-call]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        for key in [k for k in weights if k.endswith("_orig")]:
            plain = key.removesuffix("_orig")
            if plain in self._pruned:
                weights[plain] = weights.pop(key) * weights.pop(f"{plain}_mask")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        modules = dict(pl_module.named_modules())
        for key, (original, mask) in checkpoint.get("callbacks", {}).get(self.state_key, {}).get("pruned", {}).items():
            path, _, name = key.rpartition(".")
            module = modules[path]
            with _places_kept([(module, name)]):
                prune.custom_from_mask(module, name, mask.to(trainer.device))  # type: ignore[no-untyped-call]
            with torch.no_grad():
                module.get_parameter(f"{name}_orig").copy_(original)

    def state_dict(self) -> dict[str, Any]:
        pruned = {
            key: [getattr(m, f"{n}_orig").detach(), getattr(m, f"{n}_mask")]
            for key, (m, n) in self._pruned.items() if _is_pruned(m, n)
        }  # fmt: skip
        return {"pruned": pruned, "first": self._first}

    def snapshot_state(self) -> dict[str, Any]:
        return {}  # weights and masks are the model's

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first = state_dict["first"]

    # --------------------------------------------------------------------------------------------- pruning

    def _prune(self, epoch: int) -> None:
        if not (self._apply(epoch) if callable(self._apply) else self._apply):
            return
        amount = self._amount(epoch) if callable(self._amount) else self._amount
        if not amount:
            return
        before = self._zeros()
        with _places_kept(self._pruned.values()):
            if self._global:
                prune.global_unstructured(list(self._pruned.values()), self._method, amount=amount)
            else:
                for module, name in self._pruned.values():
                    self._method.apply(module, name, amount=amount, **self._options)  # type: ignore[no-untyped-call]
        if self._lottery(epoch) if callable(self._lottery) else self._lottery:
            with torch.no_grad():
                for key, (module, name) in self._pruned.items():
                    parameter = module.get_parameter(f"{name}_orig")
                    parameter.copy_(self._first[key].to(parameter.device))
        if self._verbose:
            self._say(epoch, before)

    def _first_value(self, module: nn.Module, name: str) -> torch.Tensor:
        if self._resample:
            fresh = copy.deepcopy(module)
            if not callable(getattr(fresh, "reset_parameters", None)):
                raise ConfigError(f"ModelPruning(resample_parameters=True): {type(module).__name__} cannot be reset.")
            fresh.reset_parameters()  # type: ignore[operator]
            module = fresh
        value: torch.Tensor = getattr(module, name)
        return value.detach().clone()

    def _zeros(self) -> dict[str, tuple[int, int]]:
        """Of each parameter: how many values are pruned, and how many there are."""
        found = {}
        for key, (module, name) in self._pruned.items():
            mask = getattr(module, f"{name}_mask", None)
            total = getattr(module, name).numel()
            found[key] = (0 if mask is None else int((mask == 0).sum()), total)
        return found

    def _say(self, epoch: int, before: dict[str, tuple[int, int]]) -> None:
        after = self._zeros()
        total = sum(n for _, n in after.values())
        old, new = (sum(z for z, _ in counts.values()) for counts in (before, after))
        rank_zero_info(f"ModelPruning, epoch {epoch}: {old / total:.2%} -> {new / total:.2%} of {total} values pruned.")
        if self._verbose == 2:
            for key, (zeros, size) in after.items():
                rank_zero_info(f"  {key}: {before[key][0] / size:.2%} -> {zeros / size:.2%} of {size}")


def _is_pruned(module: nn.Module, name: str) -> bool:
    return f"{name}_orig" in module._parameters


@contextmanager
def _places_kept(pruned: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Whatever name a parameter gets inside, afterwards it stands among the module's parameters where it stood.

    torch puts it behind the others, and the optimizer of a resumed run would number its parameters differently.
    """
    before = {module: list(module._parameters) for module, _ in pruned}
    yield
    for module, names in before.items():
        found = module._parameters
        other = {n: n.removesuffix("_orig") if n.endswith("_orig") else f"{n}_orig" for n in names}
        ordered = {k: found[k] for n in names for k in (n, other[n]) if k in found}
        found.clear()
        found.update(ordered)
