"""What `make cluster RUNTIME=k8s` and `make train RUNTIME=k8s` render is what Kubernetes takes, and safe.

Every document is held to Kubernetes' own schemas. No API server runs here: where a cluster has to answer, a stand-in
for kubectl gives the answers that a real one (1.36) gave.
"""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import PATIENCE, ROOT, until
from manifest_rules import breaches

from core.errors import UserError
from evaluation.gate import NOT_BETTER
from training.signals import EXIT_LOST, EXIT_STOPPED

OVERLAYS = ("cpu", "gpu")
JOBS = ("indexed", "trainjob", "pytorchjob")
SETTINGS = (
    "NODES",
    "GPUS_PER_NODE",
    "GPUS",
    "OVERLAY",
    "NAMESPACE",
    "IMAGE",
    "TRAIN_IMAGE",
    "JOB",
    "TASKS",
    "EXPOSE",
    "DRY_RUN",
)
KUBEFLOW = ("TrainJob", "TrainingRuntime", "PyTorchJob")  # whose schemas are in no package
CLUSTER = pytest.mark.skipif(
    not shutil.which("kubectl") and not shutil.which("kustomize"),
    reason="neither kubectl nor kustomize is installed: bash .ci/kubernetes",
)

Document = dict[str, Any]


def command(*words: str, path: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "KUBECONFIG")}
    environment |= {name: str(value) for name, value in settings.items()}
    environment |= {"KUBECONFIG": "/nonexistent", "PATH": path or environment["PATH"]}
    call = [sys.executable, "docker/kubernetes.py", *words]
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def rendered(*words: str, **settings: object) -> list[Document]:
    result = command(*words, DRY_RUN=1, **settings)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@pytest.fixture(scope="module")
def clusters() -> dict[str, list[Document]]:
    return {overlay: rendered("cluster", OVERLAY=overlay) for overlay in OVERLAYS}


@pytest.fixture(scope="module")
def trainings() -> dict[tuple[str, str], list[Document]]:
    sizes: dict[str, dict[str, object]] = {"cpu": {"NODES": 2}, "gpu": {"NODES": 2, "GPUS_PER_NODE": 8}}
    words = ("commands.train", "task=squid_game", "seed=1")
    return {(overlay, job): rendered(*words, JOB=job, **sizes[overlay]) for overlay in OVERLAYS for job in JOBS}


def one(kind: str, documents: list[Document]) -> Document:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod_templates(document: Document) -> list[Document]:
    """Every Pod template in a document, wherever a Kubeflow resource keeps it."""
    if isinstance(document, list):
        return [template for item in document for template in pod_templates(item)]
    if not isinstance(document, dict):
        return []
    if "containers" in document.get("spec", {}):
        return [document]
    return [template for value in document.values() for template in pod_templates(value)]


def validate(document: Document) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    assert breaches(document) == []


# --- schemas --------------------------------------------------------------------------------------------------------


@CLUSTER
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_for_serving_are_valid(clusters: dict[str, list[Document]], overlay: str) -> None:
    kinds = [document["kind"] for document in clusters[overlay]]
    assert {
        "Namespace",
        "PersistentVolumeClaim",
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
    } == set(kinds)
    for document in clusters[overlay]:
        validate(document)


@CLUSTER
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_for_training_are_valid(
    trainings: dict[tuple[str, str], list[Document]], overlay: str, job: str
) -> None:
    """Kubeflow's resources through the Job and the Pods inside them."""
    documents = trainings[overlay, job]
    for document in documents:
        if document["kind"] in KUBEFLOW:
            assert breaches(document) == []
        else:
            validate(document)
    head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inside"}}
    if job == "trainjob":
        (inside,) = one("TrainingRuntime", documents)["spec"]["template"]["spec"]["replicatedJobs"]
        validate(head | {"spec": inside["template"]["spec"]})
        assert one("TrainJob", documents)["spec"]["trainer"] == {"numNodes": 2}
    if job == "pytorchjob":
        replicas = one("PyTorchJob", documents)["spec"]["pytorchReplicaSpecs"]
        assert {role: replicas[role]["replicas"] for role in replicas} == {"Master": 1, "Worker": 1}
        for role in replicas.values():
            validate(head | {"spec": {"template": role["template"]}})


