"""A ``torch.optim.Optimizer`` whose state and arithmetic live on an optserve server.

    optimizer = RemoteOptimizer(model.parameters(), "AdamW", lr=1e-3, client=Client(url))

Training loops stay as they are: gradients go up, updated parameters come back in place, and torch's
own ``lr_scheduler`` classes drive it. The only file of the client that needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import numpy as np

from optserve_client import errors, wire
from optserve_client._arguments import given
from optserve_client._remote import SESSION_FIELDS, check_client, described, named_in, sparse_names
from optserve_client._values import Json, Sparse, StepResult
from optserve_client.client import Client
from optserve_client.session import Session

try:
    import torch
except ModuleNotFoundError as exc:
    if exc.name != "torch":
        raise
    raise ModuleNotFoundError(
        "optserve_client.torch needs torch: pip install 'optserve-client[torch]'", name="torch"
    ) from exc

#: In a state_dict: the server's state file, as bytes.
STATE = "optserve"


class RemoteOptimizer(torch.optim.Optimizer):
    """torch's optimizer ``optimizer``, on a server: bit-equal to the local one on the same build.

    The parameters of the model stay the caller's. What is changed in them between two steps, as by
    ``model.load_state_dict`` or weight clipping, is sent with the next step, and so is every
    changed hyperparameter in ``param_groups``. ``state`` is empty: it is on the server, and in
    :meth:`state_dict`.
    """

    def __init__(
        self,
        params: Any,
        optimizer: str | Mapping[str, Any],
        *,
        client: Client,
        session_id: str | None = None,
        sparse: Iterable[str] | None = None,
        edits: Literal["content", "version"] = "content",
        session: Mapping[str, Any] | None = None,
        **hyperparameters: Any,
    ) -> None:
        """Create a session on the server, or open the one that is there.

        Args:
            params: As for any torch optimizer: parameters, named parameters, or groups of them.
            optimizer: torch's class name, or an object with it as ``name`` and hyperparameters.
            client: The server.
            session_id: Of the session. If it exists with the same configuration, training goes on
                from its state and its parameters are copied into ``params``.
            sparse: Names (or patterns with ``*`` and ``?``) of the parameters whose gradients are
                sparse; unnamed parameters are called ``0``, ``1``, ... For SparseAdam all of them.
            edits: How changes of parameters between steps are found. ``content`` compares them with
                what the server sent, and keeps that; ``version`` compares only torch's version
                counter and the address, which does not see ``p.data.clamp_(...)``.
            session: Further fields of :meth:`Client.create`, for example ``clip_grad_norm``.
            **hyperparameters: Of the optimizer.
        """
        check_client(client)
        spec = {"name": optimizer} if isinstance(optimizer, str) else dict(optimizer)
        spec |= {name: _plain(value) for name, value in hyperparameters.items()}
        self._name = str(spec.get("name"))
        self._known, defaults, self._needs_loss = described(client, spec)
        if misplaced := (hyperparameters.keys() & SESSION_FIELDS) - self._known:
            field = min(misplaced)
            raise errors.Invalid(
                f"{field} is a field of the session and no hyperparameter of {self._name}: "
                f"use session={{{field!r}: {hyperparameters[field]!r:.80}}}"
            )
        self._by_content = edits == "content"
        self._session: Session | None = None
        self._searching = False
        #: Names in the order of the session, the hyperparameters that the server has for each
        #: group, and what each parameter was when the server had the same.
        self._names: list[str] = []
        self._sent: list[Json] = []
        self._seen: dict[str, Any] = {}
        super().__init__(params, defaults)
        self._session = client.create(
            spec,
            {name: _array(p) for name, p in self._parameters()},
            id=session_id,
            groups=self._group_specs(spec),
            **given(sparse=sparse_names(self._name, sparse)),
            **dict(session or {}),
        )
        self._adopt_groups(self._session.info["groups"])
        if self._session.created:
            self._note({name: _array(p) for name, p in self._parameters()}, copy=True)
        else:
            self._take(self._session.params().arrays)

    @property
    def session(self) -> Session:
        """The session on the server: its status, history, ema weights and the rest of the API."""
        if self._session is None:
            raise RuntimeError("the session is not there yet")
        return self._session

    @overload
    def step(
        self,
        closure: None = None,
        *,
        loss: float | torch.Tensor | None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
    ) -> None: ...
    @overload
    def step(
        self,
        closure: Callable[[], float],
        *,
        loss: None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
    ) -> float: ...
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | torch.Tensor | None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
    ) -> float | None:
        """Send the gradients and copy the updated parameters back.

        Args:
            closure: Computes loss and gradients; LBFGS needs it. Its loss goes along, and it is
                called again as often as the server asks.
            loss: At the parameters as they are, where there is no closure: a number or a tensor
                with one element. For history, for ``best`` and for a ReduceLROnPlateau of the
                server. One that is not finite is not sent.
            metrics: Further named values, likewise.
        Returns the loss of the closure's first call, as torch does.
        """
        if closure is None and self._needs_loss:
            raise TypeError(f"{self._name} needs a closure: step(closure)")
        if closure is not None and loss is not None:
            raise TypeError("the loss is given twice: the closure returns it, so leave out loss=")
        sent = None if loss is None else _number(loss, "loss")
        values = {key: _number(v, f"metrics[{key!r}]") for key, v in (metrics or {}).items()}
        first = None
        if closure is not None:
            first = _evaluate(closure)
            sent = _number(first, "loss")
        if self._searching:  # an earlier step ended inside a line search
            self._seen.clear()
        result = self._push(sent, values, abandon=self._searching, groups=self._changed_groups())
        while result.need is not None and closure is not None:
            self._searching = True
            result = self._push(_number(_evaluate(closure), "loss"), values, inside=True)
        self._searching = False
        return first

    def _push(
        self,
        loss: float | None,
        metrics: Mapping[str, float],
        *,
        groups: list[Json] | None = None,
        inside: bool = False,
        abandon: bool = False,
    ) -> StepResult:
        edited = (
            {} if inside else {n: _array(p) for n, p in self._parameters() if self._edited(n, p)}
        )
        result = self.session.step(
            {name: _gradient(p) for name, p in self._parameters()},
            params=edited or None,
            groups=groups,
            loss=loss,
            metrics=metrics or None,
            abandon=abandon,
        )
        for sent, changed in zip(self._sent, groups or [], strict=False):
            sent.update(changed)
        self._take(result.params or {})
        if result.scheduler is not None and result.scheduler["advance"] == "step":
            for group, sent, lr in zip(
                self.param_groups, self._sent, result.scheduler["next_lr"], strict=True
            ):
                group["lr"] = sent["lr"] = lr
        return result

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with parameters of its own, here and on the server."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        start = len(self._names)
        named = group.get("param_names") or [str(start + i) for i in range(len(group["params"]))]
        self._names += named
        if self._session is None:
            return
        added = dict(zip(named, group["params"], strict=True))
        values = {name: _array(p) for name, p in added.items()}
        hyper = {key: _plain(group[key]) for key in self._known & group.keys()}
        try:
            reply = self._session.add_group(values, **hyper)
        except BaseException:
            self.param_groups.pop()
            del self._names[start:]
            raise
        self._adopt_groups(reply["groups"])
        self._note(values, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """Return ``param_groups`` and everything that the server knows, as tensors and numbers."""
        packed = super().state_dict()
        packed[STATE] = torch.frombuffer(self.session.export_state(), dtype=torch.uint8)
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; the model's parameters stay as they are.

        The state of another optimizer, or of parameters with other names, shapes or groups, is a
        ValueError, and nothing is changed then.
        """
        if STATE not in state_dict:
            raise ValueError(f"this is not the state_dict of a {type(self).__name__}: no {STATE!r}")
        frame = state_dict[STATE].contiguous().numpy().data
        tensors, metadata = wire.decode(frame)
        values = {
            name.removeprefix("param/"): value
            for name, value in tensors.items()
            if name.startswith("param/")
        }
        if (names := set(self._names)) != values.keys():
            odd = sorted(names ^ values.keys())
            raise ValueError(f"the state_dict has other parameters: {odd[0]!r} is not in both")
        for name, p in self._parameters():
            if values[name].shape != tuple(p.shape):
                there, here = list(values[name].shape), list(p.shape)
                raise ValueError(
                    f"the state_dict has {name!r} in the shape {there}, the optimizer in {here}"
                )
        saved = named_in(json.loads(metadata.get(wire.META_KEY, "{}")), self._name)
        if saved != (own := named_in(self.session.info, self._name)):
            raise ValueError(f"the state_dict is of {saved}, this optimizer is {own}")
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != (here := [len(group["params"]) for group in self.param_groups]):
            raise ValueError(
                f"the state_dict has groups of {sizes} parameters, the optimizer of {here}"
            )
        self.session.import_state(frame, abandon=True)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        groups = zip(self.param_groups, self.session.status()["groups"], strict=True)
        self._sent = [self._hyper(here) | self._hyper(there) for here, there in groups]
        self._searching = False
        self._seen = dict(values) if self._by_content else {}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: save its state_dict()")

    def __repr__(self) -> str:
        where = f"{self._name}, session {self.session.id!r}" if self._session else self._name
        return super().__repr__().replace(type(self).__name__, f"{type(self).__name__}[{where}]", 1)

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        parameters = (p for group in self.param_groups for p in group["params"])
        return zip(self._names, parameters, strict=True)

    def _hyper(self, group: Mapping[str, Any]) -> Json:
        return {key: _plain(group[key]) for key in self._known & group.keys()}

    def _group_specs(self, spec: Mapping[str, Any]) -> list[Json] | None:
        """Return ``groups`` of the create body: what differs in each group, by exact names."""
        specs, start = [], 0
        for group in self.param_groups:
            names = self._names[start : start + len(group["params"])]
            start += len(names)
            own = {k: v for k, v in self._hyper(group).items() if v != _plain(self.defaults.get(k))}
            specs.append({**own, "params": names})
        return specs if len(specs) > 1 or len(specs[0]) > 1 else None

    def _adopt_groups(self, groups: list[Json]) -> None:
        """Take over the hyperparameters that the server has."""
        for group, there in zip(self.param_groups, groups, strict=True):
            hyper = self._hyper(there).items()
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in hyper})
        self._sent = [self._hyper(group) for group in self.param_groups]

    def _changed_groups(self) -> list[Json] | None:
        """Return what was changed in ``param_groups`` since the server last heard of it."""
        changes = [
            {key: value for key, value in self._hyper(group).items() if sent.get(key) != value}
            for group, sent in zip(self.param_groups, self._sent, strict=True)
        ]
        return changes if any(changes) else None

    def _edited(self, name: str, p: torch.Tensor) -> bool:
        if name not in self._seen:
            return True
        if not self._by_content:
            return bool(self._seen[name] != (p._version, p.data_ptr()))
        return not _same_bits(_array(p), self._seen[name])

    def _take(self, values: Mapping[str, wire.Tensor]) -> None:
        """Copy the server's parameters into the caller's, in place."""
        with torch.no_grad():
            for name, p in self._parameters():
                if name in values:
                    p.copy_(_tensor(values[name]))
        self._note(values, copy=False)

    def _note(self, values: Mapping[str, wire.Tensor], *, copy: bool) -> None:
        """Remember that here and on the server each parameter is now this."""
        for name, p in self._parameters():
            if name in values and self._by_content:
                value = wire.narrow(values[name], wire.dtype_of(_array(p)))
                self._seen[name] = _copied(value) if copy else value
            elif name in values:
                self._seen[name] = (p._version, p.data_ptr())


