"""`GET /docs`: the OpenAPI document as a page that loads nothing from elsewhere, so that it works without the internet.

Called by `service.app`; knows only the document.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from typing import Any, Final

STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:.8rem;overflow:auto}table{border-collapse:collapse}"
    "td,th{border:1px solid #ddd;padding:.2rem .6rem;text-align:left;vertical-align:top}"
    "summary{cursor:pointer;padding:.3rem 0}code{background:#f4f4f4}"
)


_DIGEST = b64encode(sha256(STYLE.encode()).digest()).decode()
DOCS_POLICY: Final = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; frame-ancestors 'none'"
"""The page's Content-Security-Policy: its own style, and nothing else."""


def docs_page(document: Mapping[str, Any]) -> str:
    """Return the page: each operation with its description, fields and example, then each schema's fields."""
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document.get("components", {}).get("schemas", {}).items()]
    title = escape(document["info"]["title"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title} {escape(document['info']['version'])}</h1><p>{escape(document['info'].get('summary', ''))}</p>"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<h2>Routes</h2>{''.join(operations)}<h2>Schemas</h2>{''.join(schemas)}</html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    said = [f"<p>{escape(operation.get('description', ''))}</p>"]
    for parameter in operation.get("parameters", ()):
        said.append(f"<p><code>{escape(parameter['name'])}</code> {escape(parameter.get('description', ''))}</p>")
    if body := operation.get("requestBody"):
        said.append(f"<p>Body</p>{_json(body['content'])}")
    for status, answer in operation.get("responses", {}).items():
        said.append(f"<p><b>{escape(status)}</b> {escape(answer.get('description', ''))}</p>")
        if "content" in answer and status.startswith("2"):
            said.append(_json(answer["content"]))
    summary = f"<b>{method.upper()}</b> <code>{escape(path)}</code> {escape(operation.get('summary', ''))}"
    return f"<details><summary>{summary}</summary>{''.join(said)}</details>"


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code><td>{escape(_type(shape))}<td>{escape(shape.get('description', ''))}"
        for field, shape in schema.get("properties", {}).items()
    )
    table = f"<table><tr><th>field<th>type<th>meaning{rows}</table>" if rows else _json(schema)
    return (
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        f"<p>{escape(schema.get('description', ''))}</p>{table}</details>"
    )


def _type(shape: Mapping[str, Any]) -> str:
    if "$ref" in shape:
        return str(shape["$ref"]).rpartition("/")[2]
    if "anyOf" in shape:
        return " or ".join(_type(one) for one in shape["anyOf"])
    kind = str(shape.get("type", "any"))
    return f"list of {_type(shape['items'])}" if kind == "array" and "items" in shape else kind


def _json(value: object) -> str:
    return f"<pre>{escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre>"
