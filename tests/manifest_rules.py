"""What Kubernetes' API server demands of a manifest beyond its schemas: names, labels, quantities and ports.

The rules are those of https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and …/labels/, of
https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/ and of ports in the API reference.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"  # RFC 1123
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
SERVICE = r"[a-z]([-a-z0-9]*[a-z0-9])?"  # RFC 1035
WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+|[numkMGTPE]|[KMGTPE]i)?")
LABELS = ("labels", "matchLabels", "nodeSelector", "selector")
AMOUNTS = ("limits", "requests", "capacity", "hard")
PORTS = ("port", "containerPort", "hostPort", "targetPort", "nodePort", "endPort")
_POWERS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18, "m": -3, "u": -6, "n": -9}


def breaches(document: dict[str, Any]) -> list[str]:
    """What the API server would refuse, as `place: value`; for a Job, also names that its Pods could not have."""
    metadata = document.get("metadata", {})
    kind = document.get("kind", "")
    name = str(metadata.get("name", ""))
    longest, form = {"Service": (63, SERVICE), "Namespace": (63, LABEL)}.get(kind, (253, SUBDOMAIN))
    if suffix := {"Job": "-", "TrainJob": "-node-0-", "PyTorchJob": "-worker-"}.get(kind):
        longest, form = 63 - len(f"{suffix}999"), LABEL  # what a Pod of 1000 is called, which is its host's name
    found = [] if _is(name, form, longest) else [f"metadata.name: {name}"]
    if "namespace" in metadata and not _is(str(metadata["namespace"]), LABEL, 63):
        found.append(f"metadata.namespace: {metadata['namespace']}")
    return found + [f"{place}: {value}" for place, value in _walk(document, "")]


def _is(text: Any, form: str, longest: int) -> bool:
    return isinstance(text, str) and len(text) <= longest and re.fullmatch(form, text) is not None


def _walk(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _walk(item, f"{place}[{number}]")
        names = [item.get("name") for item in value if isinstance(item, dict) and "name" in item]
        if re.search(r"(^|\.)(containers|initContainers|volumes)$", place):
            yield from ((f"{place} name", name) for name in names if not _is(name, LABEL, 63))
            yield from ((f"{place} name twice", name) for name in {n for n in names if names.count(n) > 1})
        if place.endswith(".ports"):
            yield from ((f"{place} name", name) for name in names if not _is_port_name(name))
        if place.endswith(".env"):
            yield from ((f"{place} name", name) for name in names if not _is(name, r"[-._a-zA-Z][-._a-zA-Z0-9]*", 253))
    elif isinstance(value, dict):
        yield from _own(value, place)
        for key, inner in value.items():
            yield from _walk(inner, f"{place}.{key}".lstrip("."))


def _own(value: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """What is wrong with the entries of an object."""
    for key, inner in value.items():
        here = f"{place}.{key}".lstrip(".")
        if (
            key in (*LABELS, "annotations")
            and isinstance(inner, dict)
            and not {"matchLabels", "matchExpressions"} & set(inner)
        ):
            yield from ((here, name) for name in inner if not _is_key(name))
            if key != "annotations":
                texts = [(f"{here}.{name}", text) for name, text in inner.items()]
                yield from ((at, text) for at, text in texts if text != "" and not _is(text, WORD, 63))
        if key in AMOUNTS and isinstance(inner, dict):
            yield from ((f"{here}.{name}", amount) for name, amount in inner.items() if not _is_quantity(amount))
        if key == "sizeLimit" and not _is_quantity(inner):
            yield here, inner
        if key in PORTS and not isinstance(inner, dict | list):
            number = isinstance(inner, int) and not isinstance(inner, bool)
            lowest, highest = (30000, 32767) if key == "nodePort" else (1, 65535)
            if (number and not lowest <= inner <= highest) or (not number and not _is_port_name(inner)):
                yield here, inner
    if isinstance(value.get("requests"), dict) and isinstance(value.get("limits"), dict):
        for name in value["requests"].keys() & value["limits"].keys():
            asked, most = value["requests"][name], value["limits"][name]
            if _is_quantity(asked) and _is_quantity(most) and _amount(asked) > _amount(most):
                yield f"{place}.requests.{name} above its limit {most}", asked


def _is_key(key: Any) -> bool:
    prefix, slash, name = str(key).rpartition("/")
    return _is(name, WORD, 63) and (not slash or _is(prefix, SUBDOMAIN, 253))


def _is_port_name(name: Any) -> bool:
    return _is(name, r"[a-z0-9]+(-[a-z0-9]+)*", 15) and re.search("[a-z]", name) is not None


def _is_quantity(amount: Any) -> bool:
    return not isinstance(amount, bool) and QUANTITY.fullmatch(str(amount)) is not None


def _amount(quantity: Any) -> Decimal:
    number, unit = re.fullmatch(r"([^a-zA-Z]*(?:[eE][+-]?\d+)?)([a-zA-Z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    scale = Decimal(1024) ** "KMGTPE".index(unit[0]) * 1024 if unit.endswith("i") else Decimal(10) ** _POWERS[unit]
    return Decimal(number) * scale
