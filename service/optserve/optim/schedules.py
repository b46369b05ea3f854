"""Schedules of a session: check a specification, build torch's scheduler, step, save, go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from optserve.optim import schedule_specs
from optserve.optim.expressions import number, sentence
from optserve.optim.schedule_binding import Bare, Groups, Node, StandIn, construct, dump, read
from optserve.optim.schedule_catalogue import find
from optserve.optim.schedule_specs import Spec
from optserve_client.errors import Invalid, OptserveError, SchedulerFailed, TorchRefused

#: Lists with one value per group that a new group makes longer.
_PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "base_momentums", "max_momentums", "lr_lambdas")
#: Hyperparameters that torch's schedulers write.
_WRITTEN = ("lr", "momentum", "betas")


class _TakenBack(Exception):
    """A step was only a trial."""


class Scheduler:
    """A torch scheduler over the param groups of one optimizer; :func:`build` makes it."""

    def __init__(self, spec: Spec, groups: Groups, where: str) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        #: ``step`` if each applied update advances it, else ``manual``.
        self.advance: str = spec["advance"]
        #: What ReduceLROnPlateau follows with ``advance: step``: ``loss`` or a metric's name.
        self.monitor: str | None = spec.get("monitor")
        self.needs_metrics = find(self.name).needs_metrics
        self._groups = groups
        self._root = construct(spec, StandIn(groups), where)
        self._known = len(groups.param_groups)

    @property
    def last_epoch(self) -> int:
        """torch's last_epoch; a ChainedScheduler, which has none, has that of its first part."""
        node = self._root
        while not hasattr(node.made, "last_epoch"):
            node = node.children[0]
        return int(node.made.last_epoch)

    @property
    def last_lr(self) -> list[float]:
        """torch's get_last_lr(): one per group, as this scheduler last set or saw them."""
        return list(self._root.made.get_last_lr())

    def best_or(self, default: float) -> float:
        """Return the best metric so far, or ``default`` where there is none."""
        best = getattr(self._root.made, "best", math.inf)
        return float(best) if math.isfinite(best) else default

    def step(self, metrics: float | None = None) -> None:
        """Advance once and write the groups' lr (and momentum or betas, where it cycles them).

        ``metrics`` is a finite number for ReduceLROnPlateau and None for all others. Raises Invalid
        for wrong metrics, SchedulerFailed with torch's sentence if the next value cannot be
        computed or is not finite; then nothing has changed.
        """
        given = self.check_metrics(metrics)
        with self._unchanged_on_error():
            self.adopt_groups()
            try:
                self._root.made.step(*given)
                _check_finite(self._groups.param_groups)
            except OptserveError:
                raise
            except Exception as exc:
                at = self.last_epoch
                raise SchedulerFailed(f"{self.name} at step {at}: {sentence(exc)}") from exc

    def check_step(self, metrics: float | None = None) -> None:
        """Raise what :meth:`step` would raise; nothing changes."""
        with suppress(_TakenBack), self._unchanged_on_error():
            self.step(metrics)
            raise _TakenBack

    def check_metrics(self, metrics: float | None) -> tuple[float, ...]:
        """Return the arguments of torch's ``step``; raise Invalid for metrics it cannot take."""
        if self.needs_metrics and metrics is None:
            raise Invalid(f"metrics is required: {self.name} follows it", field="metrics")
        if not self.needs_metrics and metrics is not None:
            raise Invalid(f"metrics has no effect on {self.name}", field="metrics")
        return () if metrics is None else (number(metrics, "metrics"),)

    def check_new_group(self) -> None:
        """Raise Invalid if a further param group could not be scheduled."""
        for node in self._root.walk():
            for field, length in schedule_specs.per_group_lists(node.spec).items():
                path = f"{node.where}.{field}"
                raise Invalid(
                    f"{path} has {length} values, one per group, so no group can be added; "
                    "replace the scheduler first",
                    field=path,
                )

    def adopt_groups(self) -> None:
        """Take groups into the schedule that add_param_group has added since.

        torch leaves this to the user: most of its schedulers fail at their next step (``zip``,
        ``initial_lr``), and what users then write, ``scheduler.base_lrs.append(lr)``, is done here
        for each list that a class keeps. The group's own lr stays until the next step moves it, and
        counts as its initial lr. Those that multiply the current lr go on from it, as in torch; so
        a ConstantLR or LinearLR in its first total_iters steps ends above the lr that was given.
        """
        groups = self._groups.param_groups
        new = groups[self._known :]
        if not new:
            return
        self.check_new_group()
        with self._unchanged_on_error():
            for node in self._root.walk():
                if not node.children:
                    self._extend(node, new)
                node.made._last_lr = [*node.made._last_lr, *(group["lr"] for group in new)]
            self._known = len(groups)

    def _extend(self, node: Node, new: list[dict[str, Any]]) -> None:
        """Take from a fresh scheduler over copies of the new groups what torch's keeps of each."""
        copies = [dict(group) for group in new]
        standin = StandIn(Bare(param_groups=copies, defaults=self._groups.defaults))
        fresh = construct(node.spec, standin, node.where).made
        for name in _PER_GROUP:
            if hasattr(fresh, name):
                setattr(node.made, name, getattr(node.made, name) + getattr(fresh, name))
        for group, copy in zip(new, copies, strict=True):
            group.update({k: v for k, v in copy.items() if k not in _WRITTEN})

    def state(self) -> dict[str, Any]:
        """Return where the schedule stands, as strict JSON; the groups' values are not in it."""
        return dump(self._root)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, for a scheduler of the same specification.

        No group's lr is touched: the groups' values (lr, initial_lr, max_lr, ...) belong to the
        optimizer's state. Raises Invalid, with nothing loaded, if ``state`` is not one of these.
        """
        self.adopt_groups()
        count = len(self._groups.param_groups)
        for made, values in list(read(self._root, state, "scheduler.state", count)):
            made.__dict__.update(values)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        before = [(node.made, dict(node.made.__dict__)) for node in self._root.walk()]
        known = self._known
        try:
            with _groups_unchanged_on_error(self._groups.param_groups):
                yield
        except BaseException:
            for made, attributes in before:
                made.__dict__.clear()
                made.__dict__.update(attributes)
            self._known = known
            raise


def check(spec: Any, where: str = "scheduler") -> Spec:
    """Return the normalised specification after a dry run on throw-away groups.

    Raises Invalid naming the field, TorchRefused with torch's sentence, or SchedulerFailed if the
    first steps cannot be computed.
    """
    checked = schedule_specs.normalise(spec, where)
    steps, count = 3, 1
    for one, path in schedule_specs.walk(checked, where):
        count = max([count, *schedule_specs.per_group_lists(one).values()])
        if one["name"] == "OneCycleLR":
            steps = min(steps, _check_one_cycle(one, path))
    scheduler = build(checked, _throw_away(count), where)
    for _ in range(steps):
        scheduler.step(1.0 if scheduler.needs_metrics else None)
    return checked


def build(spec: Mapping[str, Any], optimizer: Groups, where: str = "scheduler") -> Scheduler:
    """Return torch's scheduler for ``spec``, bound to the groups of ``optimizer``.

    As in torch this may write lr, momentum and betas, and sets ``initial_lr`` where a group has
    none: after an earlier scheduler the first one's ``initial_lr`` stays. Raises TorchRefused with
    torch's sentence, or SchedulerFailed if a first value is not finite; then no group has changed.
    """
    checked = schedule_specs.normalise(spec, where)
    with _groups_unchanged_on_error(optimizer.param_groups):
        try:
            scheduler = Scheduler(checked, optimizer, where)
            _check_finite(optimizer.param_groups)
        except OptserveError:
            raise
        except ArithmeticError as exc:
            raise SchedulerFailed(f"{checked['name']} at step 0: {sentence(exc)}") from exc
        except Exception as exc:
            raise TorchRefused(sentence(exc), field=where) from exc
    return scheduler


def _throw_away(count: int) -> Bare:
    groups = [{"lr": 0.1, "momentum": 0.9} for _ in range(count)]
    return Bare(param_groups=groups, defaults={"lr": 0.1, "momentum": 0.9})


def _check_one_cycle(spec: Spec, where: str) -> int:
    """Make the steps at which a phase begins or ends; return the number of steps there are.

    torch divides by the length of each phase that it enters, and only when it enters it.
    """
    at = 0
    try:
        count = max([1, *schedule_specs.per_group_lists(spec).values()])
        made = construct(spec, StandIn(_throw_away(count)), where).made
        ends = [phase["end_step"] for phase in made._schedule_phases]
        near = {math.floor(end) + i for end in ends for i in (0, 1)} | {made.total_steps}
        for at in sorted(step for step in near if 0 <= step <= made.total_steps):
            made.last_epoch = at - 1
            made.step()
    except ZeroDivisionError as exc:
        raise Invalid(
            f"{where}: OneCycleLR divides by zero at step {at}: a phase has no length with "
            f"pct_start {spec['pct_start']:g}",
            field=f"{where}.pct_start",
        ) from exc
    except OptserveError:
        raise
    except Exception as exc:
        raise TorchRefused(sentence(exc), field=where) from exc
    return int(made.total_steps)


@contextmanager
def _groups_unchanged_on_error(groups: list[dict[str, Any]]) -> Iterator[None]:
    before = [dict(group) for group in groups]
    try:
        yield
    except BaseException:
        for group, values in zip(groups, before, strict=True):
            group.clear()
            group.update(values)
        raise


def _check_finite(groups: Sequence[Mapping[str, Any]]) -> None:
    for i, group in enumerate(groups):
        for name in _WRITTEN:
            value = group.get(name)
            first = value[0] if isinstance(value, tuple | list) else value
            if isinstance(first, complex) or (first is not None and not math.isfinite(first)):
                raise ArithmeticError(f"groups[{i}].{name} would be {value}, must be finite")
