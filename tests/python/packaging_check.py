"""Checks what is shipped besides the binary, as far as it can be without running it.

    packaging_check.py [BINARY]

The compose files parse, name what is there, and carry a configuration that BINARY takes; the Dockerfile copies from stages that exist
and runs as nobody; the systemd unit names no option twice that may stand once; workflows parse and
call the one entry point; alert rules and dashboard are whole; every relative link in the documents leads somewhere.
"""

import json
import pathlib
import re
import sys
import tempfile

import yaml

from documents import REPOSITORY as ROOT
from documents import refused, secrets

BINARY = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/debug/polykey")
problems = []


def check(ok, text):
    if not ok:
        problems.append(text)


def compose(name):
    file = ROOT / "packaging" / name
    whole = yaml.safe_load(file.read_text())
    services = whole["services"]

    def declared(kind, names, service):
        for name in names:
            check(name in (whole.get(kind) or {}), f"{file.name}: {service} uses an undeclared one of {kind}: {name}")

    for name, service in services.items():
        where = f"{file.name}: {name}"
        if "build" in service:
            context = (file.parent / service["build"]["context"]).resolve()
            check(context == ROOT, f"{where} builds from {context}")
            check((context / service["build"]["dockerfile"]).is_file(), f"{where} has no Dockerfile")
            check(service.get("read_only") is True, f"{where} can write to its image")
            check(not service.get("cap_add"), f"{where} keeps capabilities")
            test = service["healthcheck"]["test"]
            check(test[:3] == ["CMD", "/usr/bin/polykey", "health"], f"{where} has another probe: {test}")
        check(service.get("cap_drop") == ["ALL"], f"{where} keeps capabilities")
        check("no-new-privileges:true" in service.get("security_opt", []), f"{where} may gain privileges")
        check("test" in service.get("healthcheck", {}), f"{where} has no health check")
        for port in service.get("ports", []):
            check(str(port).startswith("127.0.0.1:"), f"{where} is open to the network: {port}")
        declared("volumes", [v.split(":")[0] for v in service.get("volumes", [])], name)
        declared("networks", service.get("networks", []), name)
        declared("secrets", service.get("secrets", []), name)
        declared("configs", [c["source"] for c in service.get("configs", [])], name)
        for other, condition in service.get("depends_on", {}).items():
            check(other in services, f"{where} waits for {other}, which is not there")
            check(condition == {"condition": "service_healthy"}, f"{where} does not wait for {other} to be well")
        for name, value in (service.get("environment") or {}).items():
            check("PASSWORD" not in name or name.endswith("_FILE"), f"{where} has a password in its environment")
    return whole


def compose_files():
    compose("compose.dev.yaml")
    whole = compose("compose.postgres.yaml")
    check(whole["networks"]["database"] == {"internal": True}, "compose.postgres.yaml: the database is reached from outside")
    nodes = [service for service in whole["services"].values() if "build" in service]
    check(len({node["hostname"] for node in nodes}) == len(nodes) > 1, "compose.postgres.yaml: nodes of one name")
    config = whole["configs"]["polykey"]["content"]
    for node in nodes:
        mounted = set(re.findall(r'"/run/secrets/([\w.-]+)"', config)) | set(re.findall(r'credential = "([\w-]+)"', config))
        check(mounted <= set(node["secrets"]), f"compose.postgres.yaml: {mounted} in the configuration, {node['secrets']} mounted")
        check(re.search(r'^health = "(.*)"$', config, re.M)[1] == node["healthcheck"]["test"][-1], "compose.postgres.yaml: the probe asks elsewhere")
    with tempfile.TemporaryDirectory() as directory:
        base = pathlib.Path(directory)
        secrets(base / "secrets")
        places = {"/run/secrets": base / "secrets", "/var/lib/polykey": base / "data"}
        said = refused(BINARY, config, places, base)
        check(not said, f"compose.postgres.yaml: the configuration is refused:\n{said}")


def alerts():
    groups = yaml.safe_load((ROOT / "packaging" / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    names = [rule["alert"] for rule in rules]
    check(len(set(names)) == len(names), "alerts: a name stands there twice")
    for rule in rules:
        check(set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, f"alerts: {rule['alert']} has other keys")
        check(rule["labels"]["severity"] in ("warning", "critical"), f"alerts: {rule['alert']} has no severity")
        check(set(rule["annotations"]) == {"summary", "description"}, f"alerts: {rule['alert']} does not say what to do")
        check(rule["expr"].count("(") == rule["expr"].count(")"), f"alerts: {rule['alert']} is not an expression")


def dashboard():
    panels = json.loads((ROOT / "packaging" / "grafana-dashboard.json").read_text())["panels"]
    ids = [panel["id"] for panel in panels]
    check(len(set(ids)) == len(ids), "dashboard: two panels have one id")
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        check(at["x"] + at["w"] <= 24 and not cells & taken, f"dashboard: {panel['title']} lies over another")
        taken |= cells
        check(panel["type"] == "row" or panel["targets"], f"dashboard: {panel['title']} shows nothing")


def dockerfile():
    text = (ROOT / "packaging" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    stages = {m[1] for m in re.finditer(r"^FROM \S+ AS (\S+)$", text, re.M)}
    for source in re.findall(r"--from=(\S+)", text):
        check(source in stages, f"Dockerfile: no stage {source}")
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    check(users and not users[-1].startswith(("0", "root")), "Dockerfile: runs as root")
    check(any(line.startswith("HEALTHCHECK ") for line in lines), "Dockerfile: no health check")
    check("--locked" in text, "Dockerfile: builds without the lockfile")


def unit():
    text = (ROOT / "packaging" / "polykey.service").read_text()
    sections = re.split(r"^\[(\w+)\]$", text, flags=re.M)
    check(sections[1::2] == ["Unit", "Service", "Install"], f"unit: sections {sections[1::2]}")
    many = {"SystemCallFilter", "LoadCredential", "ExecStartPre"}
    for body in sections[2::2]:
        seen = set()
        for line in body.splitlines():
            if not line or line.startswith("#"):
                continue
            check("=" in line, f"unit: not an option: {line}")
            name = line.split("=")[0]
            check(name not in seen or name in many, f"unit: {name} stands twice")
            seen.add(name)


def workflows():
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text())["jobs"]
        runs = [step.get("run") for job in jobs.values() for step in job["steps"]]
        check(".ci/run" in runs, f"{file.name}: does not call .ci/run")
    for name in ("run", "deps", "test"):
        mode = (ROOT / ".ci" / name).stat().st_mode
        check(mode & 0o111 == 0o111, f".ci/{name} is not executable")


def links():
    def anchor(heading):
        return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")

    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "packaging").rglob("*.md")]
    text = {f: re.sub(r"^```.*?^```", "", f.read_text(), flags=re.M | re.S) for f in files}
    headings = {f: {anchor(h) for h in re.findall(r"^#+ (.*)$", t, re.M)} for f, t in text.items()}
    for file in files:
        for target in re.findall(r"\]\(([^)\s]+)\)", text[file]):
            if re.match(r"\w+:", target):
                continue
            path, _, fragment = target.partition("#")
            there = (file.parent / path).resolve() if path else file
            check(there.exists(), f"{file.name}: no {target}")
            if fragment and there in headings:
                check(fragment in headings[there], f"{file.name}: no {target}")


for part in (compose_files, alerts, dashboard, dockerfile, unit, workflows, links):
    part()
for problem in problems:
    print(problem, file=sys.stderr)
print(f"packaging: {len(problems)} problems")
sys.exit(bool(problems))