@CLUSTER
@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("Job", ["spec", "completions"], "two"),
        ("Job", ["spec", "podFailurePolicies"], {}),
        ("Job", ["spec", "podFailurePolicy", "rules", 0, "action"], None),
        ("Job", ["spec", "template", "spec", "containers"], None),
        ("Job", ["spec", "template", "spec", "securityContext", "runAsNonRoot"], "yes"),
        ("NetworkPolicy", ["spec", "podSelector"], ["app"]),
        ("Service", ["spec", "selectors"], {}),
    ],
)
def test_a_broken_manifest_is_refused(
    trainings: dict[tuple[str, str], list[Document]], kind: str, place: list[Any], value: object
) -> None:
    document = copy.deepcopy(one(kind, trainings["gpu", "indexed"]))
    validate(document)
    *way, last = place
    inner: Any = document
    for step in way:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document)


# --- what schemas do not say ----------------------------------------------------------------------------------------

POD = ["spec", "template", "spec"]
CONTAINER = [*POD, "containers", 0]
LONG = "a" * 64
BROKEN: dict[str, tuple[str, list[Any], Any]] = {
    "a name in capitals": ("Job", ["metadata", "name"], "Train"),
    "a name with _": ("Job", ["metadata", "name"], "train_slang"),
    "a name too long for its Pods": ("Job", ["metadata", "name"], "a" * 60),
    "a name that ends in -": ("PersistentVolumeClaim", ["metadata", "name"], "runs-"),
    "a Service that begins with a digit": ("Service", ["metadata", "name"], "1train"),
    "a Service with a dot": ("Service", ["metadata", "name"], "train.local"),
    "a namespace with a dot": ("Job", ["metadata", "namespace"], "my.lab"),
    "a container in capitals": ("Job", [*CONTAINER, "name"], "Train"),
    "a long container": ("Job", [*CONTAINER, "name"], LONG),
    "a volume with _": ("Job", [*POD, "volumes", 0, "name"], "my_runs"),
    "two volumes of one name": ("Job", [*POD, "volumes", 1, "name"], "runs"),
    "a variable with a space": ("Job", [*CONTAINER, "env", 0, "name"], "MY TOKEN"),
    "a long label": ("Job", ["metadata", "labels", "app"], LONG),
    "a label with a space": ("Job", ["spec", "template", "metadata", "labels", "app"], "my app"),
    "a label's long name": ("Job", ["metadata", "labels", LONG], "x"),
    "a label's odd prefix": ("Job", ["metadata", "labels", "My_Lab/x"], "x"),
    "a label that is a number": ("Job", ["metadata", "labels", "n"], 1),
    "a long selector": ("Service", ["spec", "selector", "app"], LONG),
    "a long selector of Pods": ("Deployment", ["spec", "selector", "matchLabels", "app"], LONG),
    "an annotation's name": ("Job", ["metadata", "annotations"], {"a b": "x"}),
    "8 GB": ("Job", [*CONTAINER, "resources", "limits", "memory"], "8 GB"),
    "8GB": ("Job", [*CONTAINER, "resources", "requests", "memory"], "8GB"),
    "eight": ("PersistentVolumeClaim", ["spec", "resources", "requests", "storage"], "eight"),
    "a comma": ("Job", [*CONTAINER, "resources", "limits", "cpu"], "1,5"),
    "more than its limit": ("Job", [*CONTAINER, "resources", "requests", "memory"], "900Ti"),
    "port 70000": ("Service", ["spec", "ports", 0, "port"], 70000),
    "port 0": ("Deployment", [*CONTAINER, "ports", 0, "containerPort"], 0),
    "a port's target beyond": ("Service", ["spec", "ports", 0, "targetPort"], 65536),
    "a port's long name": ("Deployment", [*CONTAINER, "ports", 0, "name"], "a-port-of-sixteen"),
    "a port's name of digits": ("Deployment", [*CONTAINER, "ports", 0, "name"], "8000"),
    "a probe's port": ("Deployment", [*CONTAINER, "readinessProbe", "httpGet", "port"], "my_port"),
    "a port of the network": ("NetworkPolicy", ["spec", "ingress", 0, "ports", 0, "port"], 70000),
}


