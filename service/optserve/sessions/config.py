"""The create body: checked, completed and normalised, so that equal sessions compare equal.

The normalised config is plain JSON. It is what the create event stores, what status shows and what
a second PUT is compared with; :func:`recipe` is the part of it that ``optim`` needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from optserve.optim import catalogue, devices, schedules
from optserve.optim.layout import Layout
from optserve.optim.recipe import Recipe
from optserve.sentences import shown
from optserve.sessions.fields import Fields
from optserve.sessions.workers import Workers, check_fit
from optserve.store.base import DURABILITIES
from optserve_client import wire
from optserve_client.errors import Invalid

#: Tensors of one session.
MAX_PARAMS = 10_000
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=10_000)]
Tags = Annotated[dict[str, Annotated[str, Field(max_length=256)]], Field(max_length=64)]


class Accumulate(Fields):
    """How many gradients make one update, and how they combine."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    reduce: Literal["sum", "mean"] = "sum"


def _bare_number(value: Any) -> Any:
    return {"steps": value} if isinstance(value, (int, float)) else value


class Ema(Fields):
    """torch's AveragedModel with get_ema_multi_avg_fn."""

    decay: Annotated[float, Field(ge=0, le=1)] = 0.999


class Best(Fields):
    """Keep the params at which the monitored value was best."""

    monitor: Annotated[str, Field(min_length=1, max_length=128)] = "loss"
    mode: Literal["min", "max"] = "min"


class Description(Fields):
    """What people call a session."""

    name: Annotated[str, Field(max_length=256)] | None = None
    notes: Text | None = None
    tags: Tags = Field(default_factory=dict)


class Adjustable(Description):
    """What PATCH may change, and create may set."""

    clip_grad_norm: Positive | None = None
    clip_grad_value: Positive | None = None
    accumulate: Annotated[Accumulate, BeforeValidator(_bare_number)] = Accumulate(steps=1)
    nonfinite: Literal["reject", "skip"] = "reject"
    #: The session is deleted when it was not used for so long; None: the server's default.
    ttl_s: Positive | None = None
    #: Several workers push into the session; None: whoever steps must know the version.
    workers: Workers = None


class PatchFields(Adjustable):
    """The body of a PATCH."""

    durability: Literal["always", "os", "memory"] = "always"


class CreateFields(Adjustable):
    """Everything in a create body but ``params``."""

    #: A name, or an object with ``name`` and hyperparameters.
    optimizer: Any
    groups: list[dict[str, Any]] | None = None
    sparse: list[str] = Field(default_factory=list)
    #: An object, or a list of them: a ChainedScheduler.
    scheduler: Any = None
    ema: Ema | None = None
    best: Best | None = None
    maximize: bool = False
    dtype: str | None = None
    device: str = "auto"
    impl: Literal["auto", "fused", "foreach", "single"] = "auto"
    durability: Literal["always", "os", "memory"] | None = None
    order: list[str] | None = None


class ForkFields(Description):
    """The body of a fork."""

    id: str | None = None
    version: Annotated[int, Field(ge=0)] | None = None
    #: The source must still be of this generation.
    generation: str | None = None


def layout_of(params: Mapping[str, wire.Tensor]) -> Layout:
    """Return the layout of params that all have one dtype."""
    dtype = wire.dtype_of(next(iter(params.values())))
    return Layout.pack(dtype, ((name, tuple(t.shape)) for name, t in params.items()))


def check_count(count: int) -> None:
    """Refuse more params than the header of a state file can name."""
    if count > MAX_PARAMS:
        raise Invalid(f"params has {count} tensors, the limit is {MAX_PARAMS}")


def origin_layout(origin: Mapping[str, Any]) -> Layout:
    """Return the layout that a session was created with."""
    shapes = ((name, tuple(shape)) for name, shape in origin["params"])
    return Layout.pack(wire.dtype_tag(origin["dtype"]), shapes)


def order_params(
    params: Mapping[str, wire.Tensor], order: list[str] | None
) -> dict[str, wire.Tensor]:
    """Return params in the session's order, names checked."""
    if not params:
        raise Invalid("params is empty; a session needs at least one parameter")
    check_count(len(params))
    for name in params:
        wire.check_param_name(name)
    if order is None:
        return dict(params)
    if len(set(order)) != len(order) or set(order) != set(params):
        raise Invalid(f"order must name each of the {len(params)} params once, got {shown(order)}")
    return {name: params[name] for name in order}


