"""`model.py` of the Triton model `adapters`: the catalogue of what is served. It needs only the standard library.

Input `name` BYTES[1] ("" for all), output `catalogue` BYTES[1]: a JSON list with an adapter's `serving.json` and, as
"prompt", its `prompt.json` in each entry. The adapters' folders lie beside the model repository and are read at each
request. The base has an entry too, base.json beside this file, for who asks for it by its name, "gemma".

With the embedded engine it listens to the engine's heartbeats. Adapters that the engine could not read are left out.
Output `engine` BYTES[1] is the latest heartbeat as JSON, with `still`, the seconds since it made a step or had nothing
to do; {} without an engine. By it clients tell a server that is busy from one that hangs.

It also keeps the model `gemma` loaded: that unloads itself when its engine has ended, and is loaded again here as soon
as the next one answers. So Triton's readiness is right at every moment, and nobody outside needs the permission to load
and unload models.
"""

import contextlib
import json
import locale
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

ENGINE = "engine.sock"
POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 0.25


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        self.folder = Path(args["model_repository"]).resolve().parent.parent / "adapters"
        base = Path(args["model_repository"], args["model_version"], "base.json")
        self.base = json.loads(base.read_text(encoding="utf-8")) if base.exists() else {}
        self.parent, self.closing = os.getppid(), False
        parameters = json.loads(args["model_config"])["parameters"]
        self.heartbeat: dict[str, Any] = {}  # the engine's latest
        self.moved = 0.0  # when it had made a step, or had nothing to do (monotonic clock)
        self.keeper: threading.Thread | None = None
        if "keeps_loaded" in parameters:
            model = parameters["keeps_loaded"]["string_value"]
            self.keeper = threading.Thread(target=self._keep_loaded, args=(model,), daemon=True)
            threading.Thread(target=self._listen, daemon=True).start()
            threading.Thread(target=self._heartbeat, args=(args["model_name"],), daemon=True).start()

    def finalize(self) -> None:
        self.closing = True

    def execute(self, requests: list[Any]) -> list[Any]:
        if self.keeper and not self.keeper.ident:
            self.keeper.start()  # a request shows that Triton has started; its model control may not be used earlier
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            name = pb_utils.get_input_tensor_by_name(request, "name").as_numpy().reshape(-1)[0].decode()
            engine = dict(self.heartbeat)
            folders = sorted(self.folder.glob("*/serving.json"))
            readable = engine.get("adapters", [folder.parent.name for folder in folders])
            found = [read(folder) for folder in folders if folder.parent.name in readable]
        except (OSError, ValueError) as error:
            return refusal(f"internal: {error}", pb_utils.TritonError.INTERNAL)
        chosen = [adapter for adapter in found if name in ("", adapter["name"])]
        if not chosen and self.base.get("name") == name:
            chosen = [self.base]
        if name and not chosen:
            known = ", ".join(adapter["name"] for adapter in found) or "none"
            return refusal(
                f"unknown_adapter: there is no adapter {name[:60]!r}; known: {known}", pb_utils.TritonError.NOT_FOUND
            )
        if engine:
            engine["still"] = round(time.monotonic() - self.moved, 3)
        return pb_utils.InferenceResponse([output("catalogue", chosen), output("engine", engine)])

    def _listen(self) -> None:
        while not self.closing:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(ENGINE)
                    for line in connection.makefile("rb"):
                        self._hear(json.loads(line).get("heartbeat"))
            except (OSError, ValueError):
                pass
            self.heartbeat = {}  # it has ended
            time.sleep(POLL_SECONDS)

    def _hear(self, heartbeat: "dict[str, Any] | None") -> None:
        if heartbeat is None:
            return
        before = self.heartbeat.get("counts", {}).get("steps")
        has_nothing_to_do = not heartbeat["running"] and not heartbeat["waiting"]
        if has_nothing_to_do or heartbeat["counts"].get("steps") != before:
            self.moved = time.monotonic()
        self.heartbeat = heartbeat

    def _keep_loaded(self, model: str) -> None:
        while not self.closing:
            time.sleep(POLL_SECONDS)
            try:
                # Only once the engine answers: loading a model blocks this whole process, catalogue and heartbeat too.
                if not pb_utils.is_model_ready(model) and engine_answers():
                    pb_utils.load_model(model)
            except Exception as error:
                pb_utils.Logger.log_error(f"{model} could not be loaded: {error}")
                time.sleep(1)

    def _heartbeat(self, name: str) -> None:
        while not self.closing:
            if os.getppid() != self.parent:
                os._exit(1)
            with contextlib.suppress(OSError):  # no room for a new file
                Path(f"{name}.heartbeat").touch()
            time.sleep(HEARTBEAT_SECONDS)


def engine_answers() -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(ENGINE) == 0


def read(serving: Path) -> dict[str, Any]:
    adapter = json.loads(serving.read_text(encoding="utf-8"))
    return {**adapter, "prompt": json.loads((serving.parent / "prompt.json").read_text(encoding="utf-8"))}


def output(name: str, value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False).encode()
    return pb_utils.Tensor(name, np.array([text], dtype=np.object_))


def refusal(sentence: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence, code))