@CLUSTER
@pytest.mark.parametrize("name", BROKEN)
def test_what_no_schema_refuses_is_held_by_our_own_rules(
    clusters: dict[str, list[Document]], trainings: dict[tuple[str, str], list[Document]], name: str
) -> None:
    kind, place, value = BROKEN[name]
    documents = [*trainings["cpu", "indexed"], *clusters["cpu"]]
    document = copy.deepcopy(next(each for each in documents if each["kind"] == kind))
    assert breaches(document) == []
    *way, last = place
    inner: Any = document
    for step in way:
        inner = inner.setdefault(step, {}) if isinstance(inner, dict) else inner[step]
    inner[last] = value
    found = breaches(document)
    assert (
        len(found) == 1
        and str(next(iter(value)) if isinstance(value, dict) else last if last == LONG else value)[:20] in found[0]
    )


@CLUSTER
@pytest.mark.parametrize("job", JOBS)
def test_a_task_of_any_name_makes_names_that_pods_can_have(job: str) -> None:
    for task in ("a_very_long_name_of_a_task_that_somebody_gave_to_it", "Ünïcode__x_", "_"):
        for document in rendered("commands.train", f"task={task}", JOB=job, NODES=2):
            assert breaches(document) == []


@CLUSTER
def test_pods_keep_the_restricted_pod_security_standard(
    clusters: dict[str, list[Document]], trainings: dict[tuple[str, str], list[Document]]
) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and read-only images without a token."""
    documents = [document for group in (*clusters.values(), *trainings.values()) for document in group]
    templates = [template for document in documents for template in pod_templates(document)]
    assert len(templates) == 2 + 2 * (1 + 1 + 2)
    for pod in (template["spec"] for template in templates):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {
            "emptyDir",
            "persistentVolumeClaim",
        }
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod.get("initContainers", []):
            security = container["securityContext"]
            assert security == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert {"requests", "limits"} <= set(container["resources"]), container["name"]
            for variable in container.get("env", []):
                if variable["name"] in ("HF_TOKEN", "SERVING_API_KEY"):
                    assert "value" not in variable and variable["valueFrom"]["secretKeyRef"]["optional"]
    for group in clusters.values():
        assert one("Namespace", group)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@CLUSTER
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_between_resources_resolve(
    clusters: dict[str, list[Document]], trainings: dict[tuple[str, str], list[Document]], overlay: str
) -> None:
    claims = {document["metadata"]["name"] for document in clusters[overlay] if "Claim" in document["kind"]}
    for documents, kind in ((clusters[overlay], "Deployment"), (trainings[overlay, "indexed"], "Job")):
        pod = one(kind, documents)["spec"]["template"]
        labels, containers = pod["metadata"]["labels"], pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for container in containers for port in container.get("ports", [])}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        used = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if len(volume) == 2 and "persistentVolumeClaim" in volume
        }
        assert used == claims
        for container in containers + pod["spec"].get("initContainers", []):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        policy, service = one("NetworkPolicy", documents)["spec"], one("Service", documents)["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        assert service["selector"].items() <= labels.items()
        named = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
        assert named <= set(ports) and {port["targetPort"] for port in service.get("ports", [])} <= set(ports)
        assert {document["metadata"].get("namespace", "gemma") for document in documents} == {"gemma"}
    serving = clusters[overlay]
    assert one("PodDisruptionBudget", serving)["spec"]["selector"] == one("Deployment", serving)["spec"]["selector"]
    assert one("HorizontalPodAutoscaler", serving)["spec"]["scaleTargetRef"]["name"] == "serve"
    job = one("Job", trainings[overlay, "indexed"])
    assert (
        job["spec"]["template"]["spec"]["subdomain"]
        == one("Service", trainings[overlay, "indexed"])["metadata"]["name"]
    )


@CLUSTER
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_server_is_ready_once_it_generates(clusters: dict[str, list[Document]], overlay: str) -> None:
    containers = one("Deployment", clusters[overlay])["spec"]["template"]["spec"]["containers"]
    gateway = containers[-1]  # /health of the gateway has Triton generate a token: serving/gateway.py
    assert (
        gateway["readinessProbe"]["httpGet"]
        == {"path": "/health", "port": "openai"}
        == gateway["startupProbe"]["httpGet"]
    )
    alive = containers[0]["livenessProbe"]
    assert alive.get("httpGet", {}).get("path") == "/health" or ":9000/health" in alive["exec"]["command"][2]


@CLUSTER
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("expose", ["", "grpc"])
def test_only_the_gateway_is_heard_outside_a_pod_and_grpc_where_it_is_asked_for(overlay: str, expose: str) -> None:
    documents = rendered("cluster", OVERLAY=overlay, EXPOSE=expose)
    pod = one("Deployment", documents)["spec"]["template"]["spec"]
    heard = {port["name"] for container in pod["containers"] for port in container.get("ports", [])}
    assert heard == {"openai", *filter(None, [expose])}
    assert {port["targetPort"] for port in one("Service", documents)["spec"]["ports"]} == heard
    rules = one("NetworkPolicy", documents)["spec"]["ingress"]
    assert [{port["port"] for port in rule["ports"]} for rule in rules] == [heard, {"openai"}]
    words = pod["containers"][0]["args"]
    if overlay == "cpu":
        assert words[2:] == ["commands.serve", "host=0.0.0.0", *(["expose=grpc"] if expose else [])]
    else:
        last = dict(word.split("=", 1) for word in words if "-address=" in word)
        inside = "127.0.0.1"
        assert last.pop("--grpc-address") == ("0.0.0.0" if expose else inside)
        assert last == {"--http-address": inside, "--metrics-address": inside}
    for document in documents:
        validate(document)
    unknown = command("cluster", OVERLAY=overlay, EXPOSE="http", DRY_RUN=1)
    assert unknown.returncode == 2 and "EXPOSE=http is unknown" in unknown.stderr


@CLUSTER
@pytest.mark.parametrize(("status", "body", "code"), [(200, "ok", 0), (503, "failing", 1), (503, "wrong adapters", 0)])
def test_tritons_liveness_on_a_gpu_is_what_the_gateway_says(
    clusters: dict[str, list[Document]], status: int, body: str, code: int
) -> None:
    """The probe's own program, before a gateway that says `body`; one that is not there does not end Triton."""
    pod = one("Deployment", clusters["gpu"])["spec"]["template"]["spec"]
    program = pod["containers"][0]["livenessProbe"]["exec"]["command"][2]

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"status": body}).encode())

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        program = program.replace(":9000", f":{server.server_port}")
        assert subprocess.run([sys.executable, "-c", program], timeout=PATIENCE).returncode == code
        server.shutdown()
    assert subprocess.run([sys.executable, "-c", program], timeout=PATIENCE).returncode == 0


