"""The API page: complete without any other server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.api_client import Api, asking


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


def references(html: str) -> list[str]:
    return re.findall(r'(?:src|href)="([^"]*)"', html)


def test_everything_that_the_page_names_is_served_from_here(api: Api) -> None:
    page = api.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = references(page.text)
    assert {"docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/start.js"} <= set(names)
    for name in names:
        assert not re.match(r"[a-z]+:|/", name), name
        assert api.get(f"/{name}").status_code == 200, name


@pytest.mark.parametrize(
    ("asset", "kind"),
    [
        ("start.js", "text/javascript; charset=utf-8"),
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("swagger-ui.css", "text/css; charset=utf-8"),
        ("favicon-32x32.png", "image/png"),
    ],
)
def test_assets_have_their_type_and_the_policy(api: Api, asset: str, kind: str) -> None:
    reply = api.get(f"/docs/{asset}")
    assert (reply.status_code, reply.headers["content-type"]) == (200, kind)
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_the_policy_allows_no_other_origin_and_no_inline_script(api: Api) -> None:
    page = api.get("/docs")
    directives = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert directives["script-src"] == directives["connect-src"] == "'self'"
    assert not any("http" in value or "*" in value for value in directives.values())
    assert re.findall(r"<script(?![^>]*src=)", page.text) == []
    assert re.findall(r"\son\w+=", page.text) == []


def test_nothing_in_page_script_or_style_sheet_leads_elsewhere(api: Api) -> None:
    for path in ("/docs", "/docs/start.js"):
        assert "//" not in api.get(path).text.replace("<!doctype", ""), path
    style = api.get("/docs/swagger-ui.css").text
    assert "@import" not in style
    outside = [
        u for u in re.findall(r"url\(([^)]*)", style) if not u.strip("\"'").startswith("data:")
    ]
    assert outside == []


def test_the_validator_badge_is_off(api: Api) -> None:
    assert "validatorUrl: null" in api.get("/docs/start.js").text


def test_this_swagger_ui_knows_the_version_of_the_document(api: Api) -> None:
    major = re.search(r'PACKAGE_VERSION:"(\d+)\.', api.get("/docs/swagger-ui-bundle.js").text)
    assert major is not None
    assert int(major[1]) >= 5
    assert api.get("/openapi.json").json()["openapi"] == "3.1.0"
