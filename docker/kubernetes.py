"""Train, and serve models, on Kubernetes.

python3 docker/kubernetes.py commands.train task=slang ...     make train TASK=slang RUNTIME=k8s NODES=2 GPUS_PER_NODE=8
python3 docker/kubernetes.py cluster                     make cluster RUNTIME=k8s OVERLAY=gpu

The manifests are in docker/kubernetes/, for Kustomize; this program patches them, has kubectl render and apply them,
and follows a training's log until it ends. The same command finds the same Job: it follows a running one, and replaces
one that has ended, which then resumes from the last checkpoint.

Environment variables: NODES, GPUS_PER_NODE, OVERLAY (a folder of docker/kubernetes/overlays), NAMESPACE, IMAGE, JOB
(indexed, trainjob or pytorchjob, the last two Kubeflow's), TASKS (to serve), TRAIN_IMAGE (which prepares the adapters
for serving), EXPOSE=grpc (Triton's gRPC beside the gateway), DRY_RUN=1 (only print the manifests).
"""

from __future__ import annotations  # the host's Python may be older than the project's

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError, run
from image import tag

MANIFESTS = Path(__file__).resolve().parent / "kubernetes"
# How a training is followed: its resource, the label of its Pods, and the label of the first machine's Pods.
INDEXED = "batch.kubernetes.io/job-name={}", "batch.kubernetes.io/job-completion-index=0"
JOBS = {
    "indexed": ("job.batch", *INDEXED),
    "trainjob": ("trainjob.trainer.kubeflow.org", INDEXED[0].format("{}-node-0"), INDEXED[1]),
    "pytorchjob": (
        "pytorchjob.kubeflow.org",
        "training.kubeflow.org/job-name={}",
        "training.kubeflow.org/replica-type=master",
    ),
}
RETRIED = (75, 69)  # training/signals.py: told to stop; another process of the run has ended
SOURCE_FOLDER = "/opt/gemma-nemo/source"
LARGEST_SOURCE = 700_000  # bytes; a ConfigMap holds 1 MiB of text or base64
PATIENCE = 20  # requests in a row, two seconds apart, that the cluster may leave unanswered


def setting(name: str, default: str = "") -> str:
    return os.environ.get(name) or default


def number(name: str, default: int, least: int) -> int:
    text = setting(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} must be a whole number of at least {least}")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """The exit code of the training; 0 for `cluster`, once everything has been applied."""
    if not arguments or arguments[0] not in ("commands.train", "cluster"):
        raise UserError(f"'{' '.join(arguments[:1])}' does not run on Kubernetes. Known: commands.train, cluster")
    namespace, overlay = setting("NAMESPACE", "gemma"), setting("OVERLAY", "gpu" if gpus() else "cpu")
    if not re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        raise UserError(f"NAMESPACE={namespace} is not a valid name: use at most 63 lower-case letters, digits and '-'")
    known = sorted(folder.name for folder in (MANIFESTS / "overlays").iterdir() if folder.is_dir())
    if overlay not in known:
        raise UserError(f"OVERLAY={overlay} is unknown. Known: {', '.join(known)}")
    if arguments[0] == "cluster":
        return make_cluster(namespace, overlay)
    return train(list(arguments), namespace, overlay)


def gpus() -> int:
    """GPUs of each machine; 0: train on CPUs."""
    return number("GPUS_PER_NODE", 0, 0) or number("GPUS", 0, 0)


# --- manifests ----------------------------------------------------------------------------------------------------


def render(*layers: dict[str, Any], files: dict[str, bytes] | None = None) -> str:
    """The manifests, as YAML, of Kustomize layers, each on top of the one before it.

    Args:
        layers: kustomization.yaml as a dictionary, with absolute paths in `resources` and `components`.
        files: name and content of files to place beside the first layer.

    Raises:
        UserError: neither kubectl nor kustomize is installed, or the manifests are invalid.
    """
    tools = (["kubectl", "kustomize"], ["kustomize", "build"])
    command = next((tool for tool in tools if shutil.which(tool[0])), None)
    if command is None:
        raise UserError("neither kubectl nor kustomize is installed: see https://kubernetes.io/docs/tasks/tools/")
    with tempfile.TemporaryDirectory(prefix="gemma-kustomize-") as name:
        folder = Path(name).resolve()
        for depth, layer in enumerate(layers):
            place = folder / str(depth)
            place.mkdir()
            if depth:
                layer = layer | {"resources": [folder / str(depth - 1)]}
            for key in ("resources", "components"):
                layer = layer | {key: [os.path.relpath(path, place) for path in layer.get(key, [])]}
            (place / "kustomization.yaml").write_text(json.dumps(layer, indent=2))
        for file, content in (files or {}).items():
            (folder / "0" / file).write_bytes(content)
        result = subprocess.run([*command, str(place)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"the manifests cannot be rendered: {result.stderr.strip()}")
    return result.stdout


def image(kind: str, given: str) -> dict[str, str]:
    """Kustomize's entry for: `given` (registry/name, with :tag or @digest) for the image of `kind`, train or serve."""
    path, _, digest = given.partition("@")
    tag = path.rpartition(":")[2] if ":" in path.rpartition("/")[2] else ""
    entry = {"name": f"gemma-nemo/{kind}", "newName": path.removesuffix(f":{tag}") if tag else path}
    return entry | ({"digest": digest} if digest else {"newTag": tag} if tag else {})


