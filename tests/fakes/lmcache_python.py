"""`python lmcache_python.py VERSIONS.json BEHAVIOUR ...`: stands in for the Python of an environment with LMCache.

What follows is a Python's arguments: asked by `-I -c CODE` it answers with VERSIONS.json; as LMCache's server it says
that it is healthy, and, behaving as

    well     does so until it is ended
    broken   ends at once, with a traceback
    brief    ends without a word as soon as it has said so
"""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def serve(port: int, behaviour: str) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/healthcheck" else 404)
            self.end_headers()
            if behaviour == "brief":
                self.wfile.flush()
                self.connection.close()
                os._exit(9)

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    versions, behaviour, *arguments = sys.argv[1:]
    if "-c" in arguments:
        print(Path(versions).read_text())
    elif behaviour == "broken":
        raise RuntimeError("no shared memory: made to fail")
    else:
        Path(versions).with_name("command.txt").write_text("\n".join(arguments))
        serve(int(arguments[arguments.index("--http-port") + 1]), behaviour)
