"""What a session should be: the changes that were acknowledged, and torch's own numbers for them.

A :class:`Story` notes what a client was told happened to one session. Its notes form a tree, since
a fork and a rollback go on from an earlier point. :meth:`Tree.check` then makes the same training
with torch's classes over plain Parameters, and compares state files with it bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim import lr_scheduler as torchs
from torch.optim.swa_utils import get_ema_multi_avg_fn

from optserve.optim import catalogue
from optserve.optim.arena import from_wire
from optserve.optim.tree import unflatten
from optserve.sessions import frames
from optserve_client import wire
from tests.integration.parity import resolve

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, wire.Tensor]
#: Python's own spelling of the expressions that specs here may hold.
FUNCTIONS: dict[str, Callable[[int], float]] = {
    "0.999 ** epoch": lambda epoch: 0.999**epoch,
    "1 / (1 + epoch / 50)": lambda epoch: 1 / (1 + epoch / 50),
}
_FLAGS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
}


def tensors(seed: int, shapes: Shapes, dtype: str = "float32") -> Tensors:
    """Return normal random tensors as a client sends them."""
    rng = np.random.default_rng(seed)
    made: Tensors = {}
    for name, shape in shapes.items():
        values = np.asarray(rng.normal(size=shape), "f8" if dtype == "float64" else "f4")
        made[name] = wire.Bits.bfloat16(values) if dtype == "bfloat16" else values
    return made


def objective(at: Mapping[str, Any], seed: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return value and gradient of a convex function of ``at`` that ``seed`` chooses."""
    rng, total = np.random.default_rng(seed), 0.0
    grads = {}
    for name, value in at.items():
        x = np.asarray(value)
        scale, centre = rng.uniform(0.5, 4, x.shape), rng.normal(size=x.shape)
        away = x - centre
        total += float(np.sum(scale * away * away)) / 2
        grads[name] = np.asarray(scale * away, x.dtype)
    return float(np.float32(total)), grads