def patch(kind: str, **content: Any) -> dict[str, Any]:
    """Kustomize's entry for: `content` merged into the one resource of `kind`, which gets the name in it, if any."""
    merged = {"apiVersion": "of/target", "kind": kind, "metadata": {"name": "of-target"}} | content
    changes = {"options": {"allowNameChange": True}} if "metadata" in content else {}
    return {"target": {"kind": kind}, "patch": json.dumps(merged), **changes}


def training_manifests(arguments: list[str], namespace: str, overlay: str) -> tuple[str, str]:
    """Name and manifests of the Job that runs `python -m ARGUMENTS` on NODES machines."""
    nodes, kind = number("NODES", 1, 1), setting("JOB", "indexed")
    if kind not in JOBS:
        raise UserError(f"JOB={kind} is unknown. Known: {', '.join(JOBS)}")
    given = setting("IMAGE", tag("train", "gpu" if gpus() else "cpu"))
    arguments, files = take_source(arguments)
    sizes = {"trainer": "gpu" if gpus() else "cpu", "trainer.devices": gpus() or 1, "trainer.num_nodes": nodes}
    arguments += [
        f"{key}={size}"
        for key, size in sizes.items()
        if not any(argument.startswith(f"{key}=") for argument in arguments)
    ]
    same = [arguments, given, overlay, kind, *(hashlib.sha256(content).hexdigest() for content in files.values())]
    digest = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8]
    task = next((argument[5:] for argument in arguments if argument.startswith("task=")), "slang")
    # Kubeflow adds up to 12 letters for a Pod's host name, which has 63 at most.
    name = f"train-{re.sub('[^a-z0-9]+', '-', task.lower())[:30]}-{digest}"

    container: dict[str, Any] = {"name": "train", "args": ["python", "-m", *arguments]}
    pod: dict[str, Any] = {"containers": [container]}
    if gpus():
        share = {"nvidia.com/gpu": str(gpus())}
        container["resources"] = {"requests": share, "limits": share}
    layer: dict[str, Any] = {"namespace": namespace, "images": [image("train", given)]}
    if files:
        container["volumeMounts"] = [{"name": "source", "mountPath": SOURCE_FOLDER, "readOnly": True}]
        pod["volumes"] = [{"name": "source", "configMap": {"name": f"{name}-source"}}]
        layer["configMapGenerator"] = [{"name": f"{name}-source", "files": list(files)}]
    spec = {"parallelism": nodes, "completions": nodes, "template": {"spec": pod}}
    layer["resources"] = [MANIFESTS / "overlays" / overlay / "train"]
    layer["patches"] = [patch("Job", metadata={"name": name}, spec=spec)]
    layers = [layer]
    if kind != "indexed":
        layers.append({"components": [MANIFESTS / "kubeflow" / kind]})
    if kind == "pytorchjob":
        workers = {"replicas": nodes - 1} if nodes > 1 else None
        layers.append({"patches": [patch("PyTorchJob", spec={"pytorchReplicaSpecs": {"Worker": workers}})]})
    return name, render(*layers, {"namespace": namespace}, files=files)


