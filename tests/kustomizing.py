"""What kustomize makes of a directory, as far as ``deploy/`` uses it: anything else is refused.

Resources of files and directories, a namespace, images by name, and JSON patches (RFC 6902) of what
a target names. A patch that changes nothing, or misses what it replaces, is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "resources", "namespace", "images", "patches"}
WITHOUT_NAMESPACE = {"Namespace", "PriorityClass"}

Manifest = dict[str, Any]


def render(directory: Path) -> list[Manifest]:
    """All objects of a directory with a kustomization.yaml, in its order."""
    (settings,) = load(directory / "kustomization.yaml")
    assert settings["kind"] == "Kustomization"
    assert set(settings) <= KNOWN, f"{directory}: {set(settings) - KNOWN}"
    manifests: list[Manifest] = []
    for name in settings["resources"]:
        path = directory / name
        manifests += render(path) if path.is_dir() else load(path)
    for patch in settings.get("patches", ()):
        assert set(patch) == {"path", "target"}
        chosen = [manifest for manifest in manifests if is_target(manifest, patch["target"])]
        assert chosen, f"{directory}: no object is patched by {patch['path']}"
        (operations,) = load(directory / patch["path"])
        for manifest in chosen:
            for operation in operations:
                apply(manifest, operation)
    for image in settings.get("images", ()):
        replace_image(manifests, image)
    if "namespace" in settings:
        for manifest in manifests:
            if manifest["kind"] not in WITHOUT_NAMESPACE:
                manifest["metadata"]["namespace"] = settings["namespace"]
    return manifests


def load(path: Path) -> list[Any]:
    """The documents of a file; keys that are there twice are refused."""
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_StrictLoader))


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {keys}{node.start_mark}"
        return super().construct_mapping(node, deep)


def is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    """Whether a patch's target means this object."""
    assert set(target) <= {"group", "version", "kind", "name"}
    group, _, version = manifest["apiVersion"].rpartition("/")
    facts = {
        "group": group,
        "version": version,
        "kind": manifest["kind"],
        "name": manifest["metadata"]["name"],
    }
    return all(facts[key] == value for key, value in target.items())


def apply(manifest: Manifest, operation: Manifest) -> None:
    """One operation of a JSON patch: add or replace a field, or add an item before another."""
    assert set(operation) == {"op", "path", "value"}
    *path, last = (
        word.replace("~1", "/").replace("~0", "~") for word in operation["path"].split("/")[1:]
    )
    at: Any = manifest
    for word in path:
        at = at[int(word)] if isinstance(at, list) else at[word]
    if isinstance(at, list):
        assert operation["op"] == "add"
        assert 0 <= int(last) < len(at), f"{operation['path']} is no item"
        at.insert(int(last), copy.deepcopy(operation["value"]))
        return
    assert isinstance(at, dict), f"{operation['path']} is not a field of an object"
    is_there = last in at
    assert is_there == (operation["op"] == "replace"), f"{operation['path']}: {operation['op']}"
    assert at.get(last) != operation["value"], f"{operation['path']} is that already"
    at[last] = copy.deepcopy(operation["value"])


def replace_image(manifests: list[Manifest], image: dict[str, str]) -> None:
    """Give all containers of an image its new name and tag."""
    assert set(image) == {"name", "newName", "newTag"}
    found = [
        container
        for manifest in manifests
        for container in every(manifest, "containers", "initContainers")
        if container["image"] == image["name"]
    ]
    assert found, f"no container has the image {image['name']}"
    for container in found:
        container["image"] = f"{image['newName']}:{image['newTag']}"


def every(value: Any, *names: str) -> Iterator[Manifest]:
    """The items of all lists below ``value`` that have one of these names."""
    if isinstance(value, list):
        for item in value:
            yield from every(item, *names)
    elif isinstance(value, dict):
        for name, child in value.items():
            if name in names:
                yield from child
            yield from every(child, *names)


def pod_specs(manifest: Manifest) -> list[tuple[Manifest, Manifest]]:
    """Metadata and spec of every pod template in an object."""
    found = []
    if "containers" in manifest.get("spec", {}) and "metadata" in manifest:
        found.append((manifest["metadata"], manifest["spec"]))
    for child in manifest.values():
        for item in child if isinstance(child, list) else [child]:
            if isinstance(item, dict):
                found += pod_specs(item)
    return found
