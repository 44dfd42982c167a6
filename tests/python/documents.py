"""What the checks of packaging share: commands of the documents, and a configuration given to the binary."""

import os
import pathlib
import subprocess

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent


def block(name):
    """The commands of a block of docs/operations.md."""
    text = (REPOSITORY / "docs/operations.md").read_text()
    inside = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    return inside.split("```sh\n")[1].split("```")[0]


def secrets(directory):
    """Everything that the deployments here mount as secrets, made as the documents say."""
    directory.mkdir(parents=True)
    subprocess.run(["sh", "-euc", block("certificates")], cwd=directory, check=True, capture_output=True)
    (directory / "ca.pem").rename(directory / "client-ca.pem")
    (directory / "ca.key").rename(directory / "client-ca.key")
    (directory / "db-ca.pem").write_bytes((directory / "client-ca.pem").read_bytes())
    (directory / "master-key").write_bytes(os.urandom(32))
    (directory / "db-password").write_text("a password\n")
    for file in directory.iterdir():
        file.chmod(0o600)


def moved(text, places):
    """A configuration or command with each path of `places` in the place of the one before it."""
    for before, after in places.items():
        text = text.replace(before, str(after))
    return text


def refused(binary, text, places, directory):
    """What `polykey check` finds wrong with a configuration whose files are elsewhere; nothing, if it is well."""
    file = directory / "polykey.toml"
    file.write_text(moved(text, places))
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": str(directory / "secrets")}
    done = subprocess.run([binary, "check", "--config", file], env=environment, capture_output=True, text=True)
    if "cargo feature `postgres`" in done.stderr:
        return ""
    return "" if done.returncode == 0 else done.stdout + done.stderr
