"""Checks the manifests for Kubernetes, as far as that can be done without a cluster.

    kubernetes_check.py BINARY

Each object is held to the API schema of two versions, each pod to the "restricted" standard, and names to what
they name. The configuration goes through `polykey check`. As root, the commands of the embedded set are run:
by the user of the pod, with files that belong to root and its group as a kubelet mounts them.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

from documents import REPOSITORY, moved, refused, secrets

# The oldest and the newest that there are schemas for here and that are said in the README.
VERSIONS = ("1.28", "1.37")
DIRECTORY = REPOSITORY / "packaging/kubernetes"
CONFIG = "/etc/polykey/polykey.toml"
problems = []


def check(ok, text):
    if not ok:
        problems.append(text)


def objects(name):
    found = []
    for file in sorted((DIRECTORY / name).glob("*.yaml")):
        check("not run in a cluster" in file.read_text(), f"{file.name}: does not say that it was not run")
        for document in yaml.safe_load_all(file.read_text()):
            for version in VERSIONS:
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except Exception as error:
                    problems.append(f"{name}/{file.name}, {document['kind']}, {version}: {error}")
            if document["kind"] != "Namespace":
                check(document["metadata"].get("namespace") == "polykey", f"{file.name}: outside the namespace")
            found.append(document)
    return found


def named(found, kind, name):
    return next((o for o in found if o["kind"] == kind and o["metadata"]["name"] == name), None)


def restricted(where, pod):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a little more."""
    outer = pod["securityContext"]
    check(outer.get("runAsNonRoot") is True and outer.get("runAsUser", 0) > 0, f"{where}: runs as root")
    check(outer.get("seccompProfile") == {"type": "RuntimeDefault"}, f"{where}: no seccomp profile")
    check(outer.get("fsGroupChangePolicy") == "OnRootMismatch", f"{where}: each start opens files to the group")
    check(pod.get("automountServiceAccountToken") is False, f"{where}: has a token of the cluster")
    check(not any(pod.get(k) for k in ("hostNetwork", "hostPID", "hostIPC")), f"{where}: shares the host's namespaces")
    for volume in pod["volumes"]:
        check(set(volume) - {"name"} <= {"configMap", "secret", "persistentVolumeClaim", "emptyDir"},
              f"{where}: volume {volume}")
    for container in pod["containers"]:
        inner = container["securityContext"]
        check(inner.get("allowPrivilegeEscalation") is False, f"{where}: may gain privileges")
        check(inner.get("capabilities") == {"drop": ["ALL"]}, f"{where}: keeps capabilities")
        check(inner.get("readOnlyRootFilesystem") is True, f"{where}: can write to its image")
        check(not inner.get("privileged"), f"{where}: privileged")
        for what in ("requests", "limits"):
            check({"cpu", "memory"} <= set(container["resources"].get(what, {})), f"{where}: no {what}")
        check(not any("valueFrom" in e for e in container.get("env", [])), f"{where}: a secret in the environment")


def wiring(name, found, config):
    nodes = named(found, "StatefulSet", "polykey")
    pod = nodes["spec"]["template"]
    job = named(found, "Job", "polykey-init")["spec"]["template"]
    for where, template in ((f"{name} node", pod), (f"{name} init", job)):
        restricted(where, template["spec"])
        check(named(found, "ServiceAccount", template["spec"]["serviceAccountName"]), f"{where}: no such account")
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        volumes |= {c["metadata"]["name"]: c for c in nodes["spec"]["volumeClaimTemplates"]} if template is pod else {}
        for container in template["spec"]["containers"]:
            for mount in container["volumeMounts"]:
                check(mount["name"] in volumes, f"{where}: no volume {mount['name']}")
            check(CONFIG in container["args"], f"{where}: another configuration")
        for volume in volumes.values():
            if "configMap" in volume:
                check(named(found, "ConfigMap", volume["configMap"]["name"]), f"{where}: no {volume}")
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                check(named(found, "PersistentVolumeClaim", claim), f"{where}: no claim {claim}")
    # The job writes into the volume that the first pod will have.
    template = nodes["spec"]["volumeClaimTemplates"][0]
    first = f"{template['metadata']['name']}-{nodes['metadata']['name']}-0"
    claim = named(found, "PersistentVolumeClaim", first)
    check(claim and claim["spec"] == template["spec"], f"{name}: {first} is not as its template")
    check(pod["spec"]["terminationGracePeriodSeconds"] > 20, f"{name}: killed before it has drained")

    labels = pod["metadata"]["labels"]
    selectors = [nodes["spec"]["selector"]["matchLabels"]]
    for thing in found:
        if thing["kind"] == "Service":
            selectors.append(thing["spec"]["selector"])
            for port in thing["spec"]["ports"]:
                ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
                check(ports.get(port["targetPort"]) == port["port"], f"{name}: no port {port}")
        elif thing["kind"] == "PodDisruptionBudget":
            selectors.append(thing["spec"]["selector"]["matchLabels"])
        elif thing["kind"] == "NetworkPolicy":
            selectors.append(thing["spec"]["podSelector"]["matchLabels"])
            check(sorted(thing["spec"]["policyTypes"]) == ["Egress", "Ingress"], f"{name}: half a network policy")
    check(len(selectors) == 5, f"{name}: services, budget or policy missing")
    for selector in selectors:
        check(selector.items() <= labels.items(), f"{name}: {selector} selects no node")
    check(named(found, "Service", nodes["spec"]["serviceName"])["spec"].get("clusterIP") == "None", f"{name}: no names")

    # The probe asks the port that the configuration has; nothing kills a node that waits.
    container = pod["spec"]["containers"][0]
    health = re.search(r'^health = "(.*)"$', config, re.M)[1]
    check(container["readinessProbe"]["exec"]["command"] == ["/usr/bin/polykey", "health", "--addr", health],
          f"{name}: the probe asks elsewhere")
    check("livenessProbe" not in container and "startupProbe" not in container, f"{name}: a restart unlocks")
    port = int(re.search(r'^address = ".*:(\d+)"$', config, re.M)[1])
    check(container["ports"][0]["containerPort"] == port, f"{name}: listens elsewhere")

    # What the configuration names is what the commands of the README put into the secret.
    readme = (DIRECTORY / "README.md").read_text()
    given = {key.split("=")[0] for key in re.findall(r"--from-file=([\w.=-]+)", readme)}
    asked = set(re.findall(r'/etc/polykey/secrets/([\w.-]+)', config)) | set(re.findall(r'credential = "([\w-]+)"', config))
    check(asked <= given, f"{name}: the README makes no {asked - given}")