def _evaluate(closure: Callable[[], float]) -> float:
    with torch.enable_grad():
        return closure()


def _number(value: Any, what: str) -> float:
    """Return a loss or metric, which may be a tensor with one element."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        shape = list(value.shape)
        raise TypeError(f"{what} must be a number or a tensor with one element, got shape {shape}")
    return float(value)


def _plain(value: Any) -> Any:
    """Return a hyperparameter as JSON has it."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _gradient(p: torch.Tensor) -> wire.Tensor | Sparse | None:
    grad = p.grad
    if grad is None:
        return None
    if grad.layout != torch.sparse_coo:
        return _array(grad)
    summed = grad.detach().coalesce()
    indices = summed.indices().cpu().numpy()
    return Sparse(indices=indices, values=_array(summed.values()), shape=tuple(grad.shape))


def _array(t: torch.Tensor) -> wire.Tensor:
    """Return a tensor as numpy has it, without a copy where it lies in main memory."""
    t = t.detach().cpu()
    if t.dtype == torch.bfloat16:
        return wire.Bits(t.view(torch.int16).numpy().view(np.uint16), "BF16")
    return t.numpy()


def _tensor(value: wire.Tensor) -> torch.Tensor:
    if isinstance(value, wire.Bits):
        return torch.from_numpy(value.array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _copied(value: wire.Tensor) -> wire.Tensor:
    if isinstance(value, wire.Bits):
        return wire.Bits(value.array.copy(), value.dtype)
    return value.copy()


def _same_bits(a: wire.Tensor, b: wire.Tensor) -> bool:
    """Compare bit for bit: a NaN equals itself, and 0.0 is not -0.0."""
    one = a.array if isinstance(a, wire.Bits) else a
    other = b.array if isinstance(b, wire.Bits) else b
    bits = np.dtype(f"u{one.dtype.itemsize}")
    return one.dtype == other.dtype and np.array_equal(one.view(bits), other.view(bits))
