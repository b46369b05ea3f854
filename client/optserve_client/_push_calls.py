"""What a step that is sent tensor by tensor asks of the server, for both clients."""

from __future__ import annotations

from optserve_client._calls import nothing, step_result
from optserve_client._exchange import Retry
from optserve_client._messages import Answer, Draft
from optserve_client._protocol import Call
from optserve_client._pushes import Commit, Staged
from optserve_client._values import Json, StepResult


def open_push(staged: Staged) -> Call[str]:
    def read(answer: Answer) -> str:
        push_id: str = answer.scalars["push"]
        return push_id

    return Call(draft=staged.opening(), read=read)


def put_gradient(staged: Staged, name: str, push_id: str) -> Call[None]:
    return Call(draft=staged.putting(name, push_id), read=nothing)


def commit_push(session_id: str, staged: Staged, fields: Json) -> Call[StepResult]:
    all_fields = staged.fields | fields
    return Call(
        draft=Commit(staged, fields),
        read=lambda answer: step_result(answer, all_fields.get("return", "params")),
        changes=None if all_fields.get("dry_run", False) else session_id,
    )


def give_up_push(staged: Staged) -> Call[None]:
    """Return a call that is sent once: a push that stays expires by itself."""
    draft = Draft(method="DELETE", path=f"{staged.path}/{staged.id}")
    return Call(draft=draft, read=nothing, retry=Retry(retries=0))
