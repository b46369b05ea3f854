"""The numbers of one session: params, torch's optimizer and scheduler, and one update of them.

An Engine knows nothing of versions, workers or journals. Whatever raises in the middle of an update
leaves it half-changed; its owner throws it away and builds it anew from the journal.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from optserve.optim import catalogue, devices, schedules
from optserve.optim.arena import Arena, GradientBuffer, GradientPool
from optserve.optim.averages import Best, Ema, Window
from optserve.optim.fused import FusedAdam
from optserve.optim.gradients import Gradients, Inspected, first_nonfinite, to_coo, total_norm
from optserve.optim.hyper import Shown, changed_hyper, from_json
from optserve.optim.layout import Layout
from optserve.optim.lbfgs import LineSearch
from optserve.optim.recipe import Recipe
from optserve.optim.reduce import Reduction, Source, combine
from optserve.optim.refusals import torchs_refusals
from optserve.optim.tree import tensors_of
from optserve_client import wire
from optserve_client.errors import Invalid, Nonfinite


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one push did."""

    #: An optimizer update was made.
    applied: bool
    #: Gradients now in the open accumulation window, if the session accumulates.
    accumulated: int | None = None
    #: Total norm of the combined gradient before clipping.
    grad_norm: float | None = None
    clip_coef: float | None = None
    #: Hyperparameters that the update used, per group.
    groups: Sequence[Mapping[str, Any]] = ()
    #: What the automatic scheduler moved: ``{"state": ..., "groups": [{changed}, ...]}``.
    moved: Mapping[str, Any] | None = None


