"""A ``torch.optim.Optimizer`` whose state and arithmetic live on an optserve server.

    optimizer = RemoteOptimizer(model.parameters(), "AdamW", lr=1e-3, client=Client(url))

Training loops stay as they are: gradients go up, updated parameters come back in place, and torch's
own ``lr_scheduler`` classes drive it. The only file of the client that needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import numpy as np

from optserve_client import errors, wire
from optserve_client._arguments import given
from optserve_client._pushing import Hyper, Pusher, plain, worker_of
from optserve_client._remote import (
    SESSION_FIELDS,
    check_client,
    checked_state,
    copied,
    described,
    named_in,
    same_bits,
    sparse_names,
)
from optserve_client._values import Sparse, StepResult
from optserve_client.client import Client
from optserve_client.compress import Compressor
from optserve_client.session import Session
from optserve_client.worker import Worker

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
        worker: Worker | str | None = None,
        compress: Compressor | None = None,
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
            worker: One of several processes that train this model, each with a replica, into the
                session of the same id, whose ``workers`` are in ``session``. Its name, or a
                :class:`Worker`. Whoever comes first creates the session, and all start from its
                parameters.
            compress: How gradients, or deltas, are sent; for example ``TopK(0.01)``.
            **hyperparameters: Of the optimizer.
        """
        check_client(client)
        spec = {"name": optimizer} if isinstance(optimizer, str) else dict(optimizer)
        spec |= {name: plain(value) for name, value in hyperparameters.items()}
        self._name = str(spec.get("name"))
        known, defaults, self._needs_loss = described(client, spec)
        if misplaced := (hyperparameters.keys() & SESSION_FIELDS) - known:
            field = min(misplaced)
            raise errors.Invalid(
                f"{field} is a field of the session and no hyperparameter of {self._name}: "
                f"use session={{{field!r}: {hyperparameters[field]!r:.80}}}"
            )
        self._by_content = edits == "content"
        self._pusher: Pusher | None = None
        self._searching = False
        #: Names in the order of the session, and what each parameter was when the server had the
        #: same.
        self._names: list[str] = []
        self._hyper = Hyper(known)
        self._seen: dict[str, Any] = {}
        super().__init__(params, defaults)
        member = worker_of(worker, client, session_id)
        created = client.create(
            spec,
            {name: _array(p) for name, p in self._parameters()},
            id=session_id if member is None else member.session.id,
            groups=self._hyper.specs(self.param_groups, self._names, self.defaults),
            **given(sparse=sparse_names(self._name, sparse)),
            **dict(session or {}),
        )
        self._pusher = Pusher(created, member, self._hyper, compress)
        self._hyper.adopt(self.param_groups, created.info["groups"])
        if created.created and member is None:
            self._note({name: _array(p) for name, p in self._parameters()}, copy=True)
        else:
            self.pull()

    @property
    def session(self) -> Session:
        """The session on the server: its status, history, ema weights and the rest of the API."""
        return self._there.session

    @property
    def worker(self) -> Worker | None:
        """As which of several workers it pushes: its epoch, and the version of the parameters."""
        return self._there.worker

    @property
    def result(self) -> StepResult | None:
        """What the last push of this worker came to: who was in its round, how stale it was."""
        return self._there.result

    @property
    def _there(self) -> Pusher:
        if self._pusher is None:
            raise RuntimeError("the session is not there yet")
        return self._pusher

    @overload
    def step(
        self,
        closure: None = None,
        *,
        loss: float | torch.Tensor | None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
        weight: float | None = None,
    ) -> None: ...
    @overload
    def step(
        self,
        closure: Callable[[], float],
        *,
        loss: None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
        weight: float | None = None,
    ) -> float: ...
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | torch.Tensor | None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
        weight: float | None = None,
    ) -> float | None:
        """Send the gradients and copy the updated parameters back.

        One of several workers waits for its round, and raises what :meth:`Worker.push` does; the
        model then has the parameters of now. It never sends parameters: if they were changed
        between two steps, that is a RuntimeError, and :meth:`pull` brings back the session's.

        Args:
            closure: Computes loss and gradients; LBFGS needs it. Its loss goes along, and it is
                called again as often as the server asks.
            loss: At the parameters as they are, where there is no closure: a number or a tensor
                with one element. For history, for ``best`` and for a ReduceLROnPlateau of the
                server. One that is not finite is not sent.
            metrics: Further named values, likewise.
            weight: Of this worker's gradient in a weighted mean, such as its number of samples.
        Returns the loss of the closure's first call, as torch does.
        """
        if closure is None and self._needs_loss:
            raise TypeError(f"{self._name} needs a closure: step(closure)")
        if closure is not None and loss is not None:
            raise TypeError("the loss is given twice: the closure returns it, so leave out loss=")
        if self._there.deltas:
            raise RuntimeError("the session's workers push deltas: call push_deltas()")
        sent, values = _numbers(loss, metrics)
        first = None
        if closure is not None:
            first = _evaluate(closure)
            sent = _number(first, "loss")
        if self._searching:  # an earlier step ended inside a line search
            self._seen.clear()
        result = self._push(
            {name: _gradient(p) for name, p in self._parameters()},
            loss=sent,
            metrics=values or None,
            weight=weight,
            abandon=self._searching,
        )
        while result.need is not None and closure is not None:
            self._searching = True
            sent = _number(_evaluate(closure), "loss")
            gradients = {name: _gradient(p) for name, p in self._parameters()}
            result = self._push(gradients, loss=sent, metrics=values or None, inside=True)
        self._searching = False
        return first

    @torch.no_grad()
    def push_deltas(
        self,
        *,
        loss: float | torch.Tensor | None = None,
        metrics: Mapping[str, float | torch.Tensor] | None = None,
        weight: float | None = None,
    ) -> None:
        """Send what the parameters are more than those that came last, and copy the new ones back.

        For a session whose workers push deltas: between two calls an optimizer of torch takes as
        many steps as it likes, on the same parameters. Arguments are those of :meth:`step`.
        """
        if self._there.worker is None or not self._there.deltas:
            raise RuntimeError(
                "push_deltas is for one of several workers that push deltas: "
                "RemoteOptimizer(..., worker='w1', session={'workers': {..., 'push': 'deltas'}})"
            )
        sent, values = _numbers(loss, metrics)
        pulled = self._there.at_hand()
        deltas = {
            name: _array(p - _tensor(pulled[name]).to(p.device)) for name, p in self._parameters()
        }
        self._push(deltas, loss=sent, metrics=values or None, weight=weight)

    @torch.no_grad()
    def pull(self) -> None:
        """Copy the session's current parameters into the model."""
        self._take(self._there.pull().arrays)

    def _push(self, tensors: Mapping[str, Any], **told: Any) -> StepResult:
        there = self._there
        try:
            result = there.push(self.param_groups, tensors, self._edits, **told)
        except (errors.StaleGradient, errors.SessionRewound):
            if there.worker is not None:
                self._take(there.at_hand().arrays)
            raise
        self._take(result.params or {})
        return result

    def _edits(self) -> dict[str, wire.Tensor]:
        return {name: _array(p) for name, p in self._parameters() if self._edited(name, p)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with parameters of its own, here and on the server."""
        if self._pusher is not None:
            self._check_alone("a group is added")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        start = len(self._names)
        named = group.get("param_names") or [str(start + i) for i in range(len(group["params"]))]
        self._names += named
        if self._pusher is None:
            return
        added = dict(zip(named, group["params"], strict=True))
        values = {name: _array(p) for name, p in added.items()}
        try:
            reply = self.session.add_group(values, **self._hyper.of(group))
        except BaseException:
            self.param_groups.pop()
            del self._names[start:]
            raise
        self._hyper.adopt(self.param_groups, reply["groups"])
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
        self._check_alone("a state is loaded")
        frame, saved = state_dict[STATE].contiguous().numpy().data, state_dict["param_groups"]
        values = checked_state(
            frame,
            saved,
            shapes={name: tuple(p.shape) for name, p in self._parameters()},
            groups=self.param_groups,
            own=named_in(self.session.info, self._name),
        )
        self.session.import_state(frame, abandon=True)
        super().load_state_dict({"state": {}, "param_groups": saved})
        self._hyper.differ(self.param_groups, self.session.status()["groups"])
        self._searching = False
        self._seen = dict(values) if self._by_content else {}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: save its state_dict()")

    def __repr__(self) -> str:
        where = f"{self._name}, session {self.session.id!r}" if self._pusher else self._name
        return super().__repr__().replace(type(self).__name__, f"{type(self).__name__}[{where}]", 1)

    def _check_alone(self, what: str) -> None:
        if self.worker is not None:
            raise RuntimeError(f"{what} before there are several workers, not by one of them")

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        parameters = (p for group in self.param_groups for p in group["params"])
        return zip(self._names, parameters, strict=True)

    def _edited(self, name: str, p: torch.Tensor) -> bool:
        if name not in self._seen:
            return True
        if not self._by_content:
            return bool(self._seen[name] != (p._version, p.data_ptr()))
        return not same_bits(_array(p), self._seen[name])

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
                self._seen[name] = copied(value) if copy else value
            elif name in values:
                self._seen[name] = (p._version, p.data_ptr())


def _evaluate(closure: Callable[[], float]) -> float:
    with torch.enable_grad():
        return closure()


def _numbers(
    loss: float | torch.Tensor | None, metrics: Mapping[str, float | torch.Tensor] | None
) -> tuple[float | None, dict[str, float]]:
    named = {key: _number(v, f"metrics[{key!r}]") for key, v in (metrics or {}).items()}
    return None if loss is None else _number(loss, "loss"), named


def _number(value: Any, what: str) -> float:
    """Return a loss or metric, which may be a tensor with one element."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        shape = list(value.shape)
        raise TypeError(f"{what} must be a number or a tensor with one element, got shape {shape}")
    return float(value)


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
