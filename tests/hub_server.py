"""A hub on this machine: it answers the requests of the hub's own client as the hub does."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

TOKEN, USER = "hf_write", "user"
LICENCES = {"openrail++", "apache-2.0", "mit", "other"}


@dataclass
class Repository:
    """A repository: who may see it, and the files of each of its commits by the commit's name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, files: dict[str, bytes], deleted: list[str] | None = None) -> str:
        kept = {name: text for name, text in self.files.items() if name not in (deleted or [])}
        oid = hashlib.sha1(f"commit {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = kept | files
        return oid

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head] if self.commits else {}


@dataclass
class Hub:
    """What is on the hub, what was asked of it, and how it is to fail."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    largest: int = 2**30
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and message by a pattern of the request, ``POST /api/…``."""
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # an answer in one piece: a second one would wait for the first's receipt

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        self.hub.received.append(body)
        for pattern, (status, message) in self.hub.failures.items():
            if re.search(pattern, asked):
                return self._answer({"error": message}, status)
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, asked):
                return answer(self, body, *found.groups())
        return self._answer({"error": f"nobody answers {asked}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, value: object, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, name: str) -> Repository | None:
        """Find a repository that whoever asks may see; answer as the hub does if there is none."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._is_known):
            status = 404 if self._is_known else 401
            self._answer({"error": "Repository not found"}, status, X_Error_Code="RepoNotFound")
            return None
        return found

    def _refuse_strangers(self) -> bool:
        if self._is_known:
            return False
        message = "Invalid credentials in Authorization header"
        self._answer({"error": message}, 401, X_Error_Message=message)
        return True

    def whoami(self, body: bytes) -> None:
        if not self._refuse_strangers():
            self._answer({"type": "user", "name": USER})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if self._refuse_strangers():
            return
        if not name.startswith(f"{USER}/"):
            return self._answer({"error": "You don't have the rights to create it"}, 403)
        if name in self.hub.repositories:
            return self._answer({"error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = Repository(asked["visibility"] == "private")
        self._answer({"url": f"{self.hub.endpoint}/{name}"})

    def delete(self, body: bytes) -> None:
        asked = json.loads(body)
        del self.hub.repositories[f"{asked['organization'] or USER}/{asked['name']}"]
        self._answer({})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (found := self._find(name)) is None:
            return
        oid = self._resolve(found, revision or "main")
        if oid is None:
            return self._answer({"error": "?"}, 404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": file} for file in found.commits[oid]]
        told = {"id": name, "sha": oid, "private": found.private, "siblings": siblings}
        self._answer({**told, "tags": [], "downloads": 0, "likes": 0})

    def _resolve(self, found: Repository, revision: str) -> str | None:
        return {"main": found.head, **{oid: oid for oid in found.commits}}.get(revision)

    def validate(self, body: bytes) -> None:
        licence = re.search(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
        if licence and licence[1] not in LICENCES:
            message = f'"license" must be one of {", ".join(sorted(LICENCES))}'
            is_plain = self.headers["Accept"] == "text/plain"
            return self._answer(message.encode() if is_plain else {"error": message}, 400)
        self._answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            if one["size"] > self.hub.largest:
                one["error"] = {"code": 422, "message": "File is larger than allowed"}
            elif one["oid"] not in self.hub.stored:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
            objects.append(one)
        self._answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._answer(b"")

    def commit(self, body: bytes, name: str) -> None:
        if (found := self._find(name)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files: dict[str, bytes] = {}
        deleted = []
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", found.head) != found.head:
                    return self._answer({"error": "The branch has moved"}, 412)
                self.hub.summaries.append(f"{value['summary']}{value['description']}")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
        oid = found.commit(files, deleted)
        self._answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def settings(self, body: bytes, name: str) -> None:
        self.hub.repositories[name].private = json.loads(body)["visibility"] == "private"
        self._answer({})

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if (found := self._find(name)) is None:
            return
        oid = self._resolve(found, revision)
        if oid is None or file not in found.commits[oid]:
            return self._answer({"error": "?"}, 404, X_Error_Code="EntryNotFound")
        content = found.commits[oid][file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(content, ETag=etag, X_Repo_Commit=oid)


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"DELETE /api/repos/delete", _Handler.delete),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(.+)", _Handler.info),
    (rf"POST /api/models/{_REPO}/preupload/main", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.store),
    (rf"POST /api/models/{_REPO}/commit/main", _Handler.commit),
    (rf"PUT /api/models/{_REPO}/settings", _Handler.settings),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def serve_hub(cache: str) -> Iterator[Hub]:
    """Serve an empty hub, and let the client ask it, with a token and a cache of its own."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": cache,
            "HF_TOKEN_PATH": f"{cache}/no-token",
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub
    server.shutdown()
    server.server_close()
