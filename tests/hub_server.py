"""A Hugging Face hub on the loopback, in memory: as much of its protocol as pushing and loading models takes.

    with HubServer() as hub:
        subprocess.run([...], env=os.environ | hub.env(tmp_path))   # the client reads `HF_ENDPOINT` when it is imported

Repositories are lists of commits, and a commit is a whole snapshot `{path: content}`, so every revision stays loadable.
Files of weights take the way of large files (LFS batch, then PUT); all others come within the commit. Written from what
`huggingface_hub` 1.33 and 2.4 send; what it does not know answers 404, as the hub does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TOKEN = "hf_of_the_tests"
USER = "me"
LARGE = (".safetensors", ".bin", ".png")
RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags: `{name: sha}`

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        self.refs[branch] = sha
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)


class HubServer(ThreadingHTTPServer):
    """Serves while in the `with`. `repos` is what has been pushed, `log` the requests (`"GET /api/..."`)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # content by SHA-256
        self.log: list[str] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def env(self, home: Path) -> dict[str, str]:
        """Environment of a client with a cache of its own in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What is in a repository."""
        return self.repos[repo].at(revision).files

    def __enter__(self) -> HubServer:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Refused(Exception):
    def __init__(self, status: int, code: str = "", **body) -> None:
        self.status, self.code, self.body = status, code, body or {"error": code}


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, path: str):
    def add(function):
        ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    # Accounts and repositories ----------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.authorize()
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/repos/create")
    def create(self):
        self.authorize()
        given = json.loads(self.body)
        name = f"{given.get('organization') or USER}/{given['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            raise Refused(409, error="You already created this model repo", url=url)
        self.server.repos[name] = Repo()
        self.server.repos[name].commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": url, "name": name}

    @route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
    def info(self, repo, revision="main"):
        commit = self.commit_at(repo, revision)
        readme = commit.files.get("README.md", b"").decode()
        return {
            "id": repo,
            "modelId": repo,
            "sha": commit.sha,
            "private": False,
            "tags": [],
            "cardData": ModelCard(readme).data.to_dict(),
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    @route("POST", f"/api/models/{REPO}/branch/(?P<name>[^/]+)")
    def branch(self, repo, name):
        self.authorize()
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        return self.add_ref(repo, name, start)

    @route("POST", f"/api/models/{REPO}/tag/(?P<revision>[^/]+)")
    def tag(self, repo, revision):
        self.authorize()
        return self.add_ref(repo, json.loads(self.body)["tag"], revision)

    def add_ref(self, repo, name, revision):
        if name in self.repo(repo).refs:
            raise Refused(409, error=f"Reference {name} exists already")
        self.repo(repo).refs[name] = self.commit_at(repo, revision).sha
        return {}

    # Pushing ----------------------------------------------------------------------------------------------------------

    @route("POST", "/api/validate-yaml")
    def validate(self):
        """What the hub refuses in a card is a part of this; see its documentation of model cards."""
        data = ModelCard(json.loads(self.body)["content"]).data.to_dict()
        errors = []
        bases = data.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            try:
                validate_repo_id(base)
            except HFValidationError:
                errors.append(f'"base_model" with value "{base}" is not valid. Use a model id.')
        if data.get("base_model_relation", "finetune") not in RELATIONS:
            errors.append(f'"base_model_relation" must be one of {RELATIONS}')
        if errors:
            raise Refused(400, errors=[{"message": message} for message in errors], warnings=[])
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    @route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo, revision):
        self.authorize()
        there = self.commit_at(repo, revision).files
        answer = []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            known = {"oid": (sha256 if large else git_sha)(there[path])} if path in there else {}
            answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | known)
        return {"files": answer}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        self.authorize()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.server.large else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid):
        content = self.body
        if sha256(content) != oid:
            raise Refused(400, error=f"the content is not that of {oid}")
        self.server.large[oid] = content
        return {}

    @route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
    def push(self, repo, revision):
        self.authorize()
        files, title = dict(self.commit_at(repo, revision).files), ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, error=f"unknown operation {key}")
        commit = self.repo(repo).commit(revision, title, files)
        return {"success": True, "commitOid": commit.sha, "commitUrl": f"{self.server.url}/{repo}/commit/{commit.sha}"}

    # Loading ----------------------------------------------------------------------------------------------------------

    @route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, repo, revision, folder=""):
        entries = []
        for path, content in sorted(self.commit_at(repo, revision).files.items()):
            if path.startswith(f"{folder}/" if folder else "") and ("recursive" in self.query or "/" not in path):
                large = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}}
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
                entries.append(entry | (large if path.endswith(LARGE) else {}))
        if folder and not entries:
            raise Refused(404, "EntryNotFound")
        return entries

    @route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        commit = self.commit_at(repo, revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound")
        content = commit.files[path]
        etag = sha256(content) if path.endswith(LARGE) else git_sha(content)
        return content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}

    # The server -------------------------------------------------------------------------------------------------------

    def repo(self, name: str) -> Repo:
        if name not in self.server.repos:
            raise Refused(404, "RepoNotFound")
        return self.server.repos[name]

    def commit_at(self, repo: str, revision: str) -> Commit:
        commit = self.repo(repo).at(unquote(revision))
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        return commit

    def authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, error="Invalid username or password.")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _serve(self) -> None:
        self.body = self._read()  # in any case, as the connection is used again
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        headers: dict[str, str] = {}
        with self.server.lock:
            self.server.log.append(f"{self.command} {unquote(url.path)}")
            try:
                status, content = 200, self._answer(method, url.path)
            except Refused as refused:
                status, content = refused.status, refused.body
                if refused.code:
                    headers["X-Error-Code"] = refused.code
        if isinstance(content, tuple):
            content, more = content
            headers |= more
        else:
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, method: str, path: str):
        for known, pattern, name in ROUTES:
            if known == method and (match := pattern.fullmatch(path)):
                groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                return getattr(self, name)(**groups)
        raise Refused(404, error=f"unknown: {method} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_) -> None: ...


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
