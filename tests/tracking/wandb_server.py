"""A stub of W&B's server: as much as wandb-core asks of it for a run, and nothing beside that.

GraphQL says where things are: `POST /graphql`, one method of `Answers` for each operation. Lines of text (history,
summary) come in as `POST /files/ENTITY/PROJECT/RUN/file_stream`, each at an offset, so that one that is sent twice is
there once. Files are PUT to the addresses that GraphQL has given out. What is asked wrongly is kept in `faults`.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from conftest import free_port
from http_stub import JsonHandler, serving

KEY = "0123456789" * 4
AUTHORIZATION = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()


@dataclass
class Run:
    """What has arrived of a run. lines: by their stream. begun: its sessions. ends: their exit codes."""

    project: str
    name: str
    config: dict = field(default_factory=dict)
    lines: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    begun: int = 0
    ends: list = field(default_factory=list)

    @property
    def history(self):
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self):
        return json.loads(self.lines.get("wandb-summary.json", ["{}"])[-1])


@dataclass
class Artifact:
    """A folder. asked: what the client says of it. digests: of its files, in base 64, as announced."""

    asked: dict
    digests: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    manifest: dict | None = None
    committed: bool = False


class WandBServer:
    """Runs and artifacts by their id; they outlast stop(), so that start() is a server that was away for a while.

    failing: the status that the next request of a kind gets: of an operation, "file_stream", or a kind of files.
    """

    def __init__(self):
        self.port, self.running = free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"
        self.runs, self.artifacts, self.failing, self.faults, self.lock = {}, {}, {}, [], threading.Lock()

    def start(self):
        self.running = serving(type("Here", (Handler,), {"server_of": self}), self.port)
        self.running.__enter__()

    def stop(self):
        if self.running is not None:
            self.running.__exit__(None, None, None)
            self.running = None


class Fault(Exception):
    """Something that W&B's server would not take, or that this stub does not know."""


class Refusal(Exception):
    """As a test has asked for, with the status of the answer."""


def check(condition, fault):
    if not condition:
        raise Fault(fault)