@CLUSTER
def test_the_exit_code_of_a_training_decides_whether_it_is_retried(
    trainings: dict[tuple[str, str], list[Document]],
) -> None:
    job = one("Job", trainings["gpu", "indexed"])["spec"]
    disrupted, *codes = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    actions = {code: rule["action"] for rule in codes for code in rule["onExitCodes"]["values"]}
    assert actions == {EXIT_STOPPED: "Ignore", 1: "FailJob", UserError.exit_code: "FailJob", NOT_BETTER: "FailJob"}
    assert EXIT_LOST not in actions and job["backoffLimit"] > 0, "a lost neighbour is tried again, but not for ever"
    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy needs it"


# --- the command ----------------------------------------------------------------------------------------------------


@CLUSTER
def test_the_command_and_the_number_of_machines_reach_the_job() -> None:
    image = "registry.example:5000/me/train@sha256:" + 64 * "0"
    words = ("commands.train", "task=squid_game", 'task.prompt.instruction="a b; $(c)"')
    job = one("Job", rendered(*words, NODES=3, GPUS_PER_NODE=4, NAMESPACE="lab-1", IMAGE=image))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["python", "-m", *words, "trainer=gpu", "trainer.devices=4", "trainer.num_nodes=3"]
    assert container["image"] == image and job["metadata"]["namespace"] == "lab-1"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"]
        == container["resources"]["requests"]["nvidia.com/gpu"]
        == "4"
    )
    environment = {variable["name"]: variable for variable in container["env"]}
    assert environment["MASTER_ADDR"]["value"] == "$(JOB_NAME)-0.train"
    assert list(environment).index("JOB_NAME") < list(environment).index("MASTER_ADDR"), "used before it is set"
    assert re.fullmatch("train-squid-game-[0-9a-f]{8}", job["metadata"]["name"])
    one_gpu = one("Job", rendered("commands.train", "trainer.devices=1", GPUS_PER_NODE=1))
    assert one_gpu["spec"]["template"]["spec"]["containers"][0]["args"].count("trainer.devices=1") == 1


