"""A server of the tests' own in the place of Hugging Face, which serves plain addresses too."""

import base64
import hashlib
import http.server
import json
import urllib.parse

MAIN, OLD = "a1" * 20, "0b" * 20


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with the files of `repositories`, by repository and name; remembers what was asked for and committed.

    Files of another commit than `MAIN` are called <commit>@<name>.
    """

    repositories, asked, commits = {}, [], []
    revisions = {"main": MAIN, MAIN: MAIN, "v1": OLD, "refs/pr/1": OLD, OLD: OLD}

    def do_HEAD(self):  # noqa: N802 (the base class's name)
        self.answer(with_content=False)

    def do_GET(self):  # noqa: N802
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        path = self.path.partition("?")[0]
        if with_content and ("/resolve/" in path or path.startswith("/api/models/")):
            self.asked.append(path)
        if path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            revision = urllib.parse.unquote(revision) or "main"
            files = self.repositories.get(repository)
            if files is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif revision not in self.revisions:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = [name.rpartition("@")[2] for name in files if self.is_of(name, self.revisions[revision])]
                listed = dict(
                    id=repository, sha=self.revisions[revision], siblings=[dict(rfilename=name) for name in files]
                )
                self.send(200, json.dumps(listed).encode())
            return
        repository, _, place = path.strip("/").partition("/resolve/")
        commit, _, name = place.partition("/")
        name = f"{commit}@{name}" if commit != MAIN else name
        if repository == "someone/gated":
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in self.repositories.get(repository, {}):
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            content = self.repositories[repository][name]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.send(200, content, {"ETag": tag, "X-Linked-Etag": tag, "X-Repo-Commit": commit}, with_content)

    @staticmethod
    def is_of(name: str, commit: str) -> bool:
        return name.startswith(f"{commit}@") if commit != MAIN else "@" not in name

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.repositories.setdefault(name, {})
            self.send(200, json.dumps(dict(url=f"https://huggingface.co/{name}", name=name)).encode())
        elif self.path.endswith("/preupload/main"):
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]
            ]
            self.send(200, json.dumps(dict(files=files)).encode())
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in added})
            self.send(
                200, json.dumps(dict(commitUrl="https://huggingface.co/me/it/commit/1", commitOid="1" * 40)).encode()
            )
        else:
            self.send(200, json.dumps(dict(errors=[], warnings=[])).encode())  # what checks a card

    def send(self, code: int, content: bytes, headers=None, with_content: bool = True) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_):
        pass
