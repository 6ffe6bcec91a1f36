"""A hub on this machine, which answers as the real one does: for downloads and for uploads."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

TOKEN = "hf_of_this_test"
COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves `folder`/owner/name/revision; `requested` lists the files that were asked for.

    With the token TOKEN it takes uploads to `main` as the hub does: weights through git-lfs, other files in the commit.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.large: dict[str, bytes] = {}
        self.commits: list[list[dict]] = []
        self.folder = folder
        self.requested: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments):
        pass

    def reply(self, content: bytes, status=200, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, (action, revision, *_) = "/".join(parts[2:4]), [*parts[4:], "revision", "main"]
        else:
            repository, (action, revision, *_) = "/".join(parts[:2]), [*parts[2:], "", ""]
        branch = next((name for name, commit in COMMITS.items() if revision in (name, commit)), "")
        folder = self.server.folder / repository / branch
        if not branch or not folder.is_dir():
            code = "RevisionNotFound" if (self.server.folder / repository).is_dir() else "RepoNotFound"
            self.reply(b"", 404, X_Error_Code=code, X_Error_Message=f"no {repository} {revision}")
        elif action == "revision":
            self.reply(json.dumps({"id": repository, "sha": COMMITS[branch], "siblings": []}).encode())
        elif action == "tree" and not folder.joinpath(*parts[6:]).is_dir():
            self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Error_Message=f"no {parts[6:]}")
        elif action == "tree":
            files = [file for file in sorted(folder.joinpath(*parts[6:]).rglob("*")) if file.is_file()]
            entries = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "c" * 40}
                for file in files
            ]
            self.reply(json.dumps(entries).encode())
        else:
            name = "/".join(parts[4:])
            if not (folder / name).is_file():
                self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Error_Message=f"no {name}")
                return
            content = (folder / name).read_bytes()
            if self.command == "GET":
                self.server.requested.append(name)
            self.reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMITS[branch])

    def do_POST(self):
        path = self.path.partition("?")[0]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in content.splitlines()] if path.count("/commit/") else [json.loads(content)]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.reply(b'{"error": "Invalid username or password."}', 401)
        elif path == "/api/repos/create":
            repository = f"{lines[0]['organization']}/{lines[0]['name']}"
            (self.server.folder / repository / "main").mkdir(parents=True, exist_ok=True)
            self.answer(url=f"{self.server.url}/{repository}", id=repository)
        elif path == "/api/validate-yaml":
            front = yaml.safe_load(lines[0]["content"].split("---\n")[1])
            errors = [] if isinstance(front, dict) else [{"message": "metadata must be a mapping"}]
            self.answer(400 if errors else 200, errors=errors, warnings=[])
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in lines[0]["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in files]
            pairs = zip(files, modes, strict=True)
            self.answer(files=[{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in pairs])
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = lines[0]["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
            self.answer(transfer="basic", objects=objects)
        else:
            assert path.endswith("/commit/main")
            repository = "/".join(path.split("/")[3:5])
            self.commit(self.server.folder / repository / "main", lines[1:])
            self.answer(commitUrl=f"{self.server.url}/{repository}/commit/{COMMITS['main']}", commitOid=COMMITS["main"])

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self.reply(b"")

    def answer(self, status=200, **content):
        self.reply(json.dumps(content).encode(), status, Content_Type="application/json")

    def commit(self, folder: Path, changes: list[dict]):
        self.server.commits.append(changes)
        for change in changes:
            value = change["value"]
            file = folder / value["path"]
            if change["key"] == "deletedFile":
                file.unlink()
            else:
                is_large = change["key"] == "lfsFile"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"]))
