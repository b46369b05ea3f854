"""The catalogue: which optimizers and schedulers there are, and what each takes."""

from __future__ import annotations

import asyncio
from functools import cache

from starlette.responses import Response

from optserve.api.openapi import operation
from optserve.api.replies import JSON, dump, json_response
from optserve.api.routing import JsonMedia, router
from optserve.optim import catalogue, schedule_catalogue
from optserve_client.errors import Invalid, NotFound

routes = router("catalogue")


@routes.get("/v1/optimizers", **operation("List the optimizers", reply="Optimizers"))
async def list_optimizers(media: JsonMedia) -> Response:
    """All of them, with a JSON Schema of every hyperparameter."""
    return Response(await asyncio.to_thread(_all_optimizers), media_type=JSON)


@cache
def _all_optimizers() -> bytes:
    """Return the text once and for all: it takes the import of a large library to write it."""
    return dump({"optimizers": [catalogue.describe(entry) for entry in catalogue.entries()]})


@routes.get(
    "/v1/optimizers/{name}",
    **operation("Describe one optimizer", reply="OptimizerEntry", errors=[NotFound]),
)
async def get_optimizer(name: str, media: JsonMedia) -> Response:
    """By its name, in any case or in snake_case, or by an alias such as Nesterov."""
    try:
        entry = catalogue.find(name)
    except Invalid as exc:
        raise NotFound(exc.detail) from exc
    return json_response(await asyncio.to_thread(catalogue.describe, entry))


@routes.get("/v1/schedulers", **operation("List the schedulers", reply="Schedulers"))
async def list_schedulers(media: JsonMedia) -> Response:
    """torch's, each with a JSON Schema of what it takes and an example."""
    entries = [schedule_catalogue.describe(entry) for entry in schedule_catalogue.entries()]
    return json_response({"schedulers": entries})


@routes.get(
    "/v1/schedulers/{name}",
    **operation("Describe one scheduler", reply="SchedulerEntry", errors=[NotFound]),
)
async def get_scheduler_entry(name: str, media: JsonMedia) -> Response:
    """By its name, in any case or in snake_case."""
    try:
        entry = schedule_catalogue.find(name)
    except Invalid as exc:
        raise NotFound(exc.detail) from exc
    return json_response(schedule_catalogue.describe(entry))
