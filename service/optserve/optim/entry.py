"""One optimizer of the catalogue: what it takes, how it is checked and built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from optserve.optim import effects, probing
from optserve.optim.hyperparameters import (
    Hyper,
    arguments,
    schema_of,
    unknown,
)
from optserve.optim.refusals import torchs_refusals
from optserve_client.errors import Invalid, OptserveError, TorchRefused

#: Changes that schedules make at every step; the schema is check enough.
_CHANGED_OFTEN = frozenset({"lr", "betas", "momentum", "weight_decay"})
_FUSED_DEVICES = ("cpu", "cuda")
_FUSED_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One optimizer."""

    name: str
    #: The class that computes: ``torch.optim.AdamW``. It is imported at first use.
    source: str
    #: Other names that :func:`optserve.optim.catalogue.find` takes.
    aliases: tuple[str, ...] = ()
    #: One line; "" is the first sentence of the class's docstring.
    meaning: str = ""
    #: Arguments that the name itself decides, and defaults that it replaces.
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Arguments that are not offered.
    leave_out: frozenset[str] = frozenset()
    #: Group hyperparameters that must stay as they were when the optimizer was made.
    frozen: frozenset[str] = frozenset()
    #: The least that :meth:`normalise` takes.
    example: Mapping[str, Any] = field(default_factory=dict)
    sparse: Literal["never", "allowed", "only"] = "never"
    #: Steps by loss and gradients at several params: LBFGS.
    needs_loss: bool = False
    #: Takes several param_groups.
    groups: bool = True
    #: Evaluates with other weights than it trains: ScheduleFree.
    eval_weights: bool = False

    # --- the class -------------------------------------------------------------------------------

    @cached_property
    def cls(self) -> type[torch.optim.Optimizer]:
        module, _, name = self.source.rpartition(".")
        found: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
        return found

    @property
    def torchs(self) -> bool:
        """Whether torch.optim has the class."""
        return self.source.startswith("torch.")

    @cached_property
    def impls(self) -> tuple[str, ...]:
        """The implementations that can be asked for, of ``single``, ``foreach``, ``fused``."""
        names = inspect.signature(self.cls).parameters
        hidden = self.fixed.keys() | self.leave_out
        return ("single", *(f for f in ("foreach", "fused") if f in names and f not in hidden))

    @cached_property
    def hyperparameters(self) -> Mapping[str, Hyper]:
        """What the ``optimizer`` object of a session may hold, in the constructor's order."""
        said, found = probing.docs(self.cls), {}
        for name, parameter in arguments(self.cls).items():
            schema = schema_of(parameter)
            if name in self.fixed or name in self.leave_out or schema is None:
                continue
            required = parameter.default is inspect.Parameter.empty
            default = self.defaults.get(name, None if required else parameter.default)

            def accepts(value: Any, name: str = name) -> bool:
                return self._accepts({name: value})

            found[name] = Hyper(
                default=default,
                schema=probing.with_bounds(name, schema, default, accepts),
                doc=said.get(name, ""),
                required=required,
            )
        return found

    def wrapping(self, spec: Mapping[str, Any]) -> Entry:
        """Return this entry as it is for a whole ``optimizer`` object; see Lookahead."""
        return self

    @property
    def maximize(self) -> bool:
        return "maximize" in self.hyperparameters

    @cached_property
    def per_group(self) -> frozenset[str]:
        """Hyperparameters that the class keeps in its param_groups."""
        made = self.build([{"params": [probing.stand_in()]}], self.example, "default")
        return frozenset(made.defaults) & frozenset(self.hyperparameters)

    def _accepts(self, hyper: Mapping[str, Any]) -> bool:
        try:
            self.build([{"params": [probing.stand_in()]}], {**self.example, **hyper}, "default")
        except OptserveError:
            return False
        return True

    # --- checks ----------------------------------------------------------------------------------

    def normalise(
        self,
        hyper: Mapping[str, Any],
        where: str = "optimizer",
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """Return the hyperparameters of a create body; what was left out stays left out.

        ``groups`` are what its groups set for themselves: a hyperparameter may have its effect
        there only. Raises Invalid naming field, value and bound.
        """
        checked = self._checked(hyper, where)
        for name, known in self.hyperparameters.items():
            if known.required and name not in checked:
                raise Invalid(
                    f"{where}.{name} is missing: {self.name} needs it ({known.doc})",
                    field=f"{where}.{name}",
                )
        cases = [self._complete(checked, group) for group in groups] or [self._complete(checked)]
        effects.check(self.name, checked, cases, self._defaults, where)
        return checked

    def normalise_group(
        self, overrides: Mapping[str, Any], where: str, hyper: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what one param_group sets for itself.

        With ``hyper``, the session's own, what the class refuses in combination is refused too:
        torch does not look at the groups.
        """
        checked = self._checked(overrides, where)
        self._check_per_group(checked, where)
        if hyper is not None:
            effects.check(
                self.name, checked, [self._complete(hyper, checked)], self._defaults, where
            )
            self._rehearse({**hyper, **checked}, where)
        return checked

    def normalise_change(
        self, change: Mapping[str, Any], where: str, group: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return new values for a param_group of a live optimizer.

        torch does not check these: what the constructor would refuse is refused here, and so is
        what the state is laid out by. With the live ``group`` the combination is checked, too.
        """
        checked = self._checked(change, where)
        self._check_per_group(checked, where)
        for name in checked:
            if name in self.frozen:
                raise Invalid(
                    f"{where}.{name} is fixed when the session is created: "
                    f"the state of {self.name} was made with it",
                    field=f"{where}.{name}",
                )
        if group is not None and checked.keys() - _CHANGED_OFTEN:
            now = {name: group[name] for name in self.per_group}
            case = {**self._complete(self.example, now), **checked}
            effects.check(self.name, checked, [case], self._defaults, where)
            self._rehearse({**self.example, **now}, where, checked)
        return checked

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return {name: hyper.default for name, hyper in self.hyperparameters.items()}

    def _complete(self, *given: Mapping[str, Any]) -> dict[str, Any]:
        made = {**self._defaults, **self.fixed}
        for mapping in given:
            made |= {name: value for name, value in mapping.items() if name in made}
        return made

    def _checked(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        known = self.hyperparameters
        for name in given:
            if name not in known:
                raise unknown(name, known, self.name, where)
        return {n: known[n].check(value, f"{where}.{n}") for n, value in given.items()}

    def _check_per_group(self, given: Mapping[str, Any], where: str) -> None:
        for name in given:
            if name not in self.per_group:
                raise Invalid(
                    f"{where}.{name}: {self.name} has one {name} for all groups, "
                    "fixed when the session is created",
                    field=f"{where}.{name}",
                )

    def _rehearse(
        self, hyper: Mapping[str, Any], where: str, change: Mapping[str, Any] | None = None
    ) -> None:
        """Make the class say what it has against ``hyper``, or against a change of them."""
        steps = not self.needs_loss and self.sparse != "only"

        def built(given: Mapping[str, Any]) -> torch.optim.Optimizer:
            return self.build([{"params": [probing.stand_in()]}], given, "default")

        try:
            with torchs_refusals():
                made = built(hyper)
                if steps:
                    made.step()
                if change:
                    built({**hyper, **change})
                    made.param_groups[0].update(change)
                    if steps:
                        made.step()
        except TorchRefused as exc:
            raise TorchRefused(f"{where}: {exc.detail}") from exc

    # --- building --------------------------------------------------------------------------------

    def pick_impl(self, impl: str, device: str, dtype: str, sparse: bool) -> str:
        """Return the implementation to build; ``default`` is the class's own pick.

        ``device`` is ``cpu``, ``cuda`` or ``cuda:i``, ``dtype`` torch's name of it.
        """
        fused = (
            "fused" in self.impls
            and device.partition(":")[0] in _FUSED_DEVICES
            and dtype in _FUSED_DTYPES
        )
        if impl == "auto":
            return "fused" if fused and not sparse else "default"
        if impl not in self.impls:
            raise Invalid(
                f"impl must be auto or {' or '.join(self.impls)} with {self.name}, got {impl!r}",
                field="impl",
            )
        if impl == "fused" and sparse:
            raise Invalid("impl: fused does not take sparse gradients", field="impl")
        if impl == "fused" and not fused:
            raise Invalid(f"impl: fused is not there for {dtype} on {device}", field="impl")
        return impl

    def flags(self, impl: str) -> dict[str, Any]:
        """Return the constructor's flags for an implementation."""
        if impl == "single":
            return {"foreach": False} if "foreach" in self.impls else {}
        return {} if impl == "default" else {impl: True}

    def build(
        self, param_groups: list[dict[str, Any]], hyper: Mapping[str, Any], impl: str
    ) -> torch.optim.Optimizer:
        """Construct the class over these groups; raise TorchRefused with its sentence."""
        given = {**self.defaults, **hyper, **self.fixed}
        with torchs_refusals():
            made: torch.optim.Optimizer = self.cls(
                [{**g, **self._values(g)} for g in param_groups],
                **self._values(given),
                **self.flags(impl),
            )
        if self.eval_weights:
            made.train()  # type: ignore[attr-defined]
        return made

    def _values(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Return hyperparameters as the constructor takes them: dtypes, and tuples for lists."""
        made = {}
        for name, value in hyper.items():
            if name == "params":
                continue
            if isinstance(value, str) and name in self._named_dtypes:
                value = getattr(torch, value)
            made[name] = tuple(value) if isinstance(value, list) else value
        return made

    @cached_property
    def _named_dtypes(self) -> frozenset[str]:
        return frozenset(
            name for name, p in arguments(self.cls).items() if "torch.dtype" in str(p.annotation)
        )

    def torch_line(self, hyper: Mapping[str, Any], impl: str) -> str:
        """Return the line of Python that builds the same optimizer."""
        given = self._values({**self.defaults, **hyper, **self.fixed}) | self.flags(impl)
        return f"{self.source}({', '.join(['params', *(f'{k}={v!r}' for k, v in given.items())])})"

    # --- what the catalogue shows ----------------------------------------------------------------

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of ``optimizer`` in a create body."""
        names = [self.name, *self.aliases]
        properties: dict[str, Any] = {"name": {"enum": names}}
        for name, hyper in self.hyperparameters.items():
            properties[name] = {**hyper.schema, "description": hyper.doc}
            if not hyper.required:
                properties[name]["default"] = hyper.json_default
        required = [name for name, hyper in self.hyperparameters.items() if hyper.required]
        return {
            "type": "object",
            "title": self.name,
            "properties": properties,
            "required": ["name", *required],
            "additionalProperties": False,
        }

    @property
    def in_words(self) -> str:
        """The one line that says what it is."""
        return self.meaning or probing.meaning(self.cls)