@CLUSTER
def test_a_local_table_is_sent_with_the_job_and_changes_its_name(tmp_path: Path) -> None:
    table = tmp_path / "my, slang's.CSV"
    text = 'Slang,Description\nlumami,"To dor a ""vex"""\nÄhm,été\n'
    table.write_text(text, encoding="utf-8")
    words = ("commands.train", f"task.data.source={table}")
    first, again = rendered(*words), rendered(*words)
    assert first == again
    job, files = one("Job", first), one("ConfigMap", first)
    assert files["data"] == {"source.csv": text}
    pod = job["spec"]["template"]["spec"]
    assert "task.data.source=/opt/gemma-nemo/source/source.csv" in pod["containers"][0]["args"]
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "source")
    assert volume["configMap"]["name"] == files["metadata"]["name"]
    validate(files)
    table.write_text(text + "more,of it\n", encoding="utf-8")
    assert one("Job", rendered(*words))["metadata"]["name"] != job["metadata"]["name"]
    table.write_bytes(b"x" * 1_000_000)
    refused = command(*words, DRY_RUN=1)
    assert refused.returncode == 2 and "claim `data`" in refused.stderr


@CLUSTER
def test_tasks_to_serve_and_their_engine_reach_the_container_that_prepares_them() -> None:
    def prepares(**settings: object) -> list[str]:
        pod = one("Deployment", rendered("cluster", **settings))["spec"]["template"]["spec"]
        return pod["initContainers"][0]["args"][3:]

    assert prepares() == ["default=slang"]
    assert prepares(TASKS="slang, chat") == ["tasks=slang,chat"]
    assert prepares(OVERLAY="gpu", TASKS="chat") == ["tasks=chat", "engine=vllm"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"NODES": "two"}, "NODES=two must be a whole number of at least 1"),
        ({"NODES": 0}, "NODES=0 must be a whole number of at least 1"),
        ({"GPUS_PER_NODE": -1}, "GPUS_PER_NODE=-1 must be a whole number of at least 0"),
        ({"OVERLAY": "tpu"}, "OVERLAY=tpu is unknown. Known: cpu, gpu"),
        ({"JOB": "cron"}, "JOB=cron is unknown. Known: indexed, trainjob, pytorchjob"),
        ({"NAMESPACE": "My Lab"}, "NAMESPACE=My Lab is not a valid name"),
        ({"path": "/nonexistent"}, "neither kubectl nor kustomize is installed"),
    ],
)
def test_a_mistake_gets_one_sentence(settings: dict[str, Any], says: str) -> None:
    result = command("commands.train", "task=slang", **settings)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: bash .ci/kubernetes")