class Twin:
    """The training of one session with torch itself, in the order that the design gives."""

    def __init__(self, body: Mapping[str, Any], params: Tensors, impl: str) -> None:
        self.leaves = {n: torch.nn.Parameter(from_wire(t).clone()) for n, t in params.items()}
        self.dtype = next(iter(self.leaves.values())).dtype
        self.shapes = {n: tuple(p.shape) for n, p in self.leaves.items()}
        entry = catalogue.find(body["optimizer"]["name"])
        hyper = {k: v for k, v in body["optimizer"].items() if k != "name"}
        flag = {} if entry.impls == ("single",) else _FLAGS.get(impl, {})
        self.optimizer = resolve(entry.source)(
            self._groups(body), **{**entry.defaults, **hyper, **entry.fixed, **flag}
        )
        self._clip = body.get("clip_grad_norm")
        self._schedule(body.get("scheduler"))
        accumulate = body.get("accumulate", 1)
        if isinstance(accumulate, int):
            accumulate = {"steps": accumulate, "reduce": "sum"}
        self._window, self._reduce = accumulate["steps"], accumulate["reduce"]
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        #: LBFGS evaluations of the search that is open.
        self.evaluations = 0
        self._decay = body["ema"]["decay"] if "ema" in body else None
        self.average: list[torch.Tensor] = []
        self.averaged = 0
        self.keeps_best = "best" in body
        self.best = {n: p.detach().clone() for n, p in self.leaves.items()}
        self.best_value: float | None = None
        self.best_version: int | None = None

    def _groups(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Param groups of a body whose groups give names and no patterns, the rest at the end."""
        left, groups = dict(self.leaves), []
        for group in body.get("groups", ()):
            members = [left.pop(name) for name in group["params"]]
            groups.append({**group, "params": members})
        if left:
            groups.append({"params": list(left.values())})
        return groups

    def _schedule(self, spec: Mapping[str, Any] | None) -> None:
        self.scheduler: Any = None
        self._automatic, self._monitor = False, None
        if spec is None:
            return
        own = {"name", "advance", "monitor"}
        arguments = {k: v for k, v in spec.items() if k not in own}
        if "lr_lambda" in arguments:
            arguments["lr_lambda"] = FUNCTIONS[arguments["lr_lambda"]]
        self.scheduler = getattr(torchs, spec["name"])(self.optimizer, **arguments)
        self._automatic = spec.get("advance") == "step"
        self._monitor = spec.get("monitor")

    def copied(self) -> Twin:
        """Return an independent twin in the same state."""
        memo: dict[int, Any] = {}
        made = copy.deepcopy(self, memo)
        # Optimizers copy state and groups only, not what else their __init__ makes.
        for key, value in vars(self.optimizer).items():
            if key != "step" and key not in vars(made.optimizer):
                setattr(made.optimizer, key, copy.deepcopy(value, memo))
        return made

    # --- changes ---------------------------------------------------------------------------------

    def push(self, grads: Tensors, loss: float | None, version: int) -> None:
        """Take one gradient; ``version`` is the session's before it."""
        self.offer_best(loss, version)
        local = {name: from_wire(grad).clone() for name, grad in grads.items()}
        if self._window > 1:
            for name, grad in local.items():
                wide = grad.float() if grad.dtype == torch.bfloat16 else grad
                self.sums[name] = self.sums[name] + wide if self.count else wide
            self.count += 1
            if self.count < self._window:
                return
            total, self.sums, self.count = self.sums, {}, 0
            if self._reduce == "mean":
                total = {name: grad / self._window for name, grad in total.items()}
            local = {name: grad.to(self.dtype) for name, grad in total.items()}
        for name, leaf in self.leaves.items():
            leaf.grad = local[name]
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self.leaves.values(), self._clip)
        self.optimizer.step()
        self._after(loss)

    def evaluate(self, seed: int, done: bool) -> None:
        """Note one evaluation of an LBFGS step, and make the step with the last one."""
        self.evaluations += 1
        if not done:
            return
        calls = 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            at = {n: p.detach().numpy() for n, p in self.leaves.items()}
            loss, grads = objective(at, seed)
            for name, leaf in self.leaves.items():
                leaf.grad = torch.from_numpy(grads[name])
            return loss

        self.optimizer.step(closure)
        assert calls == self.evaluations, f"torch evaluates {calls} times, not {self.evaluations}"
        self.evaluations = 0
        self._after(None)

    def _after(self, loss: float | None) -> None:
        if self._decay is not None:
            self._take_average()
        if self._automatic:
            self.advance(loss if self._monitor else None)

    def _take_average(self) -> None:
        live = [p.detach().clone() for p in self.leaves.values()]
        if self.dtype == torch.bfloat16:
            live = [p.float() for p in live]
        if self.averaged == 0:
            self.average = live
        else:
            step = get_ema_multi_avg_fn(self._decay)  # type: ignore[no-untyped-call]
            step(self.average, live, self.averaged)
        self.averaged += 1

    def offer_best(self, value: float | None, version: int) -> None:
        """Keep the live params as the best ones if ``value`` is below all others."""
        if not self.keeps_best or value is None:
            return
        if self.best_value is None or value < self.best_value:
            self.best_value, self.best_version = value, version
            self.best = {n: p.detach().clone() for n, p in self.leaves.items()}

    def advance(self, metrics: float | None) -> None:
        with warnings.catch_warnings():
            # torch's advice to step the optimizer first; sessions may be asked not to.
            warnings.simplefilter("ignore", UserWarning)
            self.scheduler.step(*([] if metrics is None else [metrics]))

    def fill(self, params: Tensors) -> None:
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(from_wire(params[name]))

    # --- comparison ------------------------------------------------------------------------------

    def check(self, exported: bytes | memoryview, version: int, updates: int) -> None:
        """Compare with a state file: every tensor, hyperparameter and counter."""
        frame = frames.decode(bytes(exported))
        found = {name: from_wire(tensor) for name, tensor in frame.tensors.items()}
        meta = frame.meta["engine"]
        assert (frame.meta["version"], frame.meta["updates"]) == (version, updates)
        for name, leaf in self.leaves.items():
            assert same(found[f"param/{name}"], leaf.detach()), f"param {name} differs"
        for name, leaf in self.leaves.items():
            kept = unflatten(meta["state"][name], found)
            for key, value in self.optimizer.state.get(leaf, {}).items():
                assert same(kept[key], value), f"state {name}/{key}: {kept[key]} is not {value}"
        self._check_groups([unflatten(group["hyper"], found) for group in meta["groups"]])
        self._check_scheduler(meta["scheduler"])
        assert meta.get("window", {}).get("count", 0) == self.count
        if self.count:
            assert same(unflatten(meta["window"]["sums"], found), self.sums)
        if self._decay is not None and self.averaged:
            assert meta["ema"]["updates"] == self.averaged
            for name, mean in zip(self.leaves, self.average, strict=True):
                assert same(found[f"ema/{name}"], mean), f"ema {name} differs"
        if self.keeps_best:
            best = {"value": self.best_value, "version": self.best_version}
            assert meta["best"] == best, f"best is {meta['best']}, expected {best}"
            for name, tensor in self.best.items():
                assert same(found[f"best/{name}"], tensor), f"best {name} differs"

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        assert len(groups) == len(self.optimizer.param_groups)
        for kept, group in zip(groups, self.optimizer.param_groups, strict=True):
            for key, value in group.items():
                if key in kept:
                    assert same(kept[key], value), f"{key} is {kept[key]}, torch has {value}"
            assert "lr" in kept

    def _check_scheduler(self, kept: Mapping[str, Any] | None) -> None:
        assert (kept is None) == (self.scheduler is None)
        for key, value in (kept or {}).items():
            if isinstance(value, (int, float)):
                assert value == getattr(self.scheduler, key), f"scheduler.{key} is {value}"