def check_dtype(wanted: str | None) -> None:
    """Refuse a dtype that no session has."""
    if wanted is not None and wanted not in devices.DTYPES:
        raise Invalid(f"dtype must be one of {', '.join(devices.DTYPES)}, got {shown(wanted)}")


def settle_dtype(params: Mapping[str, wire.Tensor], wanted: str | None) -> dict[str, wire.Tensor]:
    """Return params in the session's dtype: ``wanted``, else the one that they all have."""
    found = {wire.dtype_of(tensor) for tensor in params.values()}
    if wanted is None:
        if len(found) > 1:
            names = ", ".join(sorted(wire.dtype_name(tag) for tag in found))
            raise Invalid(f"params have several dtypes ({names}); say which the session has: dtype")
        tag = found.pop()
        if wire.dtype_name(tag) not in devices.DTYPES:
            raise Invalid(
                f"params are {wire.dtype_name(tag)}; a session is one of "
                f"{', '.join(devices.DTYPES)}: say which with dtype"
            )
        return dict(params)
    check_dtype(wanted)
    return {n: wire.narrow(t, wire.dtype_tag(wanted)) for n, t in params.items()}


def normalise(
    fields: CreateFields,
    layout: Layout,
    default_device: str,
    promise: str,
    overrides: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the normalised config of a session with these params.

    ``overrides`` are what its groups set for themselves, where ``fields`` has no groups.
    """
    given = {"name": fields.optimizer} if isinstance(fields.optimizer, str) else fields.optimizer
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise Invalid(
            "optimizer must be a name or an object with a name and hyperparameters "
            f"(GET /v1/optimizers lists them), got {shown(given)}"
        )
    entry = catalogue.find(given)
    hyper = {k: v for k, v in given.items() if k != "name"}
    if fields.maximize:
        if not entry.maximize:
            raise Invalid(f"maximize: {entry.name} has no maximize; negate the gradients instead")
        if hyper.setdefault("maximize", True) is not True:
            raise Invalid("maximize is true and optimizer.maximize is not")
    _check_line_search(entry, fields)
    durability = fields.durability or promise
    check_durability(durability, promise)
    sparse = _matching(fields.sparse, layout.names, "sparse")
    if sparse and entry.sparse == "never":
        raise Invalid(f"sparse: {entry.name} does not take sparse gradients")
    device = default_device if fields.device == "auto" else fields.device
    hyper = entry.normalise(hyper, "optimizer", fields.groups or overrides)
    config = {
        "optimizer": {"name": entry.name, **hyper},
        "groups": _groups(fields.groups, entry, layout, hyper),
        "sparse": sorted(sparse),
        "scheduler": _scheduler(fields.scheduler),
        "ema": fields.ema.model_dump() if fields.ema else None,
        "best": fields.best.model_dump() if fields.best else None,
        "dtype": wire.dtype_name(layout.dtype),
        "device": devices.resolve(device),
        "impl": fields.impl,
        "durability": durability,
        **adjustable(fields),
    }
    check_fit(config, entry)
    return plain(config)


def check_durability(wanted: str, promise: str) -> None:
    """Refuse more than the server's store can promise."""
    if DURABILITIES.index(wanted) < DURABILITIES.index(promise):
        raise Invalid(
            f"durability must be {promise!r} on this server, whose store keeps sessions in memory, "
            f"got {wanted!r}"
        )


def renormalise(config: Mapping[str, Any], layout: Layout, device: str) -> dict[str, Any]:
    """Return a normalised config that came back from outside, checked as on its first day.

    It computes on ``device``, whatever the server did that it comes from.
    Its groups hold names where a create body has patterns.
    """
    given = {
        k: v for k, v in config.items() if k not in ("groups", "sparse", "durability", "device")
    }
    normal = normalise(
        CreateFields.parse(given), layout, device, config["durability"], config["groups"]
    )
    entry = catalogue.find(normal["optimizer"])
    groups = [
        {
            "params": group["params"],
            **entry.normalise_group(
                {k: v for k, v in group.items() if k != "params"}, f"groups[{i}]"
            ),
        }
        for i, group in enumerate(config["groups"])
    ]
    named = [name for group in groups for name in group["params"]]
    if sorted(named) != sorted(layout.names) or not set(config["sparse"]) <= set(layout.names):
        raise Invalid("the state file's groups do not hold each parameter once")
    return plain({**normal, "groups": groups, "sparse": sorted(config["sparse"])})


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` as it comes back from JSON, so that equal configs are equal values."""
    copied: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    return copied


def adjustable(fields: Adjustable) -> dict[str, Any]:
    """Return the part of the config that PATCH may change."""
    return fields.model_dump(include=set(Adjustable.model_fields))


def _scheduler(spec: Any) -> dict[str, Any] | None:
    return None if spec is None else schedules.check(spec, "scheduler")


def _check_line_search(entry: catalogue.Entry, fields: CreateFields) -> None:
    """LBFGS evaluates one gradient many times: what changes gradients has no meaning there."""
    if not entry.needs_loss:
        return
    for field in ("groups", "clip_grad_norm", "clip_grad_value", "sparse"):
        if getattr(fields, field):
            raise Invalid(f"{field} cannot be used with {entry.name}")
    if adjustable(fields)["accumulate"]["steps"] != 1:
        raise Invalid(f"accumulate cannot be used with {entry.name}")


def _matching(patterns: Iterable[str], names: list[str], where: str) -> set[str]:
    found: set[str] = set()
    for i, pattern in enumerate(patterns):
        regex = _pattern(pattern)
        matched = {name for name in names if regex.fullmatch(name)}
        if not matched:
            raise Invalid(f"{where}[{i}]: no parameter matches {shown(pattern)}")
        found |= matched
    return found


def _pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern that knows only ``*`` and ``?``."""
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(c) or re.escape(c) for c in pattern), re.DOTALL)


def _groups(
    groups: list[dict[str, Any]] | None,
    entry: catalogue.Entry,
    layout: Layout,
    hyper: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Resolve patterns to names: the first match wins, what is left forms one more group."""
    if groups is None:
        return [{"params": layout.names}]
    left = list(layout.names)
    resolved = []
    for i, group in enumerate(groups):
        patterns = group.get("params")
        if isinstance(patterns, str):
            patterns = [patterns]
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise Invalid(
                f"groups[{i}].params must be a list of name patterns, got {shown(patterns)}"
            )
        regexes = [_pattern(p) for p in patterns]
        taken = [name for name in left if any(r.fullmatch(name) for r in regexes)]
        if not taken:
            raise Invalid(
                f"groups[{i}] is empty: {shown(patterns)} matches no parameter "
                "that the groups before it left"
            )
        left = [name for name in left if name not in set(taken)]
        overrides = {k: v for k, v in group.items() if k != "params"}
        checked = entry.normalise_group(overrides, f"groups[{i}]", hyper)
        resolved.append({"params": taken, **checked})
    return resolved + ([{"params": left}] if left else [])


def origin(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return what a second PUT must equal: the config with names and shapes, not values.

    Hyperparameters that were left out count as their defaults.
    """
    entry = catalogue.find(config["optimizer"])
    defaults = {k: h.json_default for k, h in entry.hyperparameters.items()}
    shapes = [[slot.name, list(slot.shape)] for slot in layout.slots]
    # Sessions that were created before there were workers have no such field.
    fields = {k: v for k, v in config.items() if k != "workers" or v is not None}
    return plain({**fields, "optimizer": {**defaults, **config["optimizer"]}, "params": shapes})


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return which fields differ, for a sentence."""
    names = [name for name in new if old.get(name) != new[name]]
    return (
        f": {', '.join(names)} differ"
        if len(names) > 1
        else f": {names[0]} differs"
        if names
        else ""
    )


def recipe(config: Mapping[str, Any]) -> Recipe:
    """Return the part of a normalised config that computes."""
    best = config["best"] or {}
    return Recipe(
        optimizer=config["optimizer"],
        groups=tuple(config["groups"]),
        sparse=frozenset(config["sparse"]),
        scheduler=config["scheduler"],
        clip_grad_norm=config["clip_grad_norm"],
        clip_grad_value=config["clip_grad_value"],
        accumulate_steps=config["accumulate"]["steps"],
        accumulate_reduce=config["accumulate"]["reduce"],
        ema_decay=(config["ema"] or {}).get("decay"),
        best_monitor=best.get("monitor"),
        best_mode=best.get("mode", "min"),
        nonfinite=config["nonfinite"],
        device=config["device"],
        impl=config["impl"],
    )
