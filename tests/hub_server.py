"""A Hub on this machine, in memory: enough of its interface for the real client to create, commit and download.

A repository is `{branch: {path: content}}`. One with "refused" in its name answers commits with an error, one with
"dropped" in it cuts the connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """The server; `url` goes into `HF_ENDPOINT`."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.created: list[tuple[str, bool]] = []
        self.commits: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.lfs = False
        hub = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Any) -> dict[str, str]:
        """What a process needs to use this Hub and nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit_id(self, name: str, branch: str) -> str:
        files = self.repositories[name][branch]
        return hashlib.sha1(
            repr(sorted((p, hashlib.sha1(c).hexdigest()) for p, c in files.items())).encode()
        ).hexdigest()

    def files_at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for branch, files in self.repositories.get(name, {}).items():
            if revision in (branch, self.commit_id(name, branch)):
                return self.commit_id(name, branch), files
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def not_found(self, what: str) -> None:
        self.answer({"error": what}, 404, X_Error_Code=what, X_Error_Message=what)

    @property
    def parts(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def do_GET(self) -> None:  # noqa: N802
        match self.parts:
            case ["api", "models", user, name, *rest] if f"{user}/{name}" in self.hub.repositories:
                found = self.hub.files_at(f"{user}/{name}", rest[1] if len(rest) > 1 else "main")
                if found is None:
                    self.not_found("RevisionNotFound")
                elif rest and rest[0] == "tree":
                    entries = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in found[1].items()]
                    self.answer(entries)
                else:
                    siblings = [{"rfilename": path} for path in found[1]]
                    self.answer({"id": f"{user}/{name}", "sha": found[0], "siblings": siblings, "tags": []})
            case [user, name, "resolve", revision, *path] if f"{user}/{name}" in self.hub.repositories:
                found = self.hub.files_at(f"{user}/{name}", revision)
                content = None if found is None else found[1].get("/".join(path))
                if found is None:
                    self.not_found("RevisionNotFound")
                elif content is None:
                    self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
                else:
                    tag = hashlib.sha256(content).hexdigest()
                    self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=found[0], Accept_Ranges="none")
            case _:
                self.not_found("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:  # noqa: N802
        self.hub.objects[self.parts[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        match self.parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                status = 409 if name in self.hub.repositories else 200
                if status == 200:
                    private = asked.get("visibility") == "private" or asked.get("private")
                    self.hub.created.append((name, bool(private)))
                    self.hub.repositories[name] = {"main": {}}
                self.answer({"url": f"{self.hub.url}/{name}", "name": name}, status)
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", user, name, "branch", *branch]:
                branches = self.hub.repositories[f"{user}/{name}"]
                status = 409 if "/".join(branch) in branches else 200
                branches.setdefault("/".join(branch), dict(branches["main"]))
                self.answer({}, status)
            case ["api", "models", _, _, "preupload", _]:
                mode = lambda path: "lfs" if self.hub.lfs and path.endswith(".safetensors") else "regular"  # noqa: E731
                files = [file["path"] for file in json.loads(body)["files"]]
                answers = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False, "oid": None} for p in files]
                self.answer({"files": answers})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                for entry in objects:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
                self.answer({"transfer": "basic", "objects": objects})
            case ["api", "models", user, name, "commit", revision]:
                if "dropped" in name:
                    self.close_connection = True
                    self.connection.close()
                elif "refused" in name:
                    self.answer({"error": "You do not have write access"}, 403, X_Error_Message="no write access")
                else:
                    self.commit(f"{user}/{name}", revision, [json.loads(line) for line in body.splitlines()])
            case _:
                self.not_found("RepoNotFound")

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repositories[name][branch]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.hub.commits.append(value | {"repository": name, "branch": branch})
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    files.pop(value["path"])
        commit = self.hub.commit_id(name, branch)
        self.answer({"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
