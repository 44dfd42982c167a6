"""Checks what is shipped besides the binary, as far as it can be without running it.

The compose file parses and names files that are there; the Dockerfile copies from stages that exist
and runs as nobody; the systemd unit names no option twice that may stand once; workflows parse and
call the one entry point; alert rules and dashboard are whole; every relative link in the documents leads somewhere.
"""

import json
import pathlib
import re
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
problems = []


def check(ok, text):
    if not ok:
        problems.append(text)


def compose():
    file = ROOT / "packaging" / "compose.dev.yaml"
    services = yaml.safe_load(file.read_text())["services"]
    for name, service in services.items():
        context = (file.parent / service["build"]["context"]).resolve()
        check(context == ROOT, f"compose: {name} builds from {context}")
        check((context / service["build"]["dockerfile"]).is_file(), f"compose: {name} has no Dockerfile")
        check(service.get("read_only") is True, f"compose: {name} can write to its image")
        check(service.get("cap_drop") == ["ALL"], f"compose: {name} keeps capabilities")
        for port in service.get("ports", []):
            check(str(port).startswith("127.0.0.1:"), f"compose: {name} is open to the network: {port}")
        declared = yaml.safe_load(file.read_text())["volumes"]
        for volume in service.get("volumes", []):
            check(volume.split(":")[0] in declared, f"compose: {name} uses an undeclared volume: {volume}")


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

    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
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


for part in (compose, alerts, dashboard, dockerfile, unit, workflows, links):
    part()
for problem in problems:
    print(problem, file=sys.stderr)
print(f"packaging: {len(problems)} problems")
sys.exit(bool(problems))
