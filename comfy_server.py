"""A real ComfyUI server on the CPU with chosen packs linked in, driven over HTTP and WebSocket."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

Prompt = dict[str, dict[str, Any]]
# Node id, steps done, steps in all.
Progress = Callable[[str, int, int], None]


class ServerFailed(RuntimeError):
    """The server did not start, lost a pack or died; the message ends with its log."""


class PromptRejected(RuntimeError):
    """/prompt did not take the graph; `node_errors` says which input of which node."""

    def __init__(self, status: int, body: dict[str, Any]):
        super().__init__(f"/prompt answered {status}: {json.dumps(body)[:2000]}")
        self.status = status
        self.node_errors: dict[str, Any] = body.get("node_errors", {})


class ExecutionFailed(RuntimeError):
    """A node raised; the message names it."""


class ExecutionInterrupted(RuntimeError):
    """Somebody called /interrupt while the graph ran."""


def _die_with_parent() -> None:
    """In the child: be killed when the parent goes without a goodbye, say by SIGTERM to pytest."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@dataclass
class Result:
    """One finished graph: what the nodes showed (by node id), what came from the cache, how long it took.

    node_seconds: of the nodes that ran, from the message that one begins to the message that the next does.
    """

    prompt_id: str
    seconds: float
    outputs: dict[str, Any] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    node_seconds: dict[str, float] = field(default_factory=dict)


class ComfyServer:
    """Runs `main.py` of a ComfyUI tree as a context manager; leaving it kills the server and its files.

    Args:
        tree: Root of the ComfyUI tree.
        packs: Folders to link into custom_nodes/, by the name they get there.
        arguments: More command line arguments for main.py.
        start_seconds: How long the server may take to answer.
    """

    def __init__(
        self,
        tree: Path,
        packs: Mapping[str, Path],
        arguments: Sequence[str] = (),
        start_seconds: float = 180,
    ):
        self.tree = tree
        self.packs = dict(packs)
        self.arguments = list(arguments)
        self.start_seconds = start_seconds

    def __enter__(self) -> ComfyServer:
        self.base = Path(tempfile.mkdtemp(prefix="frame-thrift-comfyui-"))
        self.log = self.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        custom_nodes = self.base / "custom_nodes"
        custom_nodes.mkdir()
        for name, folder in self.packs.items():
            (custom_nodes / name).symlink_to(folder.resolve(), target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(self.tree / "main.py"), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(port), "--base-directory", str(self.base), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:", *self.arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(self.log, "wb") as sink:
            # A group of its own: whatever the server starts dies with it.
            self.process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        deadline = time.monotonic() + self.start_seconds
        while not self._answers():
            if self.process.poll() is not None:
                raise ServerFailed(f"ComfyUI ended with {self.process.returncode}.\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"ComfyUI gave no answer in {self.start_seconds:g} s.\n{self._log_tail()}")
            time.sleep(0.2)
        if "IMPORT FAILED" in self.log_text():
            raise ServerFailed(f"ComfyUI could not import a pack.\n{self._log_tail()}")

    def _answers(self) -> bool:
        try:
            return self.request("GET", "/system_stats")[0] == 200
        except OSError:
            return False

    def _stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            # Nothing in the server is worth a slow goodbye, and Ctrl-C should not wait.
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def log_text(self) -> str:
        """Everything the server has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _log_tail(self, lines: int = 40) -> str:
        return "Its log ends:\n" + "\n".join(self.log_text().splitlines()[-lines:])

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """One HTTP call: status and body, also for statuses that mean failure."""
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(self.url + path, data=data, method=method)
        call.add_header("Content-Type", "application/json")
        # No proxy of the environment may stand between us and our own machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(call, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as problem:
            return problem.code, problem.read()

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        status, body = self.request("GET", path)
        if status != 200:
            raise ServerFailed(f"GET {path} answered {status}: {body[:500]!r}")
        return json.loads(body)

    def object_info(self) -> dict[str, Any]:
        """What the server knows about its nodes, by node id."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Stops the running graph, as the frontend's button does."""
        self.request("POST", "/interrupt", {})

    def output_paths(self, result: Result, node: str, kind: str = "images") -> list[Path]:
        """The files that an output node (SaveVideo, SaveImage) of a run wrote."""
        entries = result.outputs[node][kind]
        return [self.base / entry["type"] / entry["subfolder"] / entry["filename"] for entry in entries]

    def output_path(self, result: Result, node: str, kind: str = "images") -> Path:
        """The first of them."""
        return self.output_paths(result, node, kind)[0]

    def queue(self, prompt: Prompt, progress: Progress | None = None, seconds: float = 600) -> Result:
        """Runs a graph in API format to its end.

        Raises:
            PromptRejected: Validation failed.
            ExecutionFailed: A node raised.
            ExecutionInterrupted: /interrupt was called.
            ServerFailed: The server died or took longer than `seconds`.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._queue(prompt, progress), seconds))
        except (asyncio.TimeoutError, aiohttp.ClientConnectionError) as problem:
            raise ServerFailed(
                f"The run got no end ({type(problem).__name__}).\n{self._log_tail()}"
            ) from problem

    async def _queue(self, prompt: Prompt, progress: Progress | None) -> Result:
        client = uuid.uuid4().hex
        begun = time.perf_counter()
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_:
                async with session.post(
                    f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}
                ) as answer:
                    body = await answer.json()
                    if answer.status != 200:
                        raise PromptRejected(answer.status, body)
                prompt_id = body["prompt_id"]
                cached, node_seconds, failure = await self._follow(socket_, prompt_id, progress)
            if failure is not None:
                raise failure
            seconds = time.perf_counter() - begun
            async with session.get(f"{self.url}/history/{prompt_id}") as answer:
                outputs = (await answer.json())[prompt_id]["outputs"]
        return Result(prompt_id, seconds, outputs, cached, node_seconds)

    async def _follow(
        self, socket_: aiohttp.ClientWebSocketResponse, prompt_id: str, progress: Progress | None
    ) -> tuple[frozenset[str], dict[str, float], Exception | None]:
        """Reads messages until the server has let go of the graph, which is also after an error."""
        cached: frozenset[str] = frozenset()
        node_seconds: dict[str, float] = {}
        running, since = None, 0.0
        failure: Exception | None = None
        async for message in socket_:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "execution_cached":
                cached = frozenset(data["nodes"])
            elif kind == "progress" and progress is not None:
                progress(str(data["node"]), int(data["value"]), int(data["max"]))
            elif kind == "execution_error":
                failure = ExecutionFailed(
                    f"{data['node_type']} (node {data['node_id']}) raised {data['exception_type']}: "
                    f"{data['exception_message']}\n{''.join(data.get('traceback', []))}"
                )
            elif kind == "execution_interrupted":
                failure = ExecutionInterrupted(f"The run was stopped in node {data.get('node_id')}.")
            elif kind == "executing":
                now = time.perf_counter()
                if running is not None:
                    node_seconds[running] = node_seconds.get(running, 0.0) + now - since
                running, since = data.get("node"), now
                if running is None:
                    return cached, node_seconds, failure
        raise ServerFailed(f"The server closed the connection.\n{self._log_tail()}")
