# SPDX-License-Identifier: Apache-2.0
"""``specforge services``: finds what parts offer, runs it with the port, and names what there is when it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_distributions import install

SECONDS = 60
OFFERING = """\
from specforge_core import {spec}, {config}, hookimpl
from specforge_core.contracts import {capabilities}


@hookimpl
def {hook}():
    return [{spec}(
        name="{name}", config={config}, factory="json:loads", capabilities={capabilities}(), service="{service}"
    )]
"""
STORE = {
    "spec": "FeatureStoreSpec",
    "config": "FeatureStoreConfig",
    "capabilities": "StoreCapabilities",
    "hook": "specforge_feature_stores",
}
CHANNEL = {
    "spec": "RefChannelSpec",
    "config": "RefChannelConfig",
    "capabilities": "ChannelCapabilities",
    "hook": "specforge_ref_channels",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "some_server.py").write_text("def run(port): print(f'serving at {port}')\ndef other(port): pass\n")
    return directory


def offer(site: Path, part: dict[str, str], name: str, service: str) -> None:
    module = f"{part['hook']}_{name}"
    group = part["hook"].replace("_", ".", 1)
    source = OFFERING.format(**part, name=name, service=service)
    install(site, f"dist-{module.replace('_', '-')}", groups={group: {name: module}}, modules={module: source})


def services(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "specforge_core.cli.main", "services", *arguments],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_parts_that_offer_a_service_are_listed_and_others_are_not(site: Path) -> None:
    offer(site, STORE, "vat", "some_server:run")
    offer(site, CHANNEL, "pipe", "some_server:other")
    offer(site, CHANNEL, "serverless", "")
    done = services(site)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["vat", "feature-store"] in rows
    assert ["pipe", "ref-channel"] in rows
    assert not {"serverless", "memory", "file"} & {row[0] for row in rows}


@pytest.mark.parametrize(("arguments", "port"), [(["vat"], "None"), (["feature-store:vat", "--port", "7001"], "7001")])
def test_a_service_is_run_with_the_port(site: Path, arguments: list[str], port: str) -> None:
    offer(site, STORE, "vat", "some_server:run")
    done = services(site, *arguments)
    assert (done.returncode, done.stdout.strip()) == (0, f"serving at {port}"), done.stderr


@pytest.mark.parametrize("name", ["vta", "memory"])
def test_an_unknown_name_lists_what_there_is(site: Path, name: str) -> None:
    offer(site, STORE, "vat", "some_server:run")
    done = services(site, name)
    assert done.returncode == 2
    assert repr(name) in done.stderr
    assert "vat" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_parts_of_one_name_are_told_apart_by_their_kind(site: Path) -> None:
    offer(site, STORE, "both", "some_server:run")
    offer(site, CHANNEL, "both", "some_server:other")
    done = services(site, "both")
    assert done.returncode == 2
    assert "feature-store:both or ref-channel:both" in done.stderr
    assert services(site, "feature-store:both").stdout.strip() == "serving at None"


def test_a_broken_plugin_costs_only_its_own_service(site: Path) -> None:
    offer(site, STORE, "vat", "some_server:run")
    groups = {"specforge.ref_channels": {"shattered": "shattered_plugin"}}
    install(site, "dist-shattered", groups=groups, modules={"shattered_plugin": "raise RuntimeError('boom')"})
    assert services(site, "vat").returncode == 0
    listed = services(site)
    assert "vat" in listed.stdout
    assert "shattered" in listed.stderr
    refused = services(site, "shattered")
    assert refused.returncode == 2
    assert "boom" in refused.stderr