def same(a: Any, b: Any) -> bool:
    """Say whether two values of torch's state are equal, tensors by dtype, shape and every bit."""
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(b, Mapping):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in b)
    return bool(a == b)


# --- what can happen to a session ----------------------------------------------------------------


class Change(Protocol):
    """Something that a client was told happened."""

    def apply(self, twin: Twin, version: int) -> None:
        """Do the same to the twin; ``version`` is the session's before it."""


@dataclass(frozen=True, slots=True)
class Step:
    """A gradient; it is drawn again from its seed."""

    seed: int
    loss: float | None = None

    def apply(self, twin: Twin, version: int) -> None:
        name = str(twin.dtype).removeprefix("torch.")
        twin.push(tensors(self.seed, twin.shapes, name), self.loss, version)


@dataclass(frozen=True, slots=True)
class Evaluate:
    """One evaluation of :func:`objective` for LBFGS."""

    seed: int
    done: bool

    def apply(self, twin: Twin, version: int) -> None:
        twin.evaluate(self.seed, self.done)


@dataclass(frozen=True, slots=True)
class PutParams:
    seed: int

    def apply(self, twin: Twin, version: int) -> None:
        name = str(twin.dtype).removeprefix("torch.")
        twin.fill(tensors(self.seed, twin.shapes, name))


@dataclass(frozen=True, slots=True)
class PatchGroup:
    index: int
    lr: float

    def apply(self, twin: Twin, version: int) -> None:
        twin.optimizer.param_groups[self.index]["lr"] = self.lr


@dataclass(frozen=True, slots=True)
class Advance:
    """``scheduler.step()``."""

    def apply(self, twin: Twin, version: int) -> None:
        twin.advance(None)


@dataclass(frozen=True, slots=True)
class PutLoss:
    """The loss of the current version, which came later."""

    loss: float

    def apply(self, twin: Twin, version: int) -> None:
        twin.offer_best(self.loss, version)


