"""Every operation of the API as a :class:`Call`, for both clients."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np

from optserve_client import errors, wire
from optserve_client._arguments import array, condition, given, integer, mapping, param_tensors
from optserve_client._exchange import Retry
from optserve_client._messages import Answer, Draft, to_json
from optserve_client._protocol import Call
from optserve_client._pushes import Commit, Staged
from optserve_client._values import Json, Page, Params, Sparse, StepResult

T = TypeVar("T")


def new_id() -> str:
    return secrets.token_hex(12)


def session_path(session_id: str, *rest: str) -> str:
    wire.check_id("session id", session_id)
    return "/".join(("/v1/sessions", session_id, *rest))


def scalars(answer: Answer) -> Any:
    return answer.scalars


def _nothing(answer: Answer) -> None:
    return None


def _body(answer: Answer) -> memoryview:
    return answer.body


def _step_result(answer: Answer, asked: str) -> StepResult:
    raw: Json = answer.scalars
    returned = None if asked == "none" else raw.get("returned", asked)
    return StepResult(
        id=raw["id"],
        generation=raw["generation"],
        version=raw["version"],
        applied_version=raw.get("applied_version"),
        updates=raw["updates"],
        applied=raw["applied"],
        accumulated=raw.get("accumulated"),
        duplicate=raw.get("duplicate", False),
        skipped=raw.get("skipped"),
        groups=raw.get("groups", []),
        scheduler=raw.get("scheduler"),
        grad_norm=raw.get("grad_norm"),
        clip_coef=raw.get("clip_coef"),
        need=raw.get("need"),
        returned=returned,
        params=answer.params if returned is not None else None,
        raw=raw,
    )


def create(
    session_id: str | None, optimizer: Any, params: Mapping[str, Any], fields: Json, hyper: Json
) -> Call[Json]:
    spec = {"name": optimizer} if isinstance(optimizer, str) else dict(optimizer)
    if twice := spec.keys() & hyper.keys():
        raise errors.Invalid(f"optimizer.{min(twice)} is given twice")
    names = list(mapping(params, "params"))
    if names != sorted(names, key=str.encode):
        fields = {**fields, "order": names}
    draft = Draft(
        method="PUT",
        path=session_path(session_id or new_id()),
        fields={"optimizer": {**spec, **hyper}, **fields},
        tensors=param_tensors(params, fields.get("dtype")),
        headers={"Idempotency-Key": new_id()},
    )
    return Call(draft=draft, read=scalars)


def get(path: str, read: Callable[[Answer], T], query: Iterable[tuple[str, Any]] = ()) -> Call[T]:
    """Return a call that reads ``path``; query values that are None are left out."""
    kept = tuple((key, str(value)) for key, value in query if value is not None)
    return Call(draft=Draft(method="GET", path=path, query=kept), read=read)


def sessions(
    cursor: str | None, limit: int | None, tags: Mapping[str, str] | None, order_by: str | None
) -> Call[Page]:
    query = [("cursor", cursor), ("limit", limit), ("order_by", order_by)]
    query += [("tag", f"{key}:{value}") for key, value in (tags or {}).items()]

    def read(answer: Answer) -> Page:
        page = answer.scalars
        return Page(sessions=page["sessions"], next_cursor=page["next_cursor"])

    return get("/v1/sessions", read, query)


def listed(kind: str) -> Call[list[Json]]:
    def read(answer: Answer) -> list[Json]:
        entries: list[Json] = answer.scalars[kind]
        return entries

    return get(f"/v1/{kind}", read)


def named(kind: str, name: str) -> Call[Json]:
    return get(f"/v1/{kind}/{quote(name, safe='')}", scalars)


def preview_scheduler(
    scheduler: Any,
    optimizer: Any,
    groups: Sequence[Mapping[str, Any]] | None,
    steps: int,
    metrics: Sequence[float] | None,
) -> Call[Json]:
    fields = given(
        scheduler=scheduler, optimizer=optimizer, groups=groups, steps=steps, metrics=metrics
    )
    return Call(
        draft=Draft(method="POST", path="/v1/schedulers/preview", fields=fields), read=scalars
    )


def step(
    session_id: str,
    grads: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    none: Iterable[str],
    fields: Json,
    dtype: str | None = None,
) -> Call[StepResult]:
    tensors: dict[str, wire.Tensor] = {}
    without = list(none)
    for name, grad in mapping(grads, "grads").items():
        if grad is None:
            without.append(name)
        else:
            tensors |= gradient(name, grad, dtype)
    draft = Draft(
        method="POST",
        path=session_path(session_id, "step"),
        fields=fields | given(none=without or None),
        tensors=tensors | param_tensors({} if params is None else params, dtype),
        accept=wire.SAFETENSORS,
        guarded=True,
    )
    dry = fields.get("dry_run", False)
    return Call(
        draft=draft,
        read=lambda answer: _step_result(answer, fields.get("return", "params")),
        changes=None if dry else session_id,
    )


def gradient(name: str, grad: Any, dtype: str | None) -> dict[str, wire.Tensor]:
    """Return one gradient by its names in a frame."""
    what = f"grads[{name!r}]"
    if isinstance(grad, Sparse):
        return {
            f"sparse/{name}/indices": np.asarray(grad.indices, np.int64),
            f"sparse/{name}/values": array(grad.values, f"{what}.values", dtype),
        }
    return {f"grad/{name}": array(grad, what, dtype)}


def open_push(staged: Staged) -> Call[str]:
    def read(answer: Answer) -> str:
        push_id: str = answer.scalars["push"]
        return push_id

    return Call(draft=staged.opening(), read=read)


def put_gradient(staged: Staged, name: str, push_id: str) -> Call[None]:
    return Call(draft=staged.putting(name, push_id), read=_nothing)


def commit_push(session_id: str, staged: Staged, fields: Json) -> Call[StepResult]:
    all_fields = staged.fields | fields
    return Call(
        draft=Commit(staged, fields),
        read=lambda answer: _step_result(answer, all_fields.get("return", "params")),
        changes=None if all_fields.get("dry_run", False) else session_id,
    )


def give_up_push(staged: Staged) -> Call[None]:
    """Return a call that is sent once: a push that stays expires by itself."""
    draft = Draft(method="DELETE", path=f"{staged.path}/{staged.id}")
    return Call(draft=draft, read=_nothing, retry=Retry(retries=0))


def params(
    session_id: str, weights: str, names: Iterable[str] | None, known: Params | None
) -> Call[Params]:
    query = [("weights", weights), *(("names", name) for name in names or ())]

    def read(answer: Answer) -> Params:
        if answer.status == 304:
            assert known is not None
            return known
        raw = answer.scalars
        return Params(
            version=raw["version"],
            generation=raw["generation"],
            weights=raw.get("weights", weights),
            etag=answer.headers.get("etag", ""),
            arrays=answer.params,
        )

    draft = Draft(
        method="GET",
        path=session_path(session_id, "params"),
        query=tuple(query),
        headers={} if known is None else {"If-None-Match": known.etag},
        accept=wire.SAFETENSORS,
    )
    return Call(draft=draft, read=read)


def put_params(
    session_id: str,
    values: Mapping[str, Any],
    if_match: Params | str | None,
    abandon: bool,
    dtype: str | None,
) -> Call[Json]:
    return edit(
        session_id,
        "PUT",
        "params",
        given(abandon=abandon or None),
        tensors=param_tensors(values, dtype),
        headers=condition(if_match),
    )


def edit(
    session_id: str,
    method: str,
    path: str,
    fields: Json | None,
    *,
    tensors: Mapping[str, wire.Tensor] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Call[Json]:
    """Return a change of the session at ``path`` below it."""
    draft = Draft(
        method=method,
        path=session_path(session_id, *([path] if path else [])),
        fields=fields,
        tensors=tensors,
        headers=headers or {},
    )
    return Call(draft=draft, read=scalars, changes=session_id)


def patch_group(session_id: str, index: int, hyper: Json, abandon: bool) -> Call[Json]:
    return edit(session_id, "PATCH", f"groups/{index}", {**hyper, **given(abandon=abandon or None)})


def add_group(
    session_id: str, params: Mapping[str, Any], hyper: Json, dtype: str | None
) -> Call[Json]:
    return edit(session_id, "POST", "groups", hyper, tensors=param_tensors(params, dtype))


def put_scheduler(session_id: str, scheduler: Any, abandon: bool) -> Call[Json]:
    draft = Draft(
        method="PUT",
        path=session_path(session_id, "scheduler"),
        query=(("abandon", "true"),) if abandon else (),
        text=to_json(scheduler, "scheduler"),
    )
    return Call(draft=draft, read=scalars, changes=session_id)


def rollback(
    session_id: str, version: int, if_match: Params | str | None, abandon: bool
) -> Call[Json]:
    fields = given(version=version, abandon=abandon or None)
    return edit(session_id, "POST", "rollback", fields, headers=condition(if_match))


def pin(session_id: str, version: int, name: str | None) -> Call[Json]:
    return edit(session_id, "POST", f"versions/{integer(version, 'version')}/pin", given(name=name))


def unpin(session_id: str, version: int) -> Call[Json]:
    return edit(session_id, "DELETE", f"versions/{integer(version, 'version')}/pin", None)


def delete(session_id: str) -> Call[None]:
    draft = Draft(method="DELETE", path=session_path(session_id))
    return Call(draft=draft, read=_nothing, changes=session_id, deletes=True)


def export_state(session_id: str) -> Call[memoryview]:
    draft = Draft(method="GET", path=session_path(session_id, "state"), accept=wire.SAFETENSORS)
    return Call(draft=draft, read=_body)


def import_state(session_id: str, frame: wire.BytesLike, abandon: bool) -> Call[Json]:
    draft = Draft(
        method="PUT",
        path=session_path(session_id, "state"),
        query=(("abandon", "true"),) if abandon else (),
        frame=memoryview(frame).cast("B"),
    )
    return Call(draft=draft, read=scalars, changes=session_id)


def import_session(session_id: str | None, frame: wire.BytesLike) -> Call[Json]:
    # The file remembers its workers: a seq of ours could be taken for an old one. A key cannot.
    draft = Draft(
        method="PUT",
        path=session_path(session_id or new_id(), "state"),
        frame=memoryview(frame).cast("B"),
        headers={"Idempotency-Key": new_id()},
    )
    return Call(draft=draft, read=scalars)


def scheduler_preview(session_id: str, steps: int, metrics: Sequence[float] | None) -> Call[Json]:
    query = [("steps", steps), *(("metrics", value) for value in metrics or ())]
    return get(session_path(session_id, "scheduler", "preview"), scalars, query)


def fork(session_id: str, fields: Json) -> Call[Json]:
    draft = Draft(
        method="POST",
        path=session_path(session_id, "fork"),
        fields={"id": new_id(), **fields},
        headers={"Idempotency-Key": new_id()},
    )
    return Call(draft=draft, read=scalars)


def history(session_id: str, after_version: int, limit: int) -> Call[list[Json]]:
    query = [("after", after_version), ("limit", limit)]
    return get(session_path(session_id, "history"), _rows, query)


def versions(session_id: str, after_version: int | None, limit: int) -> Call[list[Json]]:
    query = [("after", after_version), ("limit", limit)]
    return get(session_path(session_id, "versions"), _rows, query)


def _rows(answer: Answer) -> list[Json]:
    rows: list[Json] = answer.scalars["rows"]
    return rows
