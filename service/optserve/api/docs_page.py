"""The API page: Swagger UI from an installed package. The browser asks nobody but this server."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from optserve.api.replies import json_response
from optserve.api.routing import router
from optserve_client.errors import NotFound

# Its files are served; of its code only the import runs.
ASSETS = "fastapi_swagger.resources"

_ASSET_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}

# Relative addresses, so that the page also works behind a proxy that adds a prefix.
_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>optserve API</title>
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<noscript>This needs JavaScript; <a href="openapi.json">openapi.json</a> does not.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

# validatorUrl: by default the page would send the document's address to a public validator.
_START = b"""SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#page",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""

# Swagger UI sets style attributes and draws its icons from data: addresses.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

routes = router("docs")


@routes.get("/", include_in_schema=False)
async def get_root() -> Response:
    """Redirect to the API page."""
    return RedirectResponse("docs", 307)


@routes.get("/openapi.json", include_in_schema=False)
async def get_openapi_document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return json_response(request.app.openapi())


@routes.get("/docs", include_in_schema=False)
async def get_docs() -> Response:
    """Return the API page."""
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")


@routes.get("/docs/start.js", include_in_schema=False)
async def get_docs_start() -> Response:
    """Return the script that starts Swagger UI; the policy forbids one inside the page."""
    return Response(_START, headers=_HEADERS, media_type="text/javascript")


@routes.get("/docs/{asset}", include_in_schema=False)
async def get_docs_asset(asset: str, request: Request) -> Response:
    """Return one file of Swagger UI."""
    if asset not in _ASSET_TYPES:
        raise NotFound(f"there is nothing at {request.scope['path']!r:.200}")
    headers = {**_HEADERS, "cache-control": "public, max-age=3600"}
    return FileResponse(asset_path(asset), headers=headers, media_type=_ASSET_TYPES[asset])


def asset_path(asset: str) -> Path:
    """Return the file's place in the installed package."""
    with as_file(files(ASSETS).joinpath(asset)) as path:
        return path
