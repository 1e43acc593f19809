"""Put a signature on a model and take it off again: `patch`, which utils.signature has too."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from utils.errors import InputError, warn

if TYPE_CHECKING:
    from utils.signature import RobustWeightSignature

_PATCHES: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, those that a state dict leaves out among them."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


class Patch:
    """A signature that is on a model; `remove()` takes it off. Also a context manager.

    Patches come off in any order. When the last one goes, every parameter and buffer has the bits
    it had before the first: whatever was changed in them meanwhile (by training, load_state_dict,
    batch-norm re-estimation) is undone with it. A copy of the model is kept until then.
    """

    def __init__(self, model: nn.Module, signature: RobustWeightSignature, alpha: float) -> None:
        self._model = weakref.ref(model)  # _PATCHES would keep its own key alive otherwise
        self._signature, self._alpha = signature, alpha
        self._before = {name: tensor.clone() for name, tensor in _state(model).items()}

    @torch.no_grad()
    def _put_on(self, model: nn.Module) -> None:
        for key, delta in self._signature.tensors.items():
            θ = model.get_parameter(key)
            if self._alpha != 0:  # θ + 0 would still turn −0.0 into 0.0
                θ.add_(delta.to(device=θ.device, dtype=θ.dtype), alpha=self._alpha)

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the model; a second call does nothing.

        Raises InputError, and changes nothing, where that can't be: the model has other tensors,
        shapes or types now.
        """
        model = self._model()
        live = [] if model is None else _PATCHES.get(model, [])
        if self not in live:
            return
        now = _state(model)
        forms = [{k: (t.dtype, t.shape) for k, t in s.items()} for s in (self._before, now)]
        if changed := sorted(k for k, _ in forms[0].items() ^ forms[1].items()):
            raise InputError(
                f"the patch can't be removed: {changed[0]} has another shape or type than before; "
                "change a model's layers or type when no patch is on it"
            )
        at = live.index(self)
        above = live[at + 1 :]
        del live[at]
        parameters = dict(model.named_parameters())
        for name, before in self._before.items():
            if above and name not in parameters:
                above[0]._before[name] = before  # the next one's "before" is now ours
            else:
                now[name].copy_(before)
        for patch in above:  # on again
            patch._before |= {name: p.detach().clone() for name, p in parameters.items()}
            patch._put_on(model)
        if not live:
            del _PATCHES[model]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _inside(model: nn.Module) -> nn.Module:
    """The model in DataParallel, DistributedDataParallel, AveragedModel, torch.compile's wrapper.

    In any nesting; of an averaged model it is the average.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    name = "module" if isinstance(model, wrappers) else "_orig_mod"
    return _inside(model._modules[name]) if name in model._modules else model


def patch(model: nn.Module, signature: RobustWeightSignature, alpha: float = 1.0) -> Patch:
    """Add alpha · signature to `model` in place and return the handle that takes it off again.

    A wrapped model is patched inside its wrapper.
    The running statistics of batch norm are not touched here: see `utils.batchnorm.reestimate`.
    Raises InputError, before anything is changed, when the model lacks a key, a shape differs or
    alpha is not finite; warns when the model is known to descend from other pretrained weights.
    """
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}, must be a finite number")
    model = _inside(model)
    check_fits(model, signature)
    handle = Patch(model, signature, alpha)
    _PATCHES.setdefault(model, []).append(handle)
    try:
        handle._put_on(model)
    except BaseException:  # no memory, Ctrl-C
        handle.remove()
        raise
    return handle


def check_fits(model: nn.Module, signature: RobustWeightSignature) -> None:
    """Raise InputError, and warn, where `patch` does."""
    name = f"signature of {signature.name}"
    owns = model.named_parameters(), model.named_buffers()
    for tensors, own in zip((signature.tensors, signature.statistics), owns, strict=True):
        own = dict(own)
        for key, tensor in tensors.items():
            if key not in own:
                raise InputError(f"{name} is for {signature.arch}: the model has no {key}")
            theirs, ours = tuple(own[key].shape), tuple(tensor.shape)
            if theirs != ours:
                raise InputError(f"{name}: {key} is {ours}, the model's is {theirs}")
    lineage = getattr(model, "pretrained_hash", None)
    if lineage and signature.pretrained and lineage != signature.pretrained:
        warn(
            f"the {name} comes from pretrained weights {signature.pretrained}, "
            f"the model from {lineage}"
        )
