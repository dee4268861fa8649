"""What of a W&B server the client needs: takes the rows of runs, tells where they stand, and can stop answering."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "project", "entity": {"id": "e", "name": "somebody"}}


class WandbServer:
    """Serves on a port of this machine until `close`."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, list[str]]] = {}
        """Lines of each run's files."""
        self.silent = False
        """Whether it keeps connections and answers nothing, from the first request of /silence on."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if server.silent:
                    server.closed.wait()
                answer: dict[str, Any] = {}
                if self.path == "/silence":
                    server.silent = True
                if self.path == "/graphql":
                    asked = json.loads(body)
                    answer = {"data": server.answer(asked["query"], asked.get("variables") or {})}
                elif self.path.endswith("/file_stream"):
                    server.take(self.path.split("/")[-2], json.loads(body).get("files") or {})
                self._send(json.dumps(answer).encode())

            do_GET = do_PUT = do_POST

            def _send(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.closed = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # clients that are killed
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, run: str, files: dict[str, dict[str, Any]]) -> None:
        """Lines of files, from an offset on, take the place of what was there, as they do at W&B."""
        for name, part in files.items():
            self.files.setdefault(run, {}).setdefault(name, [])[part["offset"] :] = part["content"]

    def rows(self, run: str) -> list[dict[str, Any]]:
        """What the run shows, without W&B's own fields but `_step`."""
        rows = map(json.loads, self.files.get(run, {}).get("wandb-history.jsonl", []))
        return [{name: row[name] for name in sorted(row) if name == "_step" or name[0] != "_"} for row in rows]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL query."""
        name = variables.get("name")
        bucket = {"id": "i", "name": name, "displayName": name, "config": "{}", "project": PROJECT}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": {**PROJECT, "bucket": self._standing(bucket) if name in self.files else None}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "i", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "somebody", "username": "somebody", "flags": "{}"}}
        return {}

    def _standing(self, bucket: dict[str, Any]) -> dict[str, Any]:
        files = self.files[bucket["name"]]
        history, events = (files.get(f"wandb-{name}.jsonl", []) for name in ("history", "events"))
        return {
            **bucket,
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": 0,
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "summaryMetrics": (files.get("wandb-summary.json") or ["{}"])[-1],
            "wandbConfig": json.dumps({"t": {"value": 1}}),  # without "t" it is a run that never began
            "tags": [],
        }
