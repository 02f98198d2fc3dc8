# SPDX-License-Identifier: Apache-2.0
"""The files in `deploy/` parse, name each other's places, and fit `pyproject.toml`."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    sorted(p for p in DEPLOY.rglob("*") if p.suffix in (".yaml", ".yml")),
    ids=lambda p: p.name,
)
def test_yaml_parses(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_image_is_of_a_supported_vllm():
    version = re.search(r"^ARG VLLM_VERSION=(\S+)$", DOCKERFILE, re.M).group(1)
    extra = re.search(r'install .* "/src\[(\w+)\]"', DOCKERFILE).group(1)
    assert "FROM vllm/vllm-openai:v${VLLM_VERSION}" in DOCKERFILE
    requirements = map(Requirement, PROJECT["project"]["optional-dependencies"][extra])
    (vllm,) = (r for r in requirements if r.name == "vllm")
    assert vllm.specifier.contains(version)


def test_image_gets_everything_the_package_is_built_from():
    copied = set(re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M))
    sources = {name for line in copied for name in line.split()}
    places = PROJECT["tool"]["setuptools"]["package-dir"].values()
    project = PROJECT["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *places}
    assert needed <= sources
    assert all((ROOT / name).exists() for name in sources)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in sources} <= set(ignored)


def test_compose_mounts_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source[0] == "." else source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert (DEPLOY / services["d2f"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["d2f"]["build"]["dockerfile"]).exists()
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services


def test_dashboard_uses_the_source_that_is_provisioned():
    path = DEPLOY / "grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    dashboard = json.loads((DEPLOY / "grafana/dashboards/d2f.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["title"] and panel["targets"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)
