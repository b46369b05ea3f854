"""The catalogue: which optimizers and schedulers there are, and what each takes."""

from __future__ import annotations

from starlette.responses import Response

from optserve.api.openapi import operation
from optserve.api.replies import json_response
from optserve.api.routing import JsonMedia, router
from optserve.optim import catalogue, schedule_catalogue
from optserve_client.errors import Invalid, NotFound

routes = router("catalogue")


@routes.get("/v1/optimizers", **operation("List the optimizers", reply="Optimizers"))
async def list_optimizers(media: JsonMedia) -> Response:
    """All of them, with a JSON Schema of every hyperparameter."""
    entries = [catalogue.describe(entry) for entry in catalogue.entries()]
    return json_response({"optimizers": entries})


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
    return json_response(catalogue.describe(entry))


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