class Answers:
    """What GraphQL answers to each operation, by its name."""

    def __init__(self, server):
        self.server, self.runs, self.artifacts = server, server.runs, server.artifacts

    def Viewer(self):
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self):
        return {"serverInfo": {"features": []}}

    def OrganizationCoreWeaveOrganizationID(self, entityName):
        return {"entity": {"organization": None}}

    def RunResumeStatus(self, project, entity, name):
        run, bucket = self.runs.get(name), None
        if run and run.project == project:
            history = run.lines.get("wandb-history.jsonl", [])
            bucket = {
                "id": name, "name": name, "displayName": run.name, "config": json.dumps(run.config),
                "summaryMetrics": json.dumps(run.summary), "wandbConfig": '{"t": 1}', "logLineCount": 0,
                "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]),
                "eventsLineCount": 0, "eventsTail": "[]",
            }  # fmt: skip
        return {"model": {"id": "p", "name": project, "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def UpsertBucket(self, name, project, config, displayName, summaryMetrics, **others):
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(project, displayName))
        run.config |= json.loads(config or "{}")
        run.begun += others["host"] is not None  # the first of a session has it; later ones change the config
        check(summaryMetrics is None and others["sweep"] is None, f"UpsertBucket: {summaryMetrics}, {others}")
        where = {"id": "p", "name": project, "entity": {"id": "e", "name": "me"}}
        bucket = {"id": name, "name": name, "displayName": run.name, "config": json.dumps(run.config), "project": where}
        return {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(run.history)}, "inserted": inserted}}

    def CreateRunFiles(self, entity, project, run, files):
        found = [{"name": name, "uploadUrl": self._address("run", run, name)} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": found}}

    def ArtifactType(self, entity, project, name):
        return {"project": {"artifact": None}}

    def CreateArtifact(self, input):
        same = [
            id for id, each in self.artifacts.items()
            if each.committed and all(each.asked[key] == input[key] for key in ("digest", "artifactCollectionName"))
        ]  # fmt: skip
        id = same[0] if same else f"artifact{len(self.artifacts)}"
        artifact = self.artifacts.setdefault(id, Artifact(input))
        state = "COMMITTED" if artifact.committed else "PENDING"
        sequence = {"latestArtifact": {"id": id} if same else None}
        return {"createArtifact": {"artifact": {"id": id, "state": state, "artifactSequence": sequence}}}

    def CreateArtifactManifest(self, artifactID, name, includeUpload, **others):
        address = self._address("manifest", artifactID, name) if includeUpload else None
        file = {"id": "m", "uploadUrl": address, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifactID, "file": file}}}

    def CreateArtifactFiles(self, input):
        nodes = []
        for each in input["artifactFiles"]:
            id, name = each["artifactID"], each["name"]
            self.artifacts[id].digests[name] = each["md5"]
            where = {"storagePath": f"{id}/{name}", "uploadUrl": self._address("artifact", id, name)}
            nodes.append({"node": where | {"uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": id}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def CommitArtifact(self, artifactID):
        artifact = self.artifacts[artifactID]
        stored = {name: each["digest"] for name, each in artifact.manifest["contents"].items()}
        check(stored == artifact.digests and artifact.files.keys() == stored.keys(), f"{artifactID} is not whole")
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": artifact.asked["digest"]}}}

    def _address(self, *parts):
        return "/".join((self.server.uri, "storage", *(quote(part, safe="") for part in parts)))


class Handler(JsonHandler):
    """Takes the three kinds of requests apart."""

    def do_POST(self):
        self.reply(self.graphql if self.path == "/graphql" else self.file_stream)

    def do_PUT(self):
        self.reply(self.stored)

    def reply(self, act):
        body, status = self.body(), 200
        try:
            with self.server_of.lock:
                answer = act(body)
        except Refusal as refusal:
            status, answer = refusal.args[0], {}
        except Exception as fault:  # also what an unknown run or a missing variable raises
            status, answer = 400, {"errors": [{"message": repr(fault)}]}
            self.server_of.faults.append(f"{self.command} {self.path}: {fault!r}: {body[:300]}")
        self.answer(answer, status)

    def refuse(self, kind):
        if kind in self.server_of.failing:
            raise Refusal(self.server_of.failing.pop(kind))

    def graphql(self, body):
        check(self.headers["Authorization"] == AUTHORIZATION, "not the key")
        asked = json.loads(body)
        name = asked["query"].split("(")[0].split("{")[0].split()[1]
        answer = getattr(Answers(self.server_of), name, None)
        check(answer is not None, f"unknown: {name}")
        self.refuse(name)
        return {"data": answer(**asked.get("variables") or {})}

    def file_stream(self, body):
        check(self.headers["Authorization"] == AUTHORIZATION, "not the key")
        id, last = self.path.split("/")[-2:]
        check(self.path == f"/files/me/{self.server_of.runs[id].project}/{id}/file_stream", "no address of a run")
        self.refuse("file_stream")
        run, sent = self.server_of.runs[id], json.loads(body)
        for name, part in sent.get("files", {}).items():
            lines = run.lines.setdefault(name, [])
            check(part["offset"] <= len(lines), f"{name} has {len(lines)} lines")
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
        run.ends += [sent["exitcode"]] if sent.get("complete") else []
        return {}

    def stored(self, body):
        kind, id, name = map(unquote, self.path.removeprefix("/storage/").split("/"))
        self.refuse(kind)
        if kind == "run":
            self.server_of.runs[id].files[name] = body
        elif kind == "manifest":
            self.server_of.artifacts[id].manifest = json.loads(body)
        else:
            artifact, digest = self.server_of.artifacts[id], base64.b64encode(hashlib.md5(body).digest()).decode()
            check(artifact.digests[name] == digest, f"{name} has another digest")
            artifact.files[name] = body
        return {}