@dataclass(frozen=True, slots=True)
class Nothing:
    """A change that no number shows: a pin, a rollback whose parent is where it went."""

    def apply(self, twin: Twin, version: int) -> None:
        pass


# --- the tree ------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Node:
    """The state of a session after one change."""

    change: Change
    parent: Node | None
    version: int
    updates: int
    #: The version before the change, as the session counted it.
    before: int
    children: int = 0
    #: State files that were exported here.
    exports: list[bytes] = field(default_factory=list)


class Tree:
    """A session, its forks, and the forks of those."""

    def __init__(self, body: Mapping[str, Any], params: Tensors, impl: str) -> None:
        self._body, self._params, self._impl = body, params, impl
        #: Parents come before their children.
        self.nodes = [Node(Nothing(), None, 0, 0, 0)]

    def add(self, change: Change, parent: Node, version: int, updates: int, before: int) -> Node:
        node = Node(change, parent, version, updates, before)
        parent.children += 1
        self.nodes.append(node)
        return node

    @property
    def steps(self) -> int:
        """How many gradients were acknowledged."""
        return sum(isinstance(node.change, (Step, Evaluate)) for node in self.nodes)

    def check(self) -> int:
        """Make the whole training with torch, compare every export; return how many there were.

        On one thread, as servers with ``--threads 1``.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._check()
        finally:
            torch.set_num_threads(threads)

    def _check(self) -> int:
        first = self.nodes[0]
        at = {id(first): Twin(self._body, self._params, self._impl)}
        waiting = {id(node): node.children for node in self.nodes}
        compared = 0
        for node in self.nodes:
            if node.parent is not None:
                parent = id(node.parent)
                waiting[parent] -= 1
                twin = at[parent].copied() if waiting[parent] else at.pop(parent)
                node.change.apply(twin, node.before)
                at[id(node)] = twin
            for exported in node.exports:
                at[id(node)].check(exported, node.version, node.updates)
                compared += 1
            if not waiting[id(node)]:
                del at[id(node)]
        return compared


class Story:
    """What one client, the only one to change it, knows of a session."""

    def __init__(self, tree: Tree, head: Node | None = None) -> None:
        self.tree = tree
        self.first = self.head = head or tree.nodes[0]
        #: In the order in which they were acknowledged: the events after the first.
        self.log: list[Node] = []
        self._made = {self.head.version: self.head}

    @property
    def version(self) -> int:
        return self.log[-1].version if self.log else self.first.version

    @property
    def updates(self) -> int:
        return self.head.updates

    def note(self, change: Change, *, moves: bool = False, updates: int = 0) -> None:
        """Note a change of the current state; ``moves``: it made a version."""
        version, total = self.version + int(moves), self.head.updates + updates
        self._append(self.tree.add(change, self.head, version, total, self.version), moves)

    def roll_back(self, version: int) -> None:
        target, now = self.at(version), self.version
        node = self.tree.add(Nothing(), target, now + 1, target.updates, now)
        self._append(node, moves=True)

    def _append(self, node: Node, moves: bool) -> None:
        self.log.append(node)
        self.head = node
        if moves:
            self._made[node.version] = node

    def at(self, version: int) -> Node:
        """Return the state of a version; of the current one as it is by now."""
        return self.head if version == self.version else self._made[version]

    def plain(self, version: int) -> bool:
        """Whether the next version followed directly: no other change belongs to this one too."""
        for node in reversed(self.log):
            if node.version < version:
                break
            changed = node is not self._made[version] and not isinstance(node.change, Nothing)
            if node.version == version and changed:
                return False
        return True

    def forked(self, version: int | None) -> Story:
        return Story(self.tree, self.head if version is None else self.at(version))

    def rewind(self, changes: int) -> None:
        """The session has forgotten all but its first ``changes`` changes."""
        del self.log[changes:]
        self.head = self.log[-1] if self.log else self.first
        self._made = {self.first.version: self.first}
        for before, node in zip([self.first, *self.log], self.log, strict=False):
            if node.version > before.version:
                self._made[node.version] = node