def configuration(binary, name, config):
    with tempfile.TemporaryDirectory() as directory:
        base = pathlib.Path(directory)
        secrets(base / "secrets")
        places = {"/etc/polykey/secrets": base / "secrets", "/var/lib/polykey": base / "data"}
        check(not (said := refused(binary, config, places, base)), f"{name}: the configuration is refused:\n{said}")
        # It does look at it.
        check(refused(binary, config.replace("[listen]", "[listne]"), places, base), f"{name}: anything passes")


def run_as_in_a_pod(binary, found, config):
    """Init, serve, the probe and a command, as the kubelet starts them."""
    template = named(found, "StatefulSet", "polykey")["spec"]["template"]["spec"]
    job = named(found, "Job", "polykey-init")["spec"]["template"]["spec"]
    user, group = template["securityContext"]["runAsUser"], template["securityContext"]["fsGroup"]
    with tempfile.TemporaryDirectory() as directory:
        base = pathlib.Path(directory)
        base.chmod(0o755)
        secrets(base / "secrets")
        mode = next(v["secret"]["defaultMode"] for v in template["volumes"] if "secret" in v)
        for file in (base / "secrets").iterdir():
            os.chown(file, 0, group)
            file.chmod(mode)
        (base / "data").mkdir()
        os.chown(base / "data", 0, group)
        (base / "data").chmod(0o2775)
        places = {CONFIG: base / "polykey.toml", "/etc/polykey/secrets": base / "secrets", "/var/lib/polykey": base / "data"}
        text = moved(config, places).replace("0.0.0.0:50053", "127.0.0.1:0").replace("127.0.0.1:50054", "127.0.0.1:0")
        (base / "polykey.toml").write_text(text)
        environment = {e["name"]: moved(e["value"], places) for e in template["containers"][0]["env"]}
        pod = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]

        def command(arguments):
            return [*pod, binary, *(moved(a, places) for a in arguments)]

        def run(*arguments):
            done = subprocess.run(command(arguments), env=environment, capture_output=True, text=True)
            check(done.returncode == 0, f"{arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
            return done.stdout

        run(*job["containers"][0]["args"])
        if problems:
            return
        node = subprocess.Popen(command(template["containers"][0]["args"]), env=environment, cwd="/",
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said, health, address = "", None, None
            while not (health and address) and (line := node.stdout.readline()):
                said += line
                health = health or (m[1] if (m := re.search(r"health port is (127\.0\.0\.1:\d+)", line)) else None)
                address = address or (m[1] if (m := re.search(r"listening on (127\.0\.0\.1:\d+)", line)) else None)
            check(health and address, f"the node does not get to listen:\n{said}")
            if problems:
                return
            probe = template["containers"][0]["readinessProbe"]["exec"]["command"]
            run(*probe[1:-1], health)
            profile = base / "data/node/admin.profile.toml"
            profile.write_text(re.sub(r"127\.0\.0\.1:\d+", address, profile.read_text()))
            check("admin" in run("--profile", "/var/lib/polykey/node/admin.profile.toml", "whoami"), "who is that?")
        finally:
            node.terminate()
            node.communicate(timeout=60)
        check(node.returncode == 0, f"the node ended with {node.returncode}")


def main(binary):
    for name in ("embedded", "postgres"):
        found = objects(name)
        config = named(found, "ConfigMap", "polykey")["data"]["polykey.toml"]
        wiring(name, found, config)
        configuration(binary, name, config)
        if name == "embedded" and os.geteuid() == 0:
            run_as_in_a_pod(binary, found, config)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"kubernetes: {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
