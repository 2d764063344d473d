"""The page's own files and the chart library, read once, compressed once, and revalidated by their hash."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from gpuledger.dashboards.exceptions import AssetMissing

__all__ = ["StaticFile", "StaticFiles", "load_static"]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
ECHARTS_NAME = "echarts.esm.min.js"


@dataclass(frozen=True, slots=True)
class StaticFile:
    """`etag` is the content's hash; `compressed` its gzip form."""

    content: bytes
    compressed: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        headers = {"ETag": self.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(self.compressed, media_type=self.media_type, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def _static_file(name: str, content: bytes) -> StaticFile:
    media_type = _TYPES[Path(name).suffix]
    return StaticFile(content, gzip.compress(content, 6), media_type, f'"{hashlib.sha256(content).hexdigest()[:24]}"')


def load_static(echarts: Path) -> StaticFiles:
    """Everything there is to serve. Raises AssetMissing when `echarts` (echarts.esm.min.js) cannot be read."""
    try:
        library = echarts.read_bytes()
    except OSError as error:
        raise AssetMissing(
            f"{echarts}: the chart library cannot be read ({error.strerror}); give the path of {ECHARTS_NAME} with "
            "--echarts, or fetch it: python -m gpuledger.local.jars fetch"
        ) from error
    folder = files("gpuledger.dashboards.page").joinpath("static")
    own = {entry.name: _static_file(entry.name, entry.read_bytes()) for entry in folder.iterdir() if entry.is_file()}
    return StaticFiles({**own, ECHARTS_NAME: _static_file(ECHARTS_NAME, library)})


class StaticFiles:
    """Files by name; there are no folders, so nothing can be climbed out of."""

    def __init__(self, by_name: dict[str, StaticFile]) -> None:
        self._by_name = by_name

    @property
    def index(self) -> StaticFile:
        return self._by_name["index.html"]

    async def serve(self, request: Request) -> Response:
        """The endpoint of /static/{name}."""
        file = self._by_name.get(str(request.path_params["name"]))
        return PlainTextResponse("no such file\n", 404) if file is None else file.response(request)