def take_source(arguments: list[str]) -> tuple[list[str], dict[str, bytes]]:
    """The arguments with a local table replaced by its place in a ConfigMap, and that file's name and content.

    Raises:
        UserError: the table is too large for a ConfigMap.
    """
    for index, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        file = Path(value.strip("'\""))
        if key != "task.data.source" or not file.is_file():
            continue
        if file.stat().st_size > LARGEST_SOURCE:
            raise UserError(
                f"{file} has {file.stat().st_size:,} bytes; at most {LARGEST_SOURCE:,} can be sent with a Job. "
                "Copy it to the claim `data` (docs/clusters.md) and give its path there: SOURCE=data/NAME"
            )
        name = f"source{file.suffix.lower()}"
        return [*arguments[:index], f"{key}={SOURCE_FOLDER}/{name}", *arguments[index + 1 :]], {name: file.read_bytes()}
    return arguments, {}


# --- the cluster --------------------------------------------------------------------------------------------------


def kubectl(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    if not shutil.which("kubectl"):
        raise UserError(
            "kubectl is not installed: see https://kubernetes.io/docs/tasks/tools/. DRY_RUN=1 only prints the manifests"
        )
    return subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True)


def asked(*arguments: str, text: str | None = None) -> str:
    """The output of a kubectl command.

    Raises:
        UserError: the command failed.
    """
    result = kubectl(*arguments, text=text)
    if result.returncode:
        raise UserError(f"kubectl {' '.join(arguments[:2])}: {result.stderr.strip()}")
    return result.stdout


def check_cluster() -> None:
    result = kubectl("version", "--request-timeout=15s")
    if result.returncode:
        context = kubectl("config", "current-context").stdout.strip() or "none"
        raise UserError(
            f"no cluster answers (kubectl's context: {context}). {result.stderr.strip().splitlines()[-1]}\n"
            "kubectl config get-contexts lists the known ones; DRY_RUN=1 only prints the manifests"
        )


def make_cluster(namespace: str, overlay: str) -> int:
    variant = "gpu" if overlay == "gpu" else "cpu"
    given = {"serve": setting("IMAGE", tag("serve", variant)), "train": setting("TRAIN_IMAGE", tag("train", variant))}
    layer: dict[str, Any] = {"namespace": namespace, "resources": [MANIFESTS / "overlays" / overlay]}
    layer["images"] = [image(kind, name) for kind, name in given.items()]
    if exposed := setting("EXPOSE"):
        component = MANIFESTS / "overlays" / overlay / exposed
        if exposed != "grpc" or not component.is_dir():
            raise UserError(
                f"EXPOSE={exposed} is unknown for OVERLAY={overlay}. Known: grpc, of the overlays cpu and gpu"
            )
        layer["components"] = [component]
    if tasks := setting("TASKS").replace(",", " ").split():
        served = "/spec/template/spec/initContainers/0/args/3"  # python -m commands.prepare_serving default=slang ...
        change = [{"op": "replace", "path": served, "value": f"tasks={','.join(tasks)}"}]
        layer["patches"] = [{"target": {"kind": "Deployment"}, "patch": json.dumps(change)}]
    manifests = render(layer)
    if setting("DRY_RUN"):
        print(manifests, end="")
        return 0
    check_cluster()
    print(asked("apply", "-f", "-", text=manifests), end="")
    print(
        f"To train: make train RUNTIME=k8s NAMESPACE={namespace}. Serving uses the newest run; after a training: "
        f"kubectl rollout restart deployment/serve --namespace={namespace}"
    )
    return 0


def train(arguments: list[str], namespace: str, overlay: str) -> int:
    name, manifests = training_manifests(arguments, namespace, overlay)
    if setting("DRY_RUN"):
        print(manifests, end="")
        return 0
    check_cluster()
    resource = JOBS[setting("JOB", "indexed")][0]
    here = f"--namespace={namespace}"
    if kubectl("get", "persistentvolumeclaim", "runs", here).returncode:
        raise UserError(
            f"namespace {namespace} has no claim `runs`. Create it: make cluster RUNTIME=k8s NAMESPACE={namespace}"
        )
    before = json.loads(asked("get", resource, name, here, "--ignore-not-found", "--output=json") or "{}")
    if outcome(before):
        asked("delete", resource, name, here, "--wait", "--cascade=foreground")
    if not before or outcome(before):
        asked("apply", "-f", "-", text=manifests)
    print(
        f"{resource} {name} in namespace {namespace}. Ctrl-C leaves it running; the same command follows it again; "
        f"kubectl delete {resource} {name} {here} stops it, with a checkpoint",
        flush=True,
    )
    try:
        return follow(name, here)
    except KeyboardInterrupt:
        print(f"\n{name} goes on; the same command follows it again", file=sys.stderr)
        return 130


