"""An engine that came from a state file: nothing that a caller can upload may break a later step.

A kernel trusts the sizes of its state: a wrong one would be read beyond its end. So each piece must
be one that a step of this optimizer makes, and one more step on a copy must go through.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from optserve.optim import catalogue, checkpoint
from optserve.optim.averages import Window
from optserve.optim.engine import Engine
from optserve.optim.hyper import FLAGS
from optserve.optim.refusals import torchs_refusals
from optserve.optim.rehearsal import step
from optserve_client.errors import Invalid

#: Hyperparameters that schedulers write, also beyond the bounds of a caller's.
_SCHEDULED = ("lr", "momentum", "betas")
#: What schedulers write beside these; it stays when another one takes over.
_LEFT_BY_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


def check(engine: Engine) -> None:
    """Compare ``engine`` with what one step makes, and step on a copy.

    Raises Invalid or TorchRefused.
    """
    recipe = replace(engine.recipe, accumulate_steps=1)
    with torchs_refusals():
        fresh = Engine(recipe, engine.layout, None)
        step(fresh)
    _check_groups(engine, fresh)
    _check_state(engine, fresh)
    _check_averages(engine)
    _check_window(engine.window, engine)
    _check_line_search(engine)
    with torchs_refusals():
        step(checkpoint.load(recipe, engine.layout, *checkpoint.dump(engine)))


def _check_groups(engine: Engine, fresh: Engine) -> None:
    for i, group in enumerate(engine.optimizer.param_groups):
        usual = fresh.optimizer.param_groups[i]
        for name, value in group.items():
            where, known = f"groups[{i}].{name}", engine.entry.hyperparameters.get(name)
            if name in FLAGS:
                continue
            if name not in usual and name not in _LEFT_BY_SCHEDULERS:
                raise Invalid(f"{where} of the state file: {engine.entry.name} has no {name}")
            kinds = _kinds(value)
            if kinds and kinds != _kinds(usual.get(name)):
                raise Invalid(
                    f"{where} of the state file is a tensor, which {engine.entry.name} does not "
                    "make for this group"
                )
            if name in (*_SCHEDULED, *_LEFT_BY_SCHEDULERS):
                for part in _parts(value):
                    if part is not None and not _is_number(part):
                        raise Invalid(f"{where} must be a finite number, got {value!r:.80}")
            elif known is not None and value != known.default:
                known.check(value, where)


def _check_state(engine: Engine, fresh: Engine) -> None:
    total = sum(slot.numel for slot in engine.layout.slots)
    for name, parameter in engine.parameters.items():
        expected = _leaves(catalogue.read_state(fresh.optimizer, fresh.parameters[name]))
        usual = {tuple(parameter.shape), (), (1,), (total,)}
        found = _leaves(catalogue.read_state(engine.optimizer, parameter))
        for key, tensors in found.items():
            kinds = {(tuple(t.shape), t.dtype) for t in expected.get(key, [])}
            for tensor in tensors:
                shape = tuple(tensor.shape)
                if (shape, tensor.dtype) not in kinds and (kinds or shape not in usual):
                    raise Invalid(
                        f"'state/{name}/{key}' is {tensor.dtype} {list(shape)}, "
                        f"which {engine.entry.name} does not make for this parameter"
                    )


def _check_averages(engine: Engine) -> None:
    if engine.ema is not None and not _is_count(engine.ema.updates):
        raise Invalid(f"ema.updates must be an integer >= 0, got {engine.ema.updates!r:.80}")
    if engine.best is None:
        return
    value, version = engine.best.value, engine.best.version
    if (value is None) != (version is None):
        raise Invalid(f"best has the value {value!r:.80} and the version {version!r:.80}")
    if value is not None and not _is_number(value):
        raise Invalid(f"best.value must be a finite number, got {value!r:.80}")
    if version is not None and not _is_count(version):
        raise Invalid(f"best.version must be an integer >= 0, got {version!r:.80}")


def _check_window(window: Window, engine: Engine) -> None:
    if not _is_count(window.count) or not 0 <= window.count < max(window.steps, 1):
        raise Invalid(
            f"window.count must be an integer in [0, {window.steps}), got {window.count!r:.80}"
        )
    if window.sums and not window.count:
        raise Invalid("window.count is 0, but the state file has gradients of an open window")
    dtype = engine.params.flat.dtype
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for name, total in window.sums.items():
        parameter = engine.parameters[name]
        if total.is_sparse != (name in engine.recipe.sparse):
            raise Invalid(f"'window/{name}' is sparse where the gradient is not, or dense")
        if total.shape != parameter.shape or total.dtype != wide:
            raise Invalid(
                f"'window/{name}' is {total.dtype} {list(total.shape)}, "
                f"expected {wide} {list(parameter.shape)}"
            )


def _check_line_search(engine: Engine) -> None:
    search = engine.line_search
    if search is None:
        return
    if not isinstance(search.record, list):
        raise Invalid(f"line_search must be a list of evaluations, got {search.record!r:.80}")
    if not search.open:
        return
    if search.trial is None:
        raise Invalid("the state file has an open line search without the params to evaluate at")
    want = ((engine.params.flat.numel(),), engine.params.flat.dtype)
    for i, evaluation in enumerate(search.record):
        if not isinstance(evaluation, tuple) or len(evaluation) != 2:
            raise Invalid(f"line_search[{i}] must be a loss and a gradient, got {evaluation!r:.80}")
        loss, gradient = evaluation
        if not _is_number(loss):
            raise Invalid(f"line_search[{i}] has the loss {loss!r:.80}, must be a finite number")
        if (tuple(gradient.shape), gradient.dtype) != want:
            raise Invalid(
                f"'lbfgs/{i}/1' is {gradient.dtype} {list(gradient.shape)}, "
                f"expected {want[1]} {list(want[0])}"
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _kinds(value: Any) -> list[tuple[Any, ...]]:
    """Return the type, dtype and shape of the tensors in a group's value."""
    tensors = [part for part in _parts(value) if isinstance(part, torch.Tensor)]
    return [(type(value), tensor.dtype, *tensor.shape) for tensor in tensors]


def _leaves(state: Any, key: str = "") -> dict[str, list[torch.Tensor]]:
    """Return the tensors of a state by key; those of one list are together, whatever its length."""
    if isinstance(state, torch.Tensor):
        return {key: [state]}
    found: dict[str, list[torch.Tensor]] = {}
    items = state.items() if isinstance(state, dict) else ((None, item) for item in state)
    for name, item in items:
        if isinstance(item, (torch.Tensor, dict, list, tuple)):
            below = f"{key}/{name}".lstrip("/") if name is not None else key
            for found_key, tensors in _leaves(item, below).items():
                found.setdefault(found_key, []).extend(tensors)
    return found
