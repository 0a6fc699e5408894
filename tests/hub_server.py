# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A local stand-in for the Hugging Face Hub on 127.0.0.1, for tests.

It speaks the part of the Hub's HTTP interface that `huggingface_hub`, `diffusers` and `datasets` use to create, look up
and download a repo, and to push a folder. Everything is kept in memory, and every file is a regular one (no LFS, no
Xet). Run the clients in processes of their own, because `HF_ENDPOINT` is read when `huggingface_hub` is imported:

    with HubServer() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.environment(tmp_path, token=hub.token))
        assert "README.md" in hub.files("user/repo")
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import environ
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TIME = datetime(2026, 1, 1, tzinfo=timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Commit:
    """One commit: its id, its message and every file of the repo after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repo: its commits, oldest first, and the commit id at the head of each branch."""

    repo_id: str
    repo_type: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{self.repo_type}/{self.repo_id} {parent} {message}".encode())
        for path in sorted(files):
            digest.update(path.encode() + blob_id(files[path]).encode())
        commit = Commit(digest.hexdigest(), message, files)
        self.commits.append(commit)
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class Request:
    """One request as it arrived, and the status of the answer (`"cut"` where the connection was cut)."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int | str


@dataclass
class Fault:
    """
    What happens instead of an answer: a status, or `"cut"` to break the connection half-way. `times` counts down to 0.
    """

    method: str
    path: str
    action: int | str
    times: int


class HubError(Exception):
    """An answer other than success, with the Hub's own error code where it has one."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message} | (body or {})


def blob_id(content: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def front_matter(content: str) -> dict:
    """The metadata at the top of a README.md.

    Raises:
        ValueError: With what the Hub would object to: broken YAML or a field of the wrong type.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return {}
    try:
        metadata = dict(yaml.safe_load(match[1]) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"YAML: {error}") from error
    accepted = {"license": (str, list), "pipeline_tag": (str,), "library_name": (str,), "tags": (list,)}
    accepted |= {name: (str, list) for name in ("base_model", "datasets", "language")}
    for name, types in accepted.items():
        value = metadata.get(name)
        entries = value if isinstance(value, list) else [value]
        if name in metadata and (not isinstance(value, types) or not all(isinstance(entry, str) for entry in entries)):
            raise ValueError(f'"{name}" must be a string or a list of strings, got {value!r}')
        if name in ("base_model", "datasets") and name in metadata:
            for entry in entries:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry):
                    raise ValueError(f'"{name}" with value "{entry}" is not valid. Use an id from the Hub.')
    return metadata


class HubServer:
    """The server; a context manager that listens from `__enter__` to `__exit__`.

    Args:
        token (`str`, *optional*): The only token that is accepted. It may read and write everything under `user`.
        user (`str`, *optional*): The user whose token it is. Writing to another namespace is refused with 403.
        faults (*optional*): Arguments of `fail`, a tuple for each fault.
    """

    def __init__(self, token: str = "hf_local_test_token", user: str = "user", faults: tuple[tuple, ...] = ()):
        self.token, self.user = token, user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.RLock()
        for fault in faults:
            self.fail(*fault)

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment of a client process: this endpoint, a home of its own, and `token` if there is one."""
        kept = {
            name: value
            for name, value in environ.items()
            if not re.match("HF_|HUGGING|TRANSFORMERS_|DIFFUSERS_", name)
        }
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | ({} if token is None else {"HF_TOKEN": token})

    def fail(self, method: str, path: str, action: int | str, times: int = 1) -> None:
        """Answers the next `times` requests of this method whose path matches the regex with a status or a cut
        connection.

        `"cut"` reads half of the request's body and resets the connection; where the request has none it sends half of
        the answer's and closes it.
        """
        self.faults.append(Fault(method, path, action, times))

    def add_repo(
        self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False, repo_type: str = "model"
    ) -> Repo:
        """Creates a repo with `files`, without a client."""
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private)
        repo.commit("initial commit", {".gitattributes": b""} | (files or {}))
        return repo

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files of a repo by path."""
        return self.repos[repo_type, repo_id].at(revision).files

    def take_fault(self, method: str, path: str) -> int | str | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.action
        return None

    # The interface. Each method returns the JSON body of an answer, or raises a `HubError`.

    def repo(self, repo_type: str, repo_id: str, signed_in: bool) -> Repo:
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or repo.private and not signed_in:
            raise HubError(404 if signed_in else 401, "Repository not found", "RepoNotFound")
        return repo

    def check_write(self, namespace: str, signed_in: bool) -> None:
        if not signed_in:
            raise HubError(401, "Invalid username or password.")
        if namespace != self.user:
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace}")

    def whoami(self, signed_in: bool) -> dict:
        if not signed_in:
            raise HubError(401, "Invalid credentials in Authorization header")
        access = {"accessToken": {"displayName": "test", "role": "write", "createdAt": TIME}}
        return {"type": "user", "id": "0" * 24, "name": self.user, "fullname": self.user, "orgs": [], "auth": access}

    def validate_yaml(self, request: dict) -> dict:
        try:
            metadata = front_matter(request["content"])
        except ValueError as error:
            raise HubError(400, str(error), body={"errors": [{"message": str(error)}], "warnings": []}) from error
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    def create(self, request: dict, signed_in: bool) -> dict:
        namespace, repo_type = request.get("organization") or self.user, request.get("type") or "model"
        self.check_write(namespace, signed_in)
        repo_id = f"{namespace}/{request['name']}"
        url = f"{self.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if (repo_type, repo_id) in self.repos:
            raise HubError(409, "You already created this model repo", body={"url": url})
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.add_repo(repo_id, private=private, repo_type=repo_type)
        return {"url": url, "name": repo_id, "id": repo_id}

    def preupload(self, repo: Repo, revision: str, request: dict) -> dict:
        files = repo.at(revision).files
        answer = []
        for file in request["files"]:
            known = files.get(file["path"])
            oid = None if known is None else blob_id(known)
            answer.append({"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def commit(self, repo: Repo, revision: str, body: bytes) -> dict:
        operations = [json.loads(line) for line in body.splitlines()]
        head = repo.at(revision)
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(head.files), ""
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") and not head.oid.startswith(value["parentCommit"]):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: files[path] for path in files if not path.startswith(value["path"].rstrip("/") + "/")}
            else:
                raise HubError(400, f"Cannot apply {key} to {value.get('path')}")
        commit = repo.commit(message, files, revision)
        return {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.url}/{repo.repo_id}/commit/{commit.oid}",
        }

    def create_branch(self, repo: Repo, branch: str, request: dict) -> dict:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.at(request.get("startingPoint") or "main").oid
        return {}

    def info(self, repo: Repo, revision: str) -> dict:
        commit = repo.at(revision)
        card = front_matter(commit.files.get("README.md", b"").decode())
        return {
            "id": repo.repo_id,
            "author": repo.repo_id.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "createdAt": TIME,
            "lastModified": TIME,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def refs(self, repo: Repo) -> dict:
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
        return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}

    def entries(self, commit: Commit) -> dict[str, dict]:
        """Every file and folder of a commit, as the `tree` and `paths-info` answers show it."""
        found = {}
        last = {"id": commit.oid, "title": commit.message, "date": TIME}
        for path, content in sorted(commit.files.items()):
            for folder in list(Path(path).parents)[:-1]:
                name = folder.as_posix()
                oid = hashlib.sha1(f"{commit.oid} {name}".encode()).hexdigest()
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": oid, "lastCommit": last}
            found[path] = {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": blob_id(content),
                "lastCommit": last,
            }
        return found

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> list[dict]:
        entries = self.entries(repo.at(revision))
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        inside = {
            path[len(folder) :].lstrip("/"): entries[path]
            for path in entries
            if not folder or path.startswith(f"{folder}/")
        }
        return [entry for path, entry in inside.items() if recursive or "/" not in path]


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads a request, asks the hub, writes the answer, records both."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        # The client went away.
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        action = self.hub.take_fault(self.command, self.path)
        if action == "cut" and length:
            self.record("cut", self.rfile.read(length // 2))
            return self.reset()
        body = self.rfile.read(length)
        headers: dict[str, str] = {}
        try:
            if isinstance(action, int):
                raise HubError(action, HTTPStatus(action).phrase)
            with self.hub._lock:
                status, content = self.answer(body, headers)
        except HubError as error:
            status, content = error.status, json.dumps(error.body).encode()
            headers["X-Error-Message"] = " ".join(str(error).split())
            if error.code:
                headers["X-Error-Code"] = error.code
        self.record("cut" if action == "cut" else status, body)
        self.send_response(status)
        headers.setdefault("Content-Type", "application/json")
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if action == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def record(self, status: int | str, body: bytes) -> None:
        self.hub.requests.append(Request(self.command, self.path, dict(self.headers.items()), body, status))

    def reset(self) -> None:
        """Ends the connection with a reset rather than a clean close, as a broken line does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def answer(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """The status and content for this request; fills `headers`."""
        hub = self.hub
        authorization = self.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        signed_in = authorization is not None
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]

        if "resolve" in parts[:5] and parts[0] != "api":
            return self.resolve(parts, signed_in, headers)
        match (self.command, *parts):
            case ("GET", "api", "whoami-v2"):
                found = hub.whoami(signed_in)
            case ("POST", "api", "validate-yaml"):
                found = hub.validate_yaml(json.loads(body))
            case ("POST", "api", "repos", "create"):
                found = hub.create(json.loads(body), signed_in)
            case (method, "api", ("models" | "datasets" | "spaces") as kind, namespace, name, *rest):
                writes = method == "POST" and rest[:1] != ["paths-info"]
                if writes:
                    hub.check_write(namespace, signed_in)
                repo = hub.repo(kind[:-1], f"{namespace}/{name}", signed_in)
                match (method, *rest):
                    case ("GET",):
                        found = hub.info(repo, "main")
                    case ("GET", "revision", revision):
                        found = hub.info(repo, revision)
                    case ("GET", "refs"):
                        found = hub.refs(repo)
                    case ("GET", "tree", revision, *folder):
                        recursive = query.get("recursive", "").lower() in ("1", "true")
                        found = hub.tree(repo, revision, "/".join(folder), recursive)
                    case ("POST", "paths-info", revision):
                        paths = parse_qs(body.decode()).get("paths", [])
                        entries = hub.entries(repo.at(revision))
                        found = [entries[path] for path in paths if path in entries]
                    case ("POST", "preupload", revision):
                        found = hub.preupload(repo, revision, json.loads(body))
                    case ("POST", "commit", revision):
                        found = hub.commit(repo, revision, body)
                    case ("POST", "branch", branch):
                        found = hub.create_branch(repo, branch, json.loads(body or b"{}"))
                    case _:
                        raise HubError(404, f"{method} {self.path} is not served here")
            case _:
                raise HubError(404, f"{self.command} {self.path} is not served here")
        return 200, json.dumps(found).encode()

    def resolve(self, parts: list[str], signed_in: bool, headers: dict[str, str]) -> tuple[int, bytes]:
        """The content of `[datasets/]user/repo/resolve/revision/path`, all of it or from a byte on (`Range`)."""
        at = parts.index("resolve")
        repo_type = parts[0][:-1] if at == 3 else "model"
        repo = self.hub.repo(repo_type, "/".join(parts[at - 2 : at]), signed_in)
        commit, path = repo.at(parts[at + 1]), "/".join(parts[at + 2 :])
        headers["X-Repo-Commit"] = commit.oid
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        content = commit.files[path]
        headers |= {
            "ETag": f'"{blob_id(content)}"',
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content) - 1) + 1, len(content))
        if start >= len(content):
            raise HubError(416, f"{path} has {len(content)} bytes")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop]