class Engine:
    """Params in an arena, a torch optimizer over views of it, a scheduler, and averages."""

    def __init__(
        self, recipe: Recipe, layout: Layout, params: Mapping[str, wire.Tensor] | None
    ) -> None:
        self.recipe = recipe
        self.layout = layout
        self.entry = catalogue.find(recipe.optimizer)
        self.impl = self.entry.pick_impl(
            recipe.impl,
            recipe.device.split(":")[0],
            wire.dtype_name(layout.dtype),
            bool(recipe.sparse),
        )
        self.fingerprint = devices.fingerprint(
            recipe.device, wire.dtype_name(layout.dtype), self.impl
        )
        self.params = Arena(layout, recipe.device)
        if params is None:
            self.params.flat.fill_(1.0)
        else:
            self.params.fill(params)
        self.parameters = {n: torch.nn.Parameter(v) for n, v in self.params.views.items()}
        hyper = from_json({k: v for k, v in recipe.optimizer.items() if k != "name"})
        groups = [
            {**from_json(group), "params": [self.parameters[n] for n in group["params"]]}
            for group in recipe.groups
        ]
        self.optimizer = self.entry.build(groups, hyper, self.impl)
        self._step = self._plain_step()
        self._shown = Shown()
        self.torch_line = self.entry.torch_line(hyper, self.impl)
        self.set_scheduler(recipe.scheduler)
        self.ema = Ema(self.params, recipe.ema_decay) if recipe.ema_decay is not None else None
        self.best = Best(self.params, recipe.best_mode) if recipe.best_monitor else None
        self.window = Window(recipe.accumulate_steps, recipe.accumulate_reduce)
        self.line_search = LineSearch(self.optimizer) if self.entry.needs_loss else None
        self._make_pool()

    def _plain_step(self) -> Callable[[], object]:
        """Return torch's step without what its profiler and its hooks put around it, which takes
        as long as the update of a small session."""
        if not self.entry.torchs:
            return self.optimizer.step
        # Schedulers warn if they are stepped first; they find out by a wrapper of their own.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        step = torch.no_grad()(partial(inspect.unwrap(type(self.optimizer).step), self.optimizer))
        return FusedAdam(self.optimizer, step) if FusedAdam.fits(self.optimizer) else step

    def nbytes(self) -> int:
        """Return about how much memory the session takes: its tensors, a gradient, a reply."""
        states = (tensor for state in self.optimizer.state.values() for tensor in tensors_of(state))
        kept = [arena.flat for part in (self.ema, self.best) if part for arena in (part.arena,)]
        window = tensors_of(self.window.sums)
        record = tensors_of(self.line_search.record) if self.line_search is not None else []
        held = sum(t.numel() * t.element_size() for t in (*states, *kept, *window, *record))
        return held + 3 * self.layout.nbytes

    def _make_pool(self) -> None:
        dense = (n for n in self.layout.names if n not in self.recipe.sparse)
        self.pool = GradientPool(self.layout.subset(dense))

    # --- hyperparameters -------------------------------------------------------------------------

    def set_scheduler(self, spec: Mapping[str, Any] | None) -> None:
        """Attach a scheduler as torch does (which may change lr), or none."""
        self.scheduler = schedules.build(dict(spec), self.optimizer) if spec is not None else None
        self.advance = (spec or {}).get("advance", "manual")
        self.monitor = (spec or {}).get("monitor")

    def groups(self) -> list[dict[str, Any]]:
        """Return the effective hyperparameters of each group, as JSON; do not change them."""
        return self._shown.of(self.optimizer.param_groups)

    def learning_rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def check_change(self, changes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return ``changes`` to param_groups[0], [1], ... normalised; nothing is changed yet."""
        count = len(self.optimizer.param_groups)
        if len(changes) > count:
            raise Invalid(f"groups has {len(changes)} entries and the session has {count} groups")
        groups = self.optimizer.param_groups
        return [
            self.entry.normalise_change(change, f"groups[{i}]", groups[i])
            for i, change in enumerate(changes)
        ]

    def assign(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Write normalised values into param_groups."""
        for group, change in zip(self.optimizer.param_groups, changes, strict=False):
            group.update(change)

    def adjust(self, recipe: Recipe) -> None:
        """Take over clip, accumulate and nonfinite from ``recipe``; another window starts anew."""
        if (recipe.accumulate_steps, recipe.accumulate_reduce) != (
            self.recipe.accumulate_steps,
            self.recipe.accumulate_reduce,
        ):
            self.window = Window(recipe.accumulate_steps, recipe.accumulate_reduce)
        self.recipe = recipe

    def add_group(self, fields: Mapping[str, Any], params: Mapping[str, wire.Tensor]) -> None:
        """torch's add_param_group: new params behind the old ones, in a group of their own."""
        new = Layout.pack(
            self.layout.dtype,
            [(s.name, s.shape) for s in self.layout.slots]
            + [(name, tuple(tensor.shape)) for name, tensor in params.items()],
        )
        self.params = self.params.grown(new)
        self.params.fill(params)
        self.layout = new
        for name, parameter in self.parameters.items():
            parameter.data = self.params.views[name]
        added = {name: torch.nn.Parameter(self.params.views[name]) for name in params}
        self.parameters |= added
        self.optimizer.add_param_group({**fields, "params": list(added.values())})
        self._step = self._plain_step()
        if self.scheduler is not None:
            self.scheduler.adopt_groups()
        for kept in (self.ema, self.best):
            if kept is not None:
                kept.arena = kept.arena.grown(new)
                kept.arena.fill(params)
        self._make_pool()

    # --- one update ------------------------------------------------------------------------------

    def inspect(
        self, gradients: Gradients, loss_scale: float | None = None, *, negate: bool = False
    ) -> Inspected:
        """Unscale one gradient and look for NaN and Infinity; the session does not change.

        Multiplies by float32(1 / loss_scale) in place, as GradScaler. ``negate``: the gradient is
        minus what was sent. Raises Nonfinite, naming tensor and index, unless the session skips
        such gradients or loss_scale was sent.
        """
        grads = self._attach(gradients)
        if loss_scale is not None:
            inverse = float(np.float32(1.0 / loss_scale))
            for grad in grads.values():
                grad.mul_(inverse)
        inspected = _inspected(grads)
        if inspected.nonfinite and loss_scale is None and self.recipe.nonfinite == "reject":
            raise Nonfinite(inspected.nonfinite)
        if negate:
            _negate(grads)
        return inspected

    def combine(
        self,
        sources: Sequence[Source],
        buffer: GradientBuffer,
        how: Reduction,
        *,
        negate: bool = False,
    ) -> Inspected:
        """Return the gradient that a round makes of its pushes; it may have become infinite."""
        grads = combine(sources, self.layout.names, self.recipe.sparse, buffer, how)
        if negate:
            _negate(grads)
        if self.recipe.device != "cpu":
            grads = {name: grad.to(self.recipe.device) for name, grad in grads.items()}
        return _inspected(grads)

    def push(
        self,
        inspected: Inspected,
        *,
        metric: float | None = None,
        weight: float = 1.0,
        recorded: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Take one finite gradient in: accumulate, weigh, clip, step, average, schedule.

        ``metric`` is what an automatic ReduceLROnPlateau follows. ``recorded`` is the committed
        outcome when the journal is replayed: clip coefficient and schedule come from there.
        """
        grads, norm = inspected.grads, inspected.norm
        if self.window.steps > 1:
            self.window.add(grads)
            if not self.window.full:
                return Outcome(
                    applied=False, grad_norm=norm, groups=self.groups(), **self.window_state()
                )
            grads = self.window.close(self.params.flat.dtype)
            norm = total_norm(grads)
        if weight != 1.0:
            for grad in grads.values():
                grad.mul_(weight)
            norm = total_norm(grads)
        return self._update(grads, norm, metric, recorded)

    def _update(
        self,
        grads: Mapping[str, torch.Tensor],
        norm: float,
        metric: float | None,
        recorded: Mapping[str, Any] | None,
    ) -> Outcome:
        for name, parameter in self.parameters.items():
            grad = grads.get(name)
            # Classes that are not torch's own keep gradients, or feed them to BLAS, whose last bits
            # depend on alignment: they get copies, torch's get views of the buffer.
            parameter.grad = grad if grad is None or self.entry.torchs else grad.clone()
        used = self.groups()
        try:
            with torchs_refusals():
                clip_coef = self._clip(recorded)
                self._step()
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None
        return Outcome(
            applied=True,
            grad_norm=norm,
            clip_coef=clip_coef,
            groups=used,
            moved=self._after_update(metric, recorded),
            **self.window_state(),
        )

    def _after_update(
        self, metric: float | None, recorded: Mapping[str, Any] | None
    ) -> Mapping[str, Any] | None:
        if self.ema is not None:
            self.ema.update(self.params)
        return self.advance_scheduler(metric, recorded) if self.advance == "step" else None

    def _clip(self, recorded: Mapping[str, Any] | None) -> float | None:
        """torch.nn.utils' clip_grad_value_, then clip_grad_norm_, over all groups."""
        parameters = list(self.parameters.values())
        if self.recipe.clip_grad_value is not None:
            clip_grad_value_(parameters, self.recipe.clip_grad_value)
        if self.recipe.clip_grad_norm is None:
            return None
        grads = [p.grad for p in parameters if p.grad is not None]
        if recorded is None or recorded.get("clip_coef") is None:
            total = get_total_norm(grads)
            coef = torch.clamp(self.recipe.clip_grad_norm / (total + 1e-6), max=1.0)
            clip_grads_with_norm_(parameters, self.recipe.clip_grad_norm, total)
            return float(coef)
        coef = torch.tensor(recorded["clip_coef"], dtype=self.params.flat.dtype)
        if grads:
            torch._foreach_mul_(grads, coef.to(self.params.flat.device))
        return float(coef)

    def check_advance(self, metric: float | None) -> None:
        """Raise SchedulerFailed if the automatic scheduler could not follow the next update."""
        if self.scheduler is not None and self.advance == "step":
            self.scheduler.check_step(metric if self.scheduler.needs_metrics else None)

    def advance_scheduler(
        self, metric: float | None, recorded: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Advance the scheduler once, or put what ``recorded`` says it moved."""
        assert self.scheduler is not None
        if recorded is not None:
            moved: Mapping[str, Any] = recorded["moved"]
            self.scheduler.load(moved["state"])
            self.assign([from_json(change) for change in moved["groups"]])
            return moved
        before = self.groups()
        self.scheduler.step(metric if self.scheduler.needs_metrics else None)
        return {"state": self.scheduler.state(), "groups": changed_hyper(before, self.groups())}

    def eval_bytes(self) -> np.ndarray:
        """Return a read-only copy of the weights to evaluate with, where they are not live."""
        if not self.entry.eval_weights:
            raise Invalid(f"weights=eval: {self.entry.name} evaluates with its live weights")
        evaluated = self.params.clone()
        with torchs_refusals():
            weights = catalogue.eval_params(self.optimizer, self.parameters.values())
        for view, tensor in zip(evaluated.views.values(), weights, strict=True):
            view.copy_(tensor)
        return evaluated.copy_bytes()

    def window_state(self) -> dict[str, Any]:
        return {"accumulated": self.window.count} if self.window.steps > 1 else {}

    def _attach(self, gradients: Gradients) -> dict[str, torch.Tensor]:
        """Return the gradients as torch tensors in params order: views of the buffer, or COO."""
        gradients.buffer.widen()
        device, views = self.recipe.device, gradients.buffer.arena.views
        grads: dict[str, torch.Tensor] = {}
        for name in self.layout.names:
            if name in gradients.none:
                continue
            if (coo := gradients.sparse.get(name)) is not None:
                grads[name] = to_coo(coo).to(device)
            else:
                grads[name] = views[name] if device == "cpu" else views[name].to(device)
        return grads

    def check_finite(self, gradients: Gradients) -> None:
        """Raise Nonfinite if the gradient holds NaN or Infinity."""
        if where := first_nonfinite(self._attach(gradients)):
            raise Nonfinite(where)

    def evaluate(
        self,
        loss: float,
        gradients: Gradients,
        *,
        metric: float | None = None,
        recorded: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """LBFGS: take loss and gradient at the trial params; applied once the search is done."""
        assert self.line_search is not None
        grads = self._attach(gradients)
        flat = torch.cat(
            [
                grads[n].reshape(-1) if n in grads else torch.zeros_like(p).reshape(-1)
                for n, p in self.parameters.items()
            ]
        )
        norm, used = total_norm(grads), self.groups()
        if recorded is not None and not recorded["applied"]:
            self.line_search.remember(loss, flat)
            return Outcome(applied=False, grad_norm=norm, groups=used)
        if not self.line_search.evaluate(loss, flat, self.params):
            return Outcome(applied=False, grad_norm=norm, groups=used)
        moved = self._after_update(metric, recorded)
        return Outcome(applied=True, grad_norm=norm, groups=used, moved=moved)


def _negate(grads: Mapping[str, torch.Tensor]) -> None:
    for grad in grads.values():
        grad.neg_()


def _inspected(grads: Mapping[str, torch.Tensor]) -> Inspected:
    norm = total_norm(grads)
    # A finite gradient can have an infinite norm: only the search decides.
    where = None if math.isfinite(norm) else first_nonfinite(grads)
    return Inspected(grads=grads, norm=norm, nonfinite=where)
