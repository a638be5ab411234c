"""An HTTP request as the ingress passes it on to a replica."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from starlette.types import Scope


class HttpRequest(Struct, frozen=True):
    """What of an ASGI request can cross to another process."""

    method: str
    path: str
    root_path: str
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    beginning: bytes
    """A digest of how its prompt begins, or b"" if it has none; see ``routing``."""

    @classmethod
    def of(cls, scope: Scope, body: bytes, beginning: bytes) -> HttpRequest:
        """The request of an ASGI scope, whose body has been read."""
        client = scope.get("client")
        return cls(
            method=scope["method"],
            path=scope["path"],
            root_path=scope.get("root_path", ""),
            query_string=scope["query_string"],
            headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
            client=None if client is None else (client[0], client[1]),
            body=body,
            beginning=beginning,
        )

    @property
    def scope(self) -> dict[str, Any]:
        """An ASGI scope of it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": self.root_path,
            "query_string": self.query_string,
            "headers": self.headers,
            "client": self.client,
            "server": None,
            "state": {},
        }