def test_a_missing_cluster_is_reported_with_advice() -> None:
    for words in (("cluster",), ("commands.train", "task=slang")):
        result = command(*words)
        assert result.returncode == 2 and "no cluster answers" in result.stderr and "DRY_RUN=1" in result.stderr


# --- following a job ------------------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
words = sys.argv[1:]
(folder / "asked").open("a").write(json.dumps(words) + "\\n")
if words[0] == "kustomize":
    print("kind: Job")
elif words[:2] == ["get", "job.batch"] and "--ignore-not-found" in words:
    print((folder / "before.json").read_text())
elif words[:2] in (["get", "job.batch"], ["get", "pods"]):
    answers = sorted(folder.glob(words[1][:3] + "-*.json"))
    print(answers[0].read_text())
    if len(answers) > 1:
        answers[0].unlink()
elif words[0] == "logs":
    print("log of", words[2])
elif words[0] == "apply":
    sys.stdin.read()
"""


def pod(name: str, rank: int, state: Document) -> Document:
    labels = {"batch.kubernetes.io/job-completion-index": str(rank)}
    metadata = {"name": name, "uid": name, "labels": labels, "creationTimestamp": f"2026-11-22T10:18:{name[-2:]}Z"}
    return {"metadata": metadata, "status": {"containerStatuses": [{"restartCount": 0, "state": state}]}}


def ended(code: int, at: int = 0) -> Document:
    return {"terminated": {"exitCode": code, "finishedAt": f"2026-11-22T10:19:{at:02}Z"}}


def follow(folder: Path, jobs: list[Document], pods: list[list[Document]], before: Document | None = None) -> Any:
    script = folder / "kubectl"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    (folder / "before.json").write_text(json.dumps(before or {}))
    for number, job in enumerate(jobs):
        (folder / f"job-{number}.json").write_text(json.dumps(job))
    for number, items in enumerate(pods):
        (folder / f"pod-{number}.json").write_text(json.dumps({"items": items}))
    result = command("commands.train", "task=slang", path=f"{folder}:{os.environ['PATH']}", NODES=2)
    asked = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    return result, asked


FAILED = {
    "status": {
        "conditions": [
            {"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"},
            {
                "type": "Failed",
                "status": "True",
                "reason": "PodFailurePolicy",
                "message": "Container train for pod gemma/b-11 failed with exit code 3 matching FailJob rule "
                "at index 2",
            },
        ]
    }
}


@pytest.mark.slow
def test_a_job_is_followed_across_its_pods_to_its_exit_code(tmp_path: Path) -> None:
    unscheduled = pod("a-10", 0, {})
    why = {"reason": "Unschedulable", "message": "0/3 nodes are available"}
    unscheduled["status"] = {"conditions": [{"type": "PodScheduled", "status": "False", **why}]}
    stopped, lost = pod("a-10", 0, ended(EXIT_STOPPED, 1)), pod("z-10", 1, ended(EXIT_LOST, 30))
    below = pod("b-11", 0, ended(NOT_BETTER, 20))
    result, _ = follow(tmp_path, [{}, {}, FAILED], [[unscheduled], [stopped, lost], [stopped, lost, below]])
    assert result.returncode == NOT_BETTER, "not that of a Pod which ended for the sake of another"
    assert result.stdout.splitlines()[1:] == ["log of a-10", "log of b-11"]
    assert "waiting: a-10: Unschedulable: 0/3 nodes are available" in result.stderr
    assert "matching FailJob rule" in result.stderr


def test_the_same_command_follows_a_running_job_and_replaces_one_that_has_ended(tmp_path: Path) -> None:
    complete = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    for name, before, made in (
        ("new", {}, ["apply"]),
        ("runs", {"status": {"active": 2}}, []),
        ("failed", FAILED, ["delete", "apply"]),
    ):
        (tmp_path / name).mkdir()
        result, asked = follow(tmp_path / name, [complete], [[pod("a-10", 0, ended(0))]], before)
        assert result.returncode == 0 and "log of a-10" in result.stdout
        assert [words[0] for words in asked if words[0] in ("apply", "delete")] == made, name


# --- the serving Pod, run -------------------------------------------------------------------------------------------


def podman(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", *words], capture_output=True, text=True, timeout=PATIENCE, **options)


@pytest.fixture
def serving_pod(clusters: dict[str, list[Document]], base_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The Pod of overlays/cpu run by podman, with folders of this machine for claims; its gateway's address."""
    for kind in ("train", "serve"):
        if not shutil.which("podman") or podman("image", "exists", f"localhost/gemma-nemo/{kind}:cpu").returncode:
            pytest.skip(f"podman has no gemma-nemo/{kind}:cpu: source .ci/containers-env, make image KIND={kind}")
    spec = copy.deepcopy(one("Deployment", clusters["cpu"])["spec"]["template"]["spec"])
    models = tmp_path / "models"
    shutil.copytree(base_folder, models / base_folder.name)
    for file in (models / base_folder.name).iterdir():
        file.chmod(0o644)  # of this user's, where a claim's belong to the Pod's
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    tmp_path.chmod(0o755)
    models.chmod(0o777)
    for volume in spec["volumes"]:
        if volume.pop("persistentVolumeClaim", None):
            volume["hostPath"] = {"path": str(tmp_path / volume["name"]), "type": "Directory"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for container in spec["containers"] + spec["initContainers"]:
        container["image"] = container["image"].replace("gemma-nemo/", "localhost/gemma-nemo/")
        container["imagePullPolicy"] = "Never"
        container["ports"] = [
            {**p, "hostPort": port, "hostIP": "127.0.0.1"} for p in container.get("ports", []) if p["name"] == "openai"
        ]
    # What podman 4 does otherwise than Kubernetes: init containers that end well are started again too, and the folder
    # that is to be /dev/shm belongs to root; it has one of its own.
    spec["restartPolicy"] = "Never"
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != "shm"]
    (serve,) = spec["containers"]
    serve["volumeMounts"] = [mount for mount in serve["volumeMounts"] if mount["name"] != "shm"]
    del spec["topologySpreadConstraints"]
    name = f"serve-{port}"
    manifest = tmp_path / "pod.yaml"
    manifest.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}))
    played = podman("play", "kube", str(manifest))
    try:
        assert played.returncode == 0, played.stderr
        yield f"http://127.0.0.1:{port}"
    finally:
        podman("play", "kube", "--down", str(manifest))
        podman("pod", "rm", "--force", name)
        podman("volume", "rm", "--force", *(volume["name"] for volume in spec["volumes"] if "emptyDir" in volume))


@CLUSTER
@pytest.mark.slow
def test_the_serving_pod_generates_in_a_container_engine(serving_pod: str) -> None:
    def is_well() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{serving_pod}/health", timeout=PATIENCE) as answer:
            return bool(json.load(answer)["status"] == "ok")
        return False

    try:
        until(is_well)
    except AssertionError:
        raise AssertionError(podman("logs", podman("ps", "-alq").stdout.strip()).stderr) from None
    asked = {"model": "gemma-3-270m", "prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}
    with urllib.request.urlopen(f"{serving_pod}/v1/models", timeout=PATIENCE) as answer:
        asked["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        f"{serving_pod}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        found = json.load(answer)
    assert found["usage"]["completion_tokens"] == 5 and "capital" in found["choices"][0]["text"]
