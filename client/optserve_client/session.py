"""One session, as the blocking client sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from optserve_client import _arguments, _calls, wire
from optserve_client._values import Json, Params, StepResult
from optserve_client.push import Push

if TYPE_CHECKING:
    from optserve_client.client import Client


class Session:
    """One session on the server. Holds no state but its id: make as many handles as you like."""

    def __init__(self, client: Client, session_id: str, info: Json | None = None) -> None:
        self._client = client
        #: In every URL of the session.
        self.id = session_id
        #: What the server answered to its creation; empty if this client did not create it.
        self.info: Json = info or {}

    @property
    def _dtype(self) -> str | None:
        return _arguments.dtype_of(self.info)

    @property
    def created(self) -> bool:
        """Whether this call of ``create`` made the session."""
        return bool(self.info.get("created") or self.info.get("duplicate"))

    def step(
        self,
        grads: Mapping[str, Any],
        *,
        params: Mapping[str, Any] | None = None,
        none: Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        loss_scale: float | None = None,
        base_version: int | None = None,
        dry_run: bool = False,
        returns: Literal["params", "delta", "none"] = "params",
        return_dtype: str | None = None,
        abandon: bool = False,
    ) -> StepResult:
        """Take one optimizer step with ``grads`` and return the new params.

        Args:
            grads: A gradient for each parameter by name: an array of its shape and dtype, lists
                of numbers, a :class:`Sparse`, or None where torch has ``grad is None``.
            params: The caller's params, which replace the session's before the update.
            none: Further names whose gradient is None.
            groups: Assigned to ``param_groups[i]`` before the update; stays.
            loss: At the params at which the gradient was taken. One that is NaN or infinite is
                not sent, because JSON has neither: history then shows none for this step. So a
                step whose loss overflowed under ``loss_scale`` is still skipped by the server.
            metrics: Further named values; those that are not finite are not sent either.
            loss_scale: What the gradients were multiplied by.
            base_version: Refuse the step if the session has another version by now.
            dry_run: Show what would happen; change nothing.
            returns: What the result's ``params`` hold.
            return_dtype: In which dtype, rounded if it is narrower.
            abandon: Give up an open LBFGS line search first.
        """
        fields = _arguments.step_fields(
            returns,
            {"dry_run": dry_run, "abandon": abandon},
            groups=groups,
            loss=loss,
            metrics=metrics,
            loss_scale=loss_scale,
            base_version=base_version,
            return_dtype=return_dtype,
        )
        return self._client._run(
            _calls.step(self.id, grads, params, none or (), fields, self._dtype)
        )

    def push(
        self,
        *,
        none: Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        loss_scale: float | None = None,
        base_version: int | None = None,
        dry_run: bool = False,
        returns: Literal["params", "delta", "none"] = "params",
        return_dtype: str | None = None,
        abandon: bool = False,
    ) -> Push:
        """Return a step whose gradients are sent one by one; nothing is sent yet.

        The arguments are those of :meth:`step`. Use ``with``, which gives it up if it is not
        committed::

            with session.push(loss=loss) as push:
                push.put("w", grad)  # from any thread, in any order
                params = push.commit().params
        """
        fields = _arguments.step_fields(
            returns,
            {"dry_run": dry_run, "abandon": abandon},
            groups=groups,
            loss=loss,
            metrics=metrics,
            loss_scale=loss_scale,
            base_version=base_version,
            return_dtype=return_dtype,
        )
        return Push(self._client, self.id, fields, none, self._dtype)

    def params(
        self,
        weights: Literal["live", "eval", "ema", "best"] = "live",
        *,
        names: Iterable[str] | None = None,
        if_none_match: Params | None = None,
    ) -> Params:
        """Return the params, or some of them; ``if_none_match`` itself if it is still current."""
        return self._client._run(_calls.params(self.id, weights, names, if_none_match))

    def put_params(
        self,
        params: Mapping[str, Any],
        *,
        if_match: Params | str | None = None,
        abandon: bool = False,
    ) -> Json:
        """Overwrite params by name and keep the optimizer's state."""
        return self._client._run(_calls.put_params(self.id, params, if_match, abandon, self._dtype))

    def status(self) -> Json:
        """Return the whole configuration, effective hyperparameters and counters."""
        return self._client._run(_calls.get(_calls.session_path(self.id), _calls.scalars))

    def delete(self) -> None:
        """Delete the session and its history."""
        self._client._run(_calls.delete(self.id))
        self._client._lanes.forget(self.id)

    def export_state(self) -> memoryview:
        """Return everything of the session as one safetensors file."""
        return self._client._run(_calls.export_state(self.id))

    def import_state(self, frame: wire.BytesLike, *, abandon: bool = False) -> Json:
        """Replace everything of the session by what :meth:`export_state` returned."""
        return self._client._run(_calls.import_state(self.id, frame, abandon))

    def patch(self, *, abandon: bool = False, **fields: Any) -> Json:
        """Change clip_grad_norm, accumulate, nonfinite, durability, ttl_s, name, tags and the like.

        ``abandon``, here and below: give up an open LBFGS line search first.
        """
        return self._client._run(
            _calls.edit(self.id, "PATCH", "", fields | _arguments.given(abandon=abandon or None))
        )

    def patch_group(self, index: int, *, abandon: bool = False, **hyperparameters: Any) -> Json:
        """Set hyperparameters of one group now: ``patch_group(0, lr=0.1)``."""
        return self._client._run(_calls.patch_group(self.id, index, hyperparameters, abandon))

    def add_group(self, params: Mapping[str, Any], **hyperparameters: Any) -> Json:
        """Add a param group with new params, as torch's add_param_group."""
        return self._client._run(_calls.add_group(self.id, params, hyperparameters, self._dtype))

    def scheduler(self) -> Json:
        """Return the scheduler and where it stands."""
        return self._client._run(
            _calls.get(_calls.session_path(self.id, "scheduler"), _calls.scalars)
        )

    def put_scheduler(
        self, scheduler: Mapping[str, Any] | Sequence[Any] | None, *, abandon: bool = False
    ) -> Json:
        """Attach another scheduler as torch does, or none."""
        return self._client._run(_calls.put_scheduler(self.id, scheduler, abandon))

    def scheduler_step(self, metrics: float | None = None, *, abandon: bool = False) -> Json:
        """Advance the scheduler; ``metrics`` for ReduceLROnPlateau."""
        fields = _arguments.given(metrics=metrics, abandon=abandon or None)
        return self._client._run(_calls.edit(self.id, "POST", "scheduler/step", fields))

    def scheduler_preview(
        self, steps: int = 100, *, metrics: Sequence[float] | None = None
    ) -> Json:
        """Return what the scheduler would do in ``steps`` steps; changes nothing."""
        return self._client._run(_calls.scheduler_preview(self.id, steps, metrics))

    def fork(
        self,
        id: str | None = None,  # noqa: A002 - the field's name
        *,
        version: int | None = None,
        name: str | None = None,
        notes: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Session:
        """Return a copy of the session under a new id, which goes its own way from here."""
        generation = self._client._lanes.generation(self.id)
        fields = _arguments.given(
            id=id, version=version, generation=generation, name=name, notes=notes, tags=tags
        )
        reply = self._client._run(_calls.fork(self.id, fields))
        return Session(self._client, self._client._lanes.opened(reply), reply)

    def history(self, after_version: int = 0, limit: int = 1000) -> Sequence[Json]:
        """Return lr, loss, grad_norm and metrics of the versions after ``after_version``."""
        return self._client._run(_calls.history(self.id, after_version, limit))

    def versions(self, after_version: int | None = None, limit: int = 1000) -> Sequence[Json]:
        """Return the versions that :meth:`rollback` and :meth:`fork` can go to, oldest first.

        ``version``, ``updates``, ``kind``, ``time``, whether there is a ``snapshot``, and the name
        of its ``pin``; only those above ``after_version``.
        """
        return self._client._run(_calls.versions(self.id, after_version, limit))

    def rollback(
        self, version: int, *, if_match: Params | str | None = None, abandon: bool = False
    ) -> Json:
        """Make a new version whose whole state is that of an earlier one.

        ``if_match``: params (or their ETag) that must still be current, else PreconditionFailed.
        """
        return self._client._run(_calls.rollback(self.id, version, if_match, abandon))

    def pin(self, version: int, name: str | None = None) -> Json:
        """Keep a version until it is unpinned, under a name (``v<version>`` by default)."""
        return self._client._run(_calls.pin(self.id, version, name))

    def unpin(self, version: int) -> Json:
        """Let a pinned version go as any other of its age."""
        return self._client._run(_calls.unpin(self.id, version))

    def put_metrics(self, version: int, metrics: Mapping[str, float]) -> Json:
        """Add named values to a version that came out earlier; not those that are not finite."""
        fields = {"version": version, "metrics": _arguments.finite_metrics(metrics)}
        return self._client._run(_calls.edit(self.id, "PUT", "metrics", fields))

    def resume(self) -> None:
        """Go on after SessionRewound or OutOfSequence, or give up a change that stays open.

        The next change follows the last one that the server remembers. What it forgot is gone, so
        pull the params first: they are those of an earlier version.
        """
        self._client._lanes.resume(self.id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"
