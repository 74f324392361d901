"""The manifests of deploy/: valid for current Kubernetes, closed, and true of the agent."""

from __future__ import annotations

import functools
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import tomllib
import yaml
from kustomizing import Manifest, every, load, pod_specs, render

from mtckpt.agent import protocol
from mtckpt.cli import main

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PLACES = (
    "overlays/daemonset",
    "overlays/daemonset-huge-pages",
    "overlays/sidecar",
    "examples/jobset",
    "examples/trainjob",
)
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
# As their projects generate them; what is in a pod is checked against Kubernetes itself.
CUSTOM = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
}


@pytest.fixture(params=PLACES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(DEPLOY / request.param)


@functools.cache
def pods() -> list[tuple[str, Manifest, Manifest]]:
    """Where it is from, labels and spec of every pod template."""
    return [
        (place, metadata["labels"], spec)
        for place in PLACES
        for manifest in render(DEPLOY / place)
        for metadata, spec in pod_specs(manifest)
    ]


def containers(spec: Manifest) -> list[Manifest]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


# -- valid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
        for job in every(manifest, "replicatedJobs"):
            template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
            kubernetes_validate.validate(
                {**template, "spec": job["template"]["spec"]}, version, strict=True
            )


def test_jobset_and_trainer_take_theirs(manifests: list[Manifest]) -> None:
    """A field that they do not know is left out by their models: nothing may be."""
    # Not before it is needed: every process of a run reads this file.
    models = importlib.import_module("kubeflow_trainer_api.models")
    for manifest in manifests:
        if name := CUSTOM.get(manifest["kind"]):
            model = getattr(models, name)
            assert without_empty(model.from_dict(manifest).to_dict()) == without_empty(manifest)


def without_empty(value: Any) -> Any:
    """Models leave out what is empty."""
    if isinstance(value, dict):
        return {k: without_empty(v) for k, v in value.items() if v not in ({}, [], None)}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("field", "value"),
    [("spec/maxUnavailable", 1), ("spec/template/spec/containers/0/livenessprobe", {})],
)
def test_a_misspelt_field_is_seen(field: str, value: Any) -> None:
    (manifest,) = (m for m in render(DEPLOY / PLACES[0]) if m["kind"] == "DaemonSet")
    *path, last = field.split("/")
    at: Any = manifest
    for word in path:
        at = at[int(word)] if word.isdigit() else at[word]
    at[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_every_file_is_used() -> None:
    """By a kustomization that can be reached from one that people apply."""
    used: set[Path] = set()

    def visit(directory: Path) -> None:
        (settings,) = load(directory / "kustomization.yaml")
        used.add(directory / "kustomization.yaml")
        patches = [patch["path"] for patch in settings.get("patches", ())]
        for name in (*settings["resources"], *patches):
            path = (directory / name).resolve()
            if path.is_dir():
                visit(path)
            else:
                used.add(path)

    for place in PLACES:
        visit(DEPLOY / place)
    assert used == set(DEPLOY.rglob("*.yaml"))


def test_what_is_named_is_there() -> None:
    """Service accounts, priority classes and runtimes that an object refers to."""
    for place in ("overlays/daemonset", "overlays/sidecar", "examples/trainjob"):
        rendered = render(DEPLOY / place)
        there = {(m["kind"], m["metadata"]["name"]) for m in rendered}
        for manifest in rendered:
            for _, spec in pod_specs(manifest):
                for field, kind in (
                    ("serviceAccountName", "ServiceAccount"),
                    ("priorityClassName", "PriorityClass"),
                ):
                    assert field not in spec or (kind, spec[field]) in there
                volumes = {volume["name"] for volume in spec["volumes"]}
                mounted = {m["name"] for c in containers(spec) for m in c["volumeMounts"]}
                assert mounted == volumes
            if manifest["kind"] == "TrainJob":
                reference = manifest["spec"]["runtimeRef"]
                assert (reference["kind"], reference["name"]) in there


# -- closed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "labels", "spec"), pods())
def test_pods_have_no_rights(place: str, labels: Manifest, spec: Manifest) -> None:
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"]
    assert pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in containers(spec):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        if container["name"] == "huge-pages":  # the only one with rights, and only where asked for
            assert place == "overlays/daemonset-huge-pages"
            continue
        assert "privileged" not in security
        assert security["allowPrivilegeEscalation"] is False  # NoNewPrivileges
        assert security["capabilities"]["drop"] == ["ALL"]
        if container["name"] == "directories":
            assert security["runAsUser"] == 0
            assert security["capabilities"]["add"] == ["CHOWN", "FOWNER"]
        else:
            assert set(security["capabilities"]) == {"drop"}
            assert "runAsUser" not in security
        assert re.search(r":[\w.-]+$", container["image"])
        assert not container["image"].endswith(":latest")
    assert labels["mtckpt/trainer" if place.startswith("examples") else "mtckpt/agent"] == "true"


EVERYBODYS = ("/dev/shm", "/tmp", "/var/tmp")


@pytest.mark.parametrize(("place", "labels", "spec"), pods())
def test_nothing_of_the_node_is_named_below_what_everybody_writes_to(
    place: str, labels: Manifest, spec: Manifest
) -> None:
    """Somebody may have put a link there, which the kubelet follows as root."""
    for volume in spec["volumes"]:
        path = volume.get("hostPath", {}).get("path", "/")
        assert not path.startswith(tuple(f"{each}/" for each in EVERYBODYS))
        if path not in EVERYBODYS:
            continue
        for container in containers(spec):
            for mount in container["volumeMounts"]:
                if mount["name"] == volume["name"]:
                    # These two look first at what is there.
                    assert "subPath" in mount or container["name"] in ("directories", "huge-pages")


def agents() -> list[tuple[str, Manifest, Manifest]]:
    """Every container that runs an agent, with its pod."""
    return [
        (place, spec, container)
        for place, _, spec in pods()
        for container in containers(spec)
        if container["name"] == "agent"
    ]


@pytest.mark.parametrize(("place", "spec", "agent"), agents())
def test_an_agent_is_watched_and_has_room(place: str, spec: Manifest, agent: Manifest) -> None:
    assert {"startupProbe", "livenessProbe"} <= set(agent)
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe := agent.get(name):
            context = parsed(probe["exec"]["command"])
            assert context.params["timeout_s"] < probe["timeoutSeconds"]
            assert context.params["ready"] == (name != "livenessProbe")
    assert agent["resources"]["requests"]["memory"] == agent["resources"]["limits"]["memory"]
    assert place != "overlays/sidecar" or agent["restartPolicy"] == "Always"


@pytest.mark.parametrize(("place", "spec", "agent"), agents())
def test_an_agent_has_the_time_that_it_takes_to_go(
    place: str, spec: Manifest, agent: Manifest
) -> None:
    hook = parsed(agent["lifecycle"]["preStop"]["exec"]["command"])
    assert hook.command.name == "drain"
    grace_s = parsed(agent["command"]).params["grace_s"]
    assert hook.params["timeout_s"] + grace_s < spec["terminationGracePeriodSeconds"]


def test_the_network_policy_is_about_these_pods() -> None:
    for place in ("overlays/daemonset", "overlays/sidecar"):
        rendered = render(DEPLOY / place)
        (policy,) = (m for m in rendered if m["kind"] == "NetworkPolicy")
        chosen = policy["spec"]["podSelector"]["matchLabels"]
        for manifest in rendered:
            for metadata, _ in pod_specs(manifest):
                assert chosen.items() <= metadata["labels"].items()
                assert metadata["labels"].items() & {
                    *(next(iter(p["podSelector"]["matchLabels"].items())) for p in peers(policy))
                }
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        assert all("podSelector" in peer for peer in peers(policy))


def peers(policy: Manifest) -> list[Manifest]:
    return [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]


# -- true of the agent ----------------------------------------------------------------------------


def parsed(command: list[str]) -> click.Context:
    """The command as our own command line reads it: unknown words and options are errors."""
    assert command[0] == "mtckpt"
    group: Any = main
    words, parent = list(command[1:]), click.Context(main)
    while isinstance(group, click.Group):
        name = words.pop(0)
        parent, group = click.Context(group, parent, name), group.commands[name]
    context: click.Context = group.make_context(command[-1], words, parent)
    return context


def test_commands_are_ours() -> None:
    seen = 0
    for _, _, spec in pods():
        for container in containers(spec):
            commands = [container.get("command", [])]
            commands += [p["exec"]["command"] for n, p in container.items() if n.endswith("Probe")]
            for command in commands:
                if command and command[0] == "mtckpt":
                    parsed(command)
                    seen += 1
    assert seen >= 7
    with pytest.raises(click.UsageError):
        parsed(["mtckpt", "agent", "run", "--groop", "x"])


def test_variables_are_documented() -> None:
    documented = set(re.findall(r"\| `(MTCKPT_\w+)`", (ROOT / "docs/configuration.md").read_text()))
    named = set(re.findall(r"MTCKPT_\w+", "".join(p.read_text() for p in DEPLOY.rglob("*.yaml"))))
    assert named
    assert named <= documented


def trainers() -> list[tuple[str, Manifest, Manifest]]:
    return [
        (place, spec, spec["containers"][0])
        for place, _, spec in pods()
        if spec["containers"][0]["name"] != "agent"
    ]


@pytest.mark.parametrize(("place", "spec", "trainer"), trainers())
def test_trainers_meet_the_agent(place: str, spec: Manifest, trainer: Manifest) -> None:
    """The same directories at the same places, the socket where it is, and the right to open it."""
    agent_place = place if place == "overlays/sidecar" else "overlays/daemonset"
    _, agent_spec, agent = next(found for found in agents() if found[0] == agent_place)
    names = ("mtckpt-run", "mtckpt-ram", "mtckpt-disk")
    for name in names:
        assert source(spec, name) == source(agent_spec, name)
        assert mount(trainer, name) == mount(agent, name)
    environ = {e["name"]: e.get("value") for e in agent["env"]}
    socket = f"{environ['MTCKPT_RUNTIME_DIR']}/{protocol.SOCKET_NAME}"
    assert {"name": "MTCKPT_AGENT_SOCKET", "value": socket} in trainer["env"]
    user, group = spec["securityContext"], parsed(agent["command"]).params["group"]
    if place == "overlays/sidecar":
        assert group is None  # an agent of one user, who is the trainer's, and says where
        ram = {"name": "MTCKPT_RAM_DIR", "value": environ["MTCKPT_RAM_DIR"]}
        assert ram in trainer["env"]
        assert not user["supplementalGroups"]
    else:
        assert user["supplementalGroups"] == [int(group)]
        assert agent_spec["securityContext"]["runAsGroup"] == int(group)
        assert user["runAsUser"] != agent_spec["securityContext"]["runAsUser"]


def source(spec: Manifest, name: str) -> Manifest:
    (volume,) = (dict(v) for v in spec["volumes"] if v["name"] == name)
    if "hostPath" in volume:  # only the agent makes it
        volume["hostPath"] = volume["hostPath"]["path"]
    return volume


def mount(container: Manifest, name: str) -> str:
    (path,) = (
        (m["mountPath"], m.get("subPath")) for m in container["volumeMounts"] if m["name"] == name
    )
    return str(path)


def test_large_pages_come_before_everything_at_the_same_place() -> None:
    """What is mounted on the node is the directory that agents and trainers have as mtckpt-ram."""
    (spec,) = (spec for place, _, spec in pods() if place == "overlays/daemonset-huge-pages")
    first = spec["initContainers"][0]
    assert first["name"] == "huge-pages"
    assert first["securityContext"]["privileged"]
    assert {c["image"] for c in containers(spec)} == {first["image"]}
    (volume,) = first["volumeMounts"]
    assert volume["mountPropagation"] == "Bidirectional"  # else it is mounted in the container only
    (at,) = re.findall(r"^at=(\S+)$", first["command"][-1], re.MULTILINE)
    on_node = at.replace(volume["mountPath"], source(spec, volume["name"])["hostPath"])
    (slots,) = (m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "mtckpt-ram")
    parts = [source(spec, "mtckpt-ram")["hostPath"], slots.get("subPath")]
    assert on_node == "/".join(filter(None, parts))


# -- the image and the unit -----------------------------------------------------------------------


def test_the_image_is_what_the_manifests_run() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", "", text).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    _, spec, _ = agents()[0]
    security = spec["securityContext"]
    assert ["USER", f"{security['runAsUser']}:{security['runAsGroup']}"] in steps
    for word, value in steps:
        if word == "FROM":
            assert re.fullmatch(r"python:3\.\d+-slim-\w+( AS \w+)?", value)
    last = {word: value for word, value in steps if word in ("ENTRYPOINT", "CMD")}
    words = [*yaml.safe_load(last["ENTRYPOINT"]), *yaml.safe_load(last["CMD"])]
    parsed(words)
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    copied = " ".join(value for word, value in steps if word == "COPY" and "--from" not in value)
    for name in re.findall(r"(\S+)(?= )", copied):
        assert (ROOT / name).exists() or name.startswith("./")


UNIT = ROOT / "packaging" / "systemd" / "mtckpt-agent.service"


def test_the_unit_starts_our_command_with_our_variables() -> None:
    text = UNIT.read_text()
    (command,) = re.findall(r"^ExecStart=\S*/(mtckpt .*)$", text, re.MULTILINE)
    parsed(command.split())
    documented = (ROOT / "docs/configuration.md").read_text()
    for name in re.findall(r"^Environment=(\w+)=", text, re.MULTILINE):
        assert f"| `{name}`" in documented


def test_systemd_finds_the_unit_closed() -> None:
    """Its own lint, offline; 10 is a unit with all rights."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=30", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
