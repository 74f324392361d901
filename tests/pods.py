"""Containers of a manifest as processes here: their user, groups, mounts, rights and environment.

A node is a directory: what pods mount of the host lies in it, and a pod's own volumes in the pod's.
Paths of a manifest are found below a root that each container has to itself, in namespaces of its
own; the rest of the file system is this machine's, read-only.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from control_groups import make_group
from kustomizing import Manifest
from other_users import python_for_others, unshared

# What paths of manifests begin with, and what of them is moved below the root.
MOVED = ("/run/mtckpt", "/mtckpt", "/etc/podinfo")


class Node:
    """Directories of a host; ``memory`` is on a tmpfs."""

    def __init__(self, home: Path, memory: Path) -> None:
        self.root = home / "root"
        self.memory = memory
        self._home = home
        self._pods: list[Pod] = []
        self.root.mkdir()
        home.chmod(0o755)
        memory.chmod(0o755)

    def of_the_host(self, path: str) -> Path:
        """What a hostPath is here; made as the kubelet makes it."""
        base = self.memory if path.startswith("/dev/shm") else self._home / "host"
        found = base / path.lstrip("/")
        if not found.is_symlink():
            found.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path == "/dev/shm":
            found.chmod(0o1777)
        return found

    def pod(self, spec: Manifest) -> Pod:
        self._pods.append(Pod(self, spec, len(self._pods)))
        return self._pods[-1]

    def close(self) -> None:
        for pod in self._pods:
            pod.close()


class Pod:
    """One pod; its own volumes end with it."""

    def __init__(self, node: Node, spec: Manifest, number: int) -> None:
        self._node, self._spec, self._number = node, spec, number
        names = [c["name"] for c in (*spec.get("initContainers", ()), *spec["containers"])]
        self._groups = {name: make_group() for name in names}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._volumes = {volume["name"]: self._volume(volume) for volume in spec["volumes"]}

    def _volume(self, volume: Manifest) -> Path:
        if "hostPath" in volume:
            return self._node.of_the_host(str(volume["hostPath"]["path"]))
        own: Path = self._node.memory / f"pod-{self._number}" / volume["name"]
        own.mkdir(parents=True)
        own.parent.chmod(0o755)
        if "emptyDir" in volume:
            own.chmod(0o777)
            if group := self._spec["securityContext"].get("fsGroup"):
                os.chown(own, 0, group)
                own.chmod(0o2777)
        else:
            assert "downwardAPI" in volume
            (own / "labels").write_text('mtckpt/agent="true"\ntopology.kubernetes.io/zone="a"\n')
        return own

    def moved(self, text: str) -> str:
        """A path of the manifest, or text that holds one, as it is below the root."""
        for prefix in MOVED:
            if text.startswith(prefix) or f"={prefix}" in text:
                return text.replace(prefix, f"{self._node.root}{prefix}", 1)
        return text

    def wrap(self, container: Manifest) -> list[str]:
        """What a container's command is started through."""
        steps = []
        for mount in container["volumeMounts"]:
            if mount["mountPath"].startswith(MOVED):
                target = Path(self.moved(mount["mountPath"]))
                target.mkdir(parents=True, exist_ok=True)
                source = self._volumes[mount["name"]]
                if "subPath" in mount:  # as the kubelet makes it
                    source /= mount["subPath"]
                    assert not source.is_symlink()
                    if not source.exists():
                        source.mkdir()
                        source.chmod(source.parent.stat().st_mode & 0o7777)
                steps.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(target))}")
        assert container["securityContext"]["readOnlyRootFilesystem"]
        steps.append("mount -o remount,bind,ro /")
        inside = unshared(" && ".join(steps))
        return [*self._groups[container["name"]].wrap, *inside, *self._become(container)]

    def _become(self, container: Manifest) -> list[str]:
        security = {**self._spec["securityContext"], **container["securityContext"]}
        assert security["capabilities"]["drop"] == ["ALL"]
        kept = [f"+{name.lower()}" for name in security["capabilities"].get("add", ())]
        groups = [*security.get("supplementalGroups", ()), security.get("fsGroup")]
        named = ",".join(str(group) for group in groups if group is not None)
        return [
            *("setpriv", f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}"),
            f"--groups={named}" if named else "--clear-groups",
            *(f"--bounding-set={','.join(['-all', *kept])}", "--inh-caps=-all"),
            *("--no-new-privs", "env"),
        ]

    def environment(self, container: Manifest) -> dict[str, str]:
        """What the container sees; of the node's fields only the name is asked for."""
        found = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for variable in container.get("env", ()):
            value = variable.get("value", "node-7")
            if "secretKeyRef" in variable.get("valueFrom", {}):
                continue  # it is optional, and nobody made it
            for name, known in found.items():
                value = value.replace(f"$({name})", known)
            found[variable["name"]] = self.moved(value)
        return found

    def command(self, words: Sequence[str]) -> list[str]:
        """Words of the manifest as they are started here."""
        moved = [self.moved(word) for word in words]
        is_ours = moved[0] == "mtckpt"
        return [python_for_others(), "-m", "mtckpt.cli", *moved[1:]] if is_ours else moved

    def run(self, container: Manifest, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command in the container, as an init container's or a probe's, to its end."""
        return subprocess.run(
            [*self.wrap(container), *self.command(words)],
            env=self.environment(container),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, container: Manifest, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The container's own command."""
        process = subprocess.Popen(
            [*self.wrap(container), *self.command(container["command"])],
            env=self.environment(container),
            stderr=log,
        )
        self._processes.append(process)
        return process

    def kill(self, *names: str) -> None:
        """End containers, all of them by default: whatever was started in them is gone."""
        for name in names or self._groups:
            self._groups[name].kill()

    def close(self) -> None:
        """End it, and leave nothing of it."""
        for group in self._groups.values():
            group.remove()
        for process in self._processes:
            process.wait(10)