def outcome(job: dict[str, Any]) -> dict[str, Any] | None:
    """The condition in which a Job, TrainJob or PyTorchJob ended; None while it runs."""
    conditions = job.get("status", {}).get("conditions", [])
    ends = ("Complete", "Succeeded", "Failed")
    return next((one for one in conditions if one["type"] in ends and one["status"] == "True"), None)


def follow(name: str, here: str) -> int:
    """Print the log of the first machine's Pods, or why there is none yet, until the job ends; its exit code."""
    resource, selector, first = JOBS[setting("JOB", "indexed")]
    selector = selector.format(name)
    printed: dict[tuple[str, int], str] = {}  # Pod and restart: until when its log was printed
    said, silent = "", 0
    while True:
        answers = [
            kubectl("get", *what, here, "--output=json", "--request-timeout=15s")
            for what in ((resource, name), ("pods", f"--selector={selector}"))
        ]
        silent = silent + 1 if any(answer.returncode for answer in answers) else 0
        if silent:
            error = next(answer.stderr.strip() for answer in answers if answer.returncode)
            if "NotFound" in error or silent > PATIENCE:
                raise UserError(f"{name} cannot be followed: {error}")
            time.sleep(2)
            continue
        job, pods = json.loads(answers[0].stdout), json.loads(answers[1].stdout)["items"]
        key, _, value = first.partition("=")
        pods.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        for pod in [pod for pod in pods if pod["metadata"]["labels"].get(key) == value]:
            begun = pod["metadata"]["uid"], restarts(pod)
            if state(pod) == "running" or (state(pod) == "terminated" and begun not in printed):
                since = [f"--since-time={printed[begun]}"] if begun in printed else []  # the connection was cut
                subprocess.run(["kubectl", "logs", "--follow", pod["metadata"]["name"], here, *since], check=False)
                printed[begun] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if ended := outcome(job):
            if ended["type"] == "Failed":
                print(f"{name} failed: {ended.get('message') or ended.get('reason')}", file=sys.stderr)
                return exit_code(pods)
            return 0
        waits = "; ".join(filter(None, map(waiting, pods)))
        if waits and waits != said:
            print(f"waiting: {waits}", file=sys.stderr, flush=True)
        said = waits
        time.sleep(2)


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return pod["status"].get("containerStatuses", [])


def restarts(pod: dict[str, Any]) -> int:
    return sum(container["restartCount"] for container in containers(pod))


def state(pod: dict[str, Any]) -> str:
    """The training container's state: waiting, running or terminated."""
    return next((next(iter(container["state"]), "waiting") for container in containers(pod)), "waiting")


def waiting(pod: dict[str, Any]) -> str:
    """Why a Pod is not running yet, e.g. `train-slang-1-0: Unschedulable: 0/3 nodes are available`."""
    reasons = [
        one
        for one in pod["status"].get("conditions", [])
        if one["status"] == "False" and one.get("reason") and one["type"] == "PodScheduled"
    ]
    reasons += [container["state"]["waiting"] for container in containers(pod) if "waiting" in container["state"]]
    return "".join(f"{pod['metadata']['name']}: {one['reason']}: {one.get('message', '')}" for one in reasons[-1:])


def exit_code(pods: list[dict[str, Any]]) -> int:
    """The exit code of the Pod that failed the job: the last to fail that did not stop because another one had."""
    ends = [
        container["state"]["terminated"]
        for pod in pods
        for container in containers(pod)
        if "terminated" in container["state"]
    ]
    failed = [end for end in ends if end["exitCode"]]
    failed.sort(key=lambda end: (end["exitCode"] not in RETRIED, end.get("finishedAt") or ""))
    return failed[-1]["exitCode"] if failed else 1


if __name__ == "__main__":
    run(main)
