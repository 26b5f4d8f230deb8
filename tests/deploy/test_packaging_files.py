"""The files of deploy/packaging: parsed, compared with each other and with the program, tried where tools allow it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from fedveil.common import canonical, cli, errors, settings
from fedveil.deploy import server_process
from fedveil.deploy.cli import client as cli_site
from fedveil.deploy.cli import server as cli_server

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "deploy" / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*.service"))
DOCKERFILE = (PACKAGING / "Dockerfile").read_text()
# Of these a person has to be told; trying again changes nothing.
FINAL = {
    c.exit_code
    for c in (
        errors.UsageError, errors.ConfigError, errors.PlanError, errors.ContractError, errors.DataError,
        errors.AnonymityError, errors.IdentityError, errors.PolicyRefusal, errors.JournalError,
        errors.VerificationError, errors.ModelError,
    )
}  # fmt: skip


def unit(path: Path) -> dict[str, list[str]]:
    """All ``key=value`` lines of a unit."""
    out: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            out.setdefault(key, []).append(value)
    return out


def compose() -> dict[str, Any]:
    return yaml.safe_load((PACKAGING / "compose.yaml").read_text())


def manifests() -> list[dict[str, Any]]:
    return [d for p in sorted((PACKAGING / "kubernetes").glob("*.yaml")) for d in yaml.safe_load_all(p.read_text())]


def pod() -> dict[str, Any]:
    [job] = [d for d in manifests() if d["kind"] == "Job"]
    return job["spec"]["template"]["spec"]


def takes(app: Any, argv: list[str]) -> None:
    """Whether the program knows this command line; a click error otherwise."""
    group = typer.main.get_command(app)
    name, *rest = argv
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, rest)


def rooms(argv: list[str]) -> None:
    takes({"server": cli_server.app, "client": cli_site.app}[argv[0]], argv[1:])


class TestUnits:
    def test_there_are_three(self):
        assert [u.name for u in UNITS] == [
            "fedveil-client.service", "fedveil-monitor@.service", "fedveil-server@.service",
        ]  # fmt: skip

    @pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
    def test_sandbox(self, path):
        u = unit(path)
        assert u["User"] == ["fedveil"]
        assert u["CapabilityBoundingSet"] == [""]
        for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables"):
            assert u[key] == ["yes"], key
        assert u["ProtectSystem"] == ["strict"]
        assert u["LimitCORE"] == ["0"]

    @pytest.mark.parametrize("path", [u for u in UNITS if "monitor" not in u.name], ids=lambda p: p.name)
    def test_what_would_be_refused_again_is_not_restarted(self, path):
        u = unit(path)
        prevented = {int(c) for c in u["RestartPreventExitStatus"][0].split()}
        assert prevented >= FINAL
        assert errors.TransportError.exit_code not in prevented
        assert str(errors.BudgetExhausted.exit_code) in u["SuccessExitStatus"][0].split()
        assert int(u["TimeoutStopSec"][0]) > server_process.DRAIN_S

    def test_the_servers_stop_is_a_success(self):
        u = unit(PACKAGING / "systemd" / "fedveil-server@.service")
        assert str(server_process.STOPPED) in u["SuccessExitStatus"][0].split()

    @pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
    def test_commands_are_ones_that_the_program_knows(self, path):
        [line] = unit(path)["ExecStart"]
        program, *argv = line.split()
        if program.endswith("/fedveil"):
            rooms(argv)
        else:
            assert program == "/opt/fedveil/bin/fedveil-serve"
            assert len(argv) == 2

    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd tools here")
    @pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
    def test_systemd_accepts_them(self, path, tmp_path):
        for source in UNITS:
            there = re.sub(r"/opt/fedveil/bin/\S+", "/bin/true", source.read_text())
            (tmp_path / source.name).write_text(there)
        said = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=no", str(tmp_path / path.name)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (said.returncode, said.stderr) == (0, "")

    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd tools here")
    def test_systemd_would_notice_a_wrong_setting(self, tmp_path):
        bad = UNITS[0].read_text().replace("ProtectHome=yes", "ProtectHome=perhaps").replace(
            "/opt/fedveil/bin/fedveil", "/bin/true"
        )  # fmt: skip
        (tmp_path / "bad.service").write_text(bad)
        said = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / "bad.service")], capture_output=True, text=True
        )
        assert "protect home" in said.stderr


class TestCompose:
    def test_every_service_is_locked_down(self):
        for name, s in compose()["services"].items():
            assert s["user"] == "10001:10001", name
            assert s["read_only"] is True, name
            assert s["cap_drop"] == ["ALL"], name
            assert "no-new-privileges:true" in s["security_opt"], name
            assert not s.get("privileged"), name

    def test_only_the_server_has_a_port_and_the_client_has_none(self):
        services = compose()["services"]
        assert [n for n, s in services.items() if "ports" in s] == ["server"]
        assert services["client"]["profiles"] == ["client"]

    def test_commands(self):
        services = compose()["services"]
        rooms(services["client"]["command"])
        rooms(services["monitor"]["command"])
        assert services["server"]["entrypoint"] == ["fedveil-serve"]

    def test_graces_cover_the_drain(self):
        for name in ("server", "client"):
            grace = compose()["services"][name]["stop_grace_period"]
            assert float(grace.removesuffix("s")) > server_process.DRAIN_S

    def test_what_is_built_is_here(self):
        build = compose()["services"]["server"]["build"]
        assert (PACKAGING / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        cuda = yaml.safe_load((PACKAGING / "compose.cuda.yaml").read_text())
        assert set(cuda["services"]) <= set(compose()["services"])


class TestKubernetes:
    def test_kinds(self):
        kinds = {d["kind"] for d in manifests()}
        assert kinds == {"Namespace", "ServiceAccount", "PersistentVolumeClaim", "Job", "Service", "NetworkPolicy"}
        assert {d["metadata"].get("namespace", "fedveil") for d in manifests()} == {"fedveil"}

    def test_the_pod_meets_the_restricted_standard(self):
        spec = pod()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for c in (*spec["containers"], *spec["initContainers"]):
            s = c["securityContext"]
            assert s["allowPrivilegeEscalation"] is False, c["name"]
            assert s["readOnlyRootFilesystem"] is True, c["name"]
            assert s["capabilities"] == {"drop": ["ALL"]}, c["name"]

    def test_every_mount_has_a_volume_and_every_volume_a_mount(self):
        spec = pod()
        mounted = {m["name"] for c in (*spec["containers"], *spec["initContainers"]) for m in c["volumeMounts"]}
        assert mounted == {v["name"] for v in spec["volumes"]}

    def test_keys_are_copied_to_memory_for_their_user_alone(self):
        spec = pod()
        keys = spec["initContainers"][0]
        assert "umask 077" in keys["command"][-1]
        [identity] = [v for v in spec["volumes"] if v["name"] == "identity"]
        assert identity["emptyDir"]["medium"] == "Memory"
        assert "secret" not in {m["name"] for c in spec["containers"] for m in c["volumeMounts"]}

    def test_the_policy_lets_sites_in_and_nothing_out(self):
        [policy] = [d["spec"] for d in manifests() if d["kind"] == "NetworkPolicy"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert policy["egress"] == []
        assert policy["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]

    def test_the_service_finds_the_pod(self):
        [job] = [d for d in manifests() if d["kind"] == "Job"]
        [service] = [d for d in manifests() if d["kind"] == "Service"]
        assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
        [port] = pod()["containers"][0]["ports"]
        assert service["spec"]["ports"][0]["targetPort"] == port["name"]

    def test_the_job_does_not_repeat_what_is_final(self):
        [job] = [d for d in manifests() if d["kind"] == "Job"]
        codes = job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
        assert set(codes) >= FINAL | {errors.RunAborted.exit_code}
        assert pod()["restartPolicy"] == "Never"  # podFailurePolicy needs it
        assert pod()["terminationGracePeriodSeconds"] > server_process.DRAIN_S

    def test_commands(self):
        [monitor] = [c for c in pod()["initContainers"] if c["name"] == "monitor"]
        rooms(monitor["args"])
        assert pod()["containers"][0]["command"][0] == "fedveil-serve"


class TestImage:
    def test_it_does_not_run_as_root(self):
        users = re.findall(r"^USER (.+)$", DOCKERFILE, re.M)
        assert users == ["10001:10001"]
        assert DOCKERFILE.rindex("USER ") > DOCKERFILE.rindex("RUN ")

    def test_base_and_python_fit_the_project(self):
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
        assert wanted.startswith(">=3.11")
        assert "ARG BASE=python:3.11-" in DOCKERFILE

    def test_the_context_is_a_list_of_what_is_let_in(self):
        lines = (PACKAGING / "Dockerfile.dockerignore").read_text().splitlines()
        rules = [line for line in lines if line and not line.startswith("#")]
        assert rules[0] == "*"
        let_in = {r[1:].partition("/")[0] for r in rules if r.startswith("!")}
        assert let_in == {
            "client", "common", "deploy", "privacy", "server", "src", "build", "LICENSE", "README.md",
            "constraints.txt", "pyproject.toml",
        }  # fmt: skip
        assert {"**/*.key", "**/*.pem"} <= set(rules[rules.index("!pyproject.toml") :])

    @pytest.mark.parametrize("script", ["install.sh", "serve.sh"])
    def test_scripts_parse(self, script):
        subprocess.run(["sh", "-n", str(PACKAGING / script)], check=True)

    def test_an_unknown_variant_is_refused(self, tmp_path):
        said = subprocess.run(["sh", str(PACKAGING / "install.sh"), "rocm", str(tmp_path / "out")], capture_output=True)
        assert said.returncode == 2
        assert not (tmp_path / "out").exists()


class TestServe:
    """``serve.sh`` with a program in place of fedveil that prints how it was called."""

    def serve(self, tmp_path: Path, run: Path) -> str:
        fake = tmp_path / "bin" / "fedveil"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text('#!/bin/sh\necho "$@"\n')
        fake.chmod(0o755)
        env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["sh", str(PACKAGING / "serve.sh"), "f.toml", str(run)],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def test_a_new_run_starts(self, tmp_path):
        run = tmp_path / "run"
        assert self.serve(tmp_path, run) == f"server start f.toml --run {run}"
        takes(cli_server.app, ["start", "f.toml", "--run", str(run)])

    def test_an_interrupted_run_goes_on(self, tmp_path):
        said = {"kind": "site.refused", "body": {"reason": 'it said "kind":"run.end"'}}
        (tmp_path / "journal.jsonl").write_bytes(canonical.dumps(said) + b"\n")
        assert self.serve(tmp_path, tmp_path) == f"server resume f.toml {tmp_path}"
        takes(cli_server.app, ["resume", "f.toml", str(tmp_path)])

    def test_an_ended_run_stays_ended(self, tmp_path):
        (tmp_path / "journal.jsonl").write_bytes(canonical.dumps({"kind": "run.end", "body": {}, "at": 1}) + b"\n")
        assert self.serve(tmp_path, tmp_path) == f"the run in {tmp_path} has ended"


class TestInstitution:
    """docs/institution.md: what it tells people to type."""

    TEXT = (ROOT / "docs" / "institution.md").read_text()

    def test_ten_commands(self):
        [block] = re.findall(r"```sh\n(.*?)```", self.TEXT, re.S)
        assert len(block.strip().splitlines()) == 10

    def test_the_program_takes_them_in_an_order_that_can_work(self):
        [block] = re.findall(r"```sh\n(.*?)```", self.TEXT, re.S)
        calls = [
            line.split("/opt/fedveil/bin/fedveil ")[1].split() for line in block.splitlines() if "bin/fedveil " in line
        ]
        for argv in calls:
            rooms(argv)
        assert [argv[1] for argv in calls] == ["join", "join", "join", "check"]
        assert [argv[3] for argv in calls[:3]] == ["--site", "--reply", "--roster"]
        assert all(
            "runuser -u fedveil -- env HOME=/tmp" in line for line in block.splitlines() if "bin/fedveil " in line
        )
        placed = block.index("install -o fedveil -m 600 reply.json roster.json contract.json site.toml /etc/fedveil/")
        assert block.index("--site a") < placed < block.index("--reply")

    def test_files_that_it_names_are_here(self):
        named = set(re.findall(r"deploy/packaging/[\w./@-]*\w", self.TEXT))
        assert len(named) >= 4
        assert [n for n in sorted(named) if not (ROOT / n).exists()] == []

    def test_commands_that_it_names_exist(self):
        program = typer.main.get_command(cli.build())
        named = set(re.findall(r"fedveil ((?:data|ledger|server|client|audit) [a-z]+)", self.TEXT))
        assert len(named) >= 5
        for words in sorted(named):
            command: Any = program
            for word in words.split():
                command = command.get_command(click.Context(command), word)
                assert command is not None, words

    def test_its_site_toml_is_one(self, tmp_path):
        [block] = re.findall(r"```toml\n(.*?)```", self.TEXT, re.S)
        (tmp_path / "site.toml").write_text(block)
        loaded = settings.load(tmp_path / "site.toml", settings.SiteSettings)
        writable = unit(PACKAGING / "systemd" / "fedveil-client.service")["StateDirectory"]
        assert loaded.site.state == Path("/var/lib") / writable[0]
