"""Holds the bill of materials to the schema of CycloneDX 1.5 and to Cargo.lock.

    sbom_check.py

Nothing is built: `packaging/sbom` asks cargo about the sources it has.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib

import jsonschema
import referencing
from cyclonedx.schema import SchemaVersion
from cyclonedx.schema._res import BOM_JSON, JSF, SPDX_JSON

from documents import REPOSITORY

EPOCH = "1795780800"
problems = []


def check(ok, text):
    if not ok:
        problems.append(text)


def made(directory):
    """The bill and the notices, as text."""
    files = directory / "sbom.cdx.json", directory / "THIRD-PARTY"
    command = [sys.executable, REPOSITORY / "packaging/sbom", "--notices", files[1], files[0]]
    done = subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return tuple(file.read_text() for file in files)


def validator():
    def resource(name, file):
        contents = json.loads(pathlib.Path(file).read_text())
        draft = referencing.jsonschema.DRAFT7
        return f"http://cyclonedx.org/schema/{name}", referencing.Resource.from_contents(contents, default_specification=draft)

    others = [resource("spdx.SNAPSHOT.schema.json", SPDX_JSON), resource("jsf-0.82.SNAPSHOT.schema.json", JSF)]
    schema = json.loads(pathlib.Path(BOM_JSON[SchemaVersion.V1_5]).read_text())
    return jsonschema.Draft7Validator(schema, registry=referencing.Registry().with_resources(others))


def main():
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        text, notices = made(pathlib.Path(one))
        check((text, notices) == made(pathlib.Path(two)), "made twice, it differs")
    bill = json.loads(text)
    validate = validator()
    for error in validate.iter_errors(bill):
        problems.append(f"{error.json_path}: {error.message[:200]}")
    # It does validate.
    broken = copy.deepcopy(bill)
    broken["components"][0]["scope"] = "linked"
    check(list(validate.iter_errors(broken)), "the schema takes anything")

    lock = tomllib.loads((REPOSITORY / "Cargo.lock").read_text())["package"]
    locked = {(p["name"], p["version"]): p.get("checksum") for p in lock}
    scopes, references = {}, set()
    for entry in bill["components"]:
        key = entry["name"], entry["version"]
        check(key in locked, f"{key} is not in Cargo.lock")
        digest = entry.get("hashes", [{}])[0].get("content")
        check(digest == locked.get(key), f"{key}: digest {digest}")
        check(entry["purl"] == f"pkg:cargo/{key[0]}@{key[1]}", f"{key}: {entry['purl']}")
        check(entry["licenses"], f"{key}: no licence")
        scopes.setdefault(entry["name"], set()).add(entry["scope"])
        references.add(entry["bom-ref"])
    root = bill["metadata"]["component"]
    check(root["name"] == "polykey" and root["purl"].startswith("pkg:cargo/polykey@"), f"this is of {root['name']}")
    check(bill["metadata"]["timestamp"] == "2026-11-27T12:00:00Z", bill["metadata"]["timestamp"])
    for edge in bill["dependencies"]:
        for name in [edge["ref"], *edge["dependsOn"]]:
            check(name in references | {root["bom-ref"]}, f"{name} is depended on and is no component")
    # What is linked, what only builds, and what only tests.
    for name in ("redb", "rustls", "aws-lc-rs", "aws-lc-sys", "tonic", "cedar-policy", "aws-sdk-kms", "tokio-postgres",
                 "polykey-hsm", "polykey-storage", "polykey-proto"):
        check("required" in scopes.get(name, ()), f"{name} is linked, and said to be {scopes.get(name)}")
    for name in ("cc", "syn", "serde_derive"):
        check(scopes.get(name) == {"excluded"}, f"{name} only builds, and is said to be {scopes.get(name)}")
    for name in ("proptest", "shuttle", "tempfile"):
        check(name not in scopes, f"{name} only tests")
    for name in ("aws-lc-sys", "redb", "rustls"):
        check(f"\n{name} " in notices, f"no notice of {name}")
    check("\npolykey" not in notices, "our own licence among the others'")
    for place in (str(REPOSITORY), str(pathlib.Path.home())):
        check(place not in text + notices, f"it names {place}")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"sbom: {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
