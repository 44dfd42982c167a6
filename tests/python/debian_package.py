"""Installs the Debian package into a clean root, serves from it, upgrades, removes and purges it.

    debian_package.py BINARY [PREVIOUS.deb]

BINARY goes into two packages, of which the second has the higher version; PREVIOUS.deb, if given, is the
one that is upgraded from. The root is new: /usr is that of this machine under a layer that is thrown away,
/etc, /var and the list of packages hold the least that dpkg asks for. What the documents tell an
administrator to type is typed. systemd is not there: its two commands are replaced by ones that note how
they were called, and the node is started as the unit says, by its command and as its user.

Exits with 77 and the reason where it cannot run; without root, the package is built and looked at all the same.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from documents import REPOSITORY, block

INSIDE = "POLYKEY_INSIDE_NAMESPACE"
CONFIG = "/etc/polykey/polykey.toml"
PROFILE = "/var/lib/polykey/admin.profile.toml"
TO_BUILD = ("dpkg-deb", "readelf", "strip")
TO_INSTALL = ("dpkg", "unshare", "setpriv", "runuser", "chroot", "openssl", "mount", "umount")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
    "DEBIAN_FRONTEND": "noninteractive",
}


def cannot(reason):
    print(reason)
    sys.exit(77)


class Root:
    """A file system with dpkg and without history."""

    def __init__(self, base):
        self.path = base / "root"
        for name in ("etc", "usr", "var/lib/dpkg/info", "var/lib/dpkg/updates", "proc", "dev", "tmp", "run", "root"):
            (self.path / name).mkdir(parents=True)
        for name in ("upper", "work"):
            (base / name).mkdir()
        for name in ("bin", "sbin", "lib", "lib64"):
            if not pathlib.Path("/", name).is_symlink():
                cannot("/bin is no link into /usr")
            (self.path / name).symlink_to(f"usr/{name}")
        layers = f"lowerdir=/usr,upperdir={base}/upper,workdir={base}/work"
        mounted = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, self.path / "usr"], capture_output=True, text=True
        )
        if mounted.returncode:
            cannot(f"no overlay of /usr: {mounted.stderr.strip()}")
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.path / "usr/local"], check=True)
        subprocess.run(["mount", "--rbind", "/dev", self.path / "dev"], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", self.path / "proc"], check=True)
        self.write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n")
        self.write("etc/group", "root:x:0:\nshadow:x:42:\nnogroup:x:65534:\n")
        self.write("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
        self.write("etc/hosts", "127.0.0.1 localhost\n")
        for name in ("login.defs", "adduser.conf", "ssl/openssl.cnf"):
            if pathlib.Path("/etc", name).exists():
                self.write(f"etc/{name}", pathlib.Path("/etc", name).read_text())
        self.write("etc/pam.d/runuser", "auth sufficient pam_rootok.so\nsession required pam_permit.so\n")
        # What Depends names is there on this machine, or the test could not have been built.
        kept = {"libc6", "libgcc-s1", "adduser", "systemd", "dpkg"}
        status = pathlib.Path("/var/lib/dpkg/status").read_text().split("\n\n")
        self.write(
            "var/lib/dpkg/status",
            "".join(s.strip() + "\n\n" for s in status if s.strip().split("\n")[0].removeprefix("Package: ") in kept),
        )
        for file in pathlib.Path("/var/lib/dpkg/info").glob("*.list"):
            if file.stem.split(":")[0] in kept:
                shutil.copy(file, self.path / "var/lib/dpkg/info")
        for name in ("arch", "available", "diversions", "statoverride"):
            self.write(f"var/lib/dpkg/{name}", "")

    def write(self, name, text, mode=0o644):
        file = self.path / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def at(self, name):
        return self.path / name.lstrip("/")

    def run(self, *command, check=True, directory="/"):
        """What the command wrote, both ways."""
        script = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", directory, *map(str, command)]
        done = subprocess.run(
            ["chroot", self.path, *script],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        if check:
            assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def files(self):
        """Everything in it that a package may leave, with what it is."""
        found = {}
        for top in ("etc", "var", "usr/bin", "usr/lib/systemd/system", "usr/lib/sysusers.d", "usr/share/doc/polykey",
                    "usr/share/man/man1"):
            for path in self.at(top).rglob("*") if self.at(top).is_dir() else ():
                name = str(path.relative_to(self.path))
                # dpkg and the user database keep their own history.
                if not name.startswith(("var/lib/dpkg", "var/log", "var/cache/ldconfig", "etc/passwd", "etc/group",
                                        "etc/shadow", "etc/gshadow", "etc/.pwd.lock", "etc/subuid", "etc/subgid")):
                    found[name] = path.lstat().st_mode
        return found


class Systemd:
    """Notes what the maintainer scripts ask of systemd, and says that the node runs or does not."""

    def __init__(self, root):
        self.root = root
        root.at("/run/systemd/system").mkdir(parents=True)
        root.write("/usr/local/sbin/systemctl", '#!/bin/sh\necho "systemctl $*" >>/run/asked\n'
                   'case "$*" in *is-active*) [ -e /run/active ] ;; esac\n', 0o755)
        root.write("/usr/local/sbin/invoke-rc.d", '#!/bin/sh\necho "invoke-rc.d $*" >>/run/asked\n', 0o755)

    def asked(self):
        file = self.root.at("/run/asked")
        text = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return text

    def active(self, yes):
        file = self.root.at("/run/active")
        file.touch() if yes else file.unlink(missing_ok=True)


class Node:
    """The installed binary, as the installed unit starts it."""

    def __init__(self, root):
        unit = root.at("/usr/lib/systemd/system/polykey.service").read_text()
        option = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"(ExecStart|User|Group)=", line))
        self.process = subprocess.Popen(
            ["chroot", root.path, "setpriv", f"--reuid={option['User']}", f"--regid={option['Group']}",
             "--clear-groups", "--no-new-privs", "--bounding-set=-all", *option["ExecStart"].split()],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError(f"the node ended with {self.process.wait()}:\n{said}")
        profile = root.at(PROFILE)
        text = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{found[1]}", profile.read_text())
        profile.write_text(text)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.read()
        assert self.process.wait(timeout=60) == 0, "the node did not stop well"

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def processes():
    """Whoever runs the installed binary."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/exe"):
        try:
            found += [entry.parent.name] if os.readlink(entry).endswith("/usr/bin/polykey") else []
        except OSError:
            pass
    return found


def build(binary, out, *options):
    done = subprocess.run(
        [REPOSITORY / "packaging/build-deb", "--compress", "gzip", *options, binary, out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return pathlib.Path(done.stdout.strip())


def owner(root, name):
    found = root.at(name).stat()
    users = {l.split(":")[2]: l.split(":")[0] for l in root.at("/etc/passwd").read_text().splitlines()}
    return users.get(str(found.st_uid)), oct(found.st_mode & 0o7777)


def installed(root, version):
    state = root.run("dpkg-query", "-W", "-f", "${Status} ${Version}", "polykey")
    assert state == f"install ok installed {version}", state
    assert root.run("dpkg", "--verify", "polykey") == ""


def the_package(package, again):
    """What can be seen without installing it."""
    assert package.read_bytes() == again.read_bytes(), "two builds differ"
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        assert " root/root " in line, line
        assert line[0] in "d-" and line[5] == "-" and line[8] == "-", f"writable, or no plain file: {line}"
    names = {line.split()[-1] for line in listed.splitlines()}
    doc = "./usr/share/doc/polykey/"
    for name in ("./usr/bin/polykey", "./usr/lib/systemd/system/polykey.service", "./usr/share/man/man1/polykey.1.gz",
                 "./usr/share/man/man1/polykey-key-create.1.gz", "./usr/share/bash-completion/completions/polykey",
                 "./usr/share/zsh/vendor-completions/_polykey", "./usr/share/fish/vendor_completions.d/polykey.fish",
                 doc + "copyright", doc + "changelog.gz", doc + "changelog.Debian.gz", doc + "examples/polykey.toml",
                 doc + "operations.md.gz"):
        assert name in names, name
    assert not any(name.startswith("./etc") for name in names), "a configuration is shipped as if it were one"


def whole_life(root, first, second, versions):
    systemd = Systemd(root)
    before = root.files()
    for package in (first, second):
        shutil.copy(package, root.at("/tmp"))
    install = lambda package: root.run("dpkg", "-i", f"/tmp/{package.name}")
    polykey = lambda *command: root.run("runuser", "-u", "polykey", "--", "polykey", "--profile", PROFILE, *command)

    # Installed: a user, two directories, and nothing that runs.
    said = install(first)
    assert "nothing started" in said and "README.Debian" in said, said
    installed(root, versions[0])
    assert not any(" start" in call or "restart" in call for call in systemd.asked()), "a node without a configuration"
    assert processes() == []
    entry = root.run("getent", "passwd", "polykey").strip().split(":")
    assert 0 < int(entry[2]) < 1000 and entry[5:] == ["/var/lib/polykey", "/usr/sbin/nologin"], entry
    assert owner(root, "/etc/polykey") == ("root", "0o750")
    assert owner(root, "/var/lib/polykey") == ("polykey", "0o700")
    assert list(root.at("/etc/polykey").iterdir()) == []

    # Set up as the documents say.
    root.run("sh", "-euc", block("certificates"), directory="/etc/polykey")
    typed, starts = re.split(r"^systemctl enable --now polykey\n", block("package"), flags=re.M)
    assert starts.strip().endswith(" whoami"), starts
    typed = typed.replace("polykey.toml          #", "polykey.toml\nsed -i 's/^#: address = .*/address = \"127.0.0.1:0\"/' polykey.toml #")
    assert "127.0.0.1:0" in typed
    root.run("sh", "-euc", typed, directory="/etc/polykey")
    node = Node(root)
    try:
        assert "admin" in root.run("sh", "-euc", starts)
        polykey("key", "create", "--type", "aes-256", "--alias", "kept", "--tag", "test=package")
        root.write("/tmp/plain", "the text that outlives two versions\n")
        polykey("encrypt", "--key", "alias/kept", "--in", "/tmp/plain", "--out", "/var/lib/polykey/sealed")
        secrets = {name: root.at(name).read_bytes() for name in (CONFIG, "/etc/polykey/master.key")}

        # Upgraded while it runs: the scripts have it restarted, and the data is there.
        systemd.active(True)
        systemd.asked()
        install(second)
        installed(root, versions[1])
        assert "invoke-rc.d polykey restart" in systemd.asked()
        node.stop()
        node = Node(root)
        assert "text that outlives" in polykey("decrypt", "--in", "/var/lib/polykey/sealed")
        assert "test=package" in polykey("key", "describe", "alias/kept")
        assert secrets == {name: root.at(name).read_bytes() for name in secrets}

        # A configuration that the new version does not know: left running, and told.
        root.at(CONFIG).write_bytes(secrets[CONFIG] + b"\n[no_such_section]\n")
        said = install(second)
        assert "does not take /etc/polykey/polykey.toml" in said, said
        assert not any("restart" in call for call in systemd.asked())
        root.at(CONFIG).write_bytes(secrets[CONFIG])

        # A node that was stopped stays so.
        systemd.active(False)
        install(second)
        assert not any("restart" in call for call in systemd.asked())

        # Removed: stopped, the program gone, what is the user's own there.
        said = root.run("dpkg", "-r", "polykey")
        assert "invoke-rc.d polykey stop" in systemd.asked()
        node.stop()
        assert not root.at("/usr/bin/polykey").exists()
        assert not root.at("/usr/lib/systemd/system/polykey.service").exists()

        # Purged: no key is deleted, and it is said where they are.
        store = root.at("/var/lib/polykey/polykey.redb").read_bytes()
        wants = root.at("/etc/systemd/system/multi-user.target.wants/polykey.service")
        wants.parent.mkdir(parents=True)
        wants.symlink_to("/usr/lib/systemd/system/polykey.service")
        said = root.run("dpkg", "-P", "polykey")
        assert "kept /etc/polykey /var/lib/polykey" in said and "rm -r /etc/polykey /var/lib/polykey" in said, said
        assert root.at("/var/lib/polykey/polykey.redb").read_bytes() == store
        assert secrets == {name: root.at(name).read_bytes() for name in secrets}
        assert not wants.is_symlink()
        assert root.run("dpkg-query", "-W", "polykey", check=False).startswith("dpkg-query: no packages"), "still known"
        shutil.rmtree(root.at("/etc/systemd"))

        # And it all comes back.
        install(second)
        node = Node(root)
        assert "text that outlives" in polykey("decrypt", "--in", "/var/lib/polykey/sealed")
        node.stop()
    finally:
        node.kill()

    # Whoever destroys the keys finds nothing else left.
    for name in ("/etc/polykey", "/var/lib/polykey"):
        for path in root.at(name).iterdir():
            path.unlink()
    said = root.run("dpkg", "-P", "polykey")
    assert "kept" not in said, said
    after = root.files()
    assert after == before, f"left behind: {set(after.items()) ^ set(before.items())}"

    # Where there is no systemd, adduser makes the user.
    root.run("sed", "-i", "/^polykey:/d", *(f for f in ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow")
                                            if root.at(f).exists()))
    if root.at("/usr/sbin/adduser").exists():
        root.at("/usr/bin/systemd-sysusers").unlink(missing_ok=True)
        shutil.rmtree(root.at("/run/systemd"))
        install(first)
        entry = root.run("getent", "passwd", "polykey").strip().split(":")
        assert 0 < int(entry[2]) < 1000 and entry[5:] == ["/var/lib/polykey", "/usr/sbin/nologin"], entry
        assert owner(root, "/var/lib/polykey") == ("polykey", "0o700")
        root.run("dpkg", "-P", "polykey")
    return len(before)


def built(binary, base):
    """The binary without its symbols, and the package of it, which can be seen without installing it."""
    stripped = base / "polykey"
    subprocess.run(["strip", "-o", stripped, binary], check=True)
    package = build(stripped, base / "a")
    the_package(package, build(stripped, base / "b"))
    return stripped, package


def main(binary, previous=None):
    def need(tools):
        if missing := [tool for tool in tools if not shutil.which(tool)]:
            cannot(f"{', '.join(missing)} missing")

    need(TO_BUILD)
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory() as directory:
            built(binary, pathlib.Path(directory))
        cannot("built and looked at; installing it needs root")
    need(TO_INSTALL)
    if INSIDE not in os.environ:
        # In namespaces of its own: no mount is seen outside, and no process outlives it.
        os.environ[INSIDE] = "1"
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        sys.exit(subprocess.run([*unshare, sys.executable, *sys.argv]).returncode)
    with tempfile.TemporaryDirectory() as directory:
        base = pathlib.Path(directory)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", base], check=True)
        try:
            stripped, first = built(binary, base)
            first = pathlib.Path(previous) if previous else first
            tell = lambda package: ["dpkg-deb", "-f", package, "Version"]
            version = lambda package: subprocess.check_output(tell(package), text=True).strip()
            second = build(stripped, base / "c", "--version", version(first) + "+next")
            whole_life(Root(base), first, second, (version(first), version(second)))
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", base])
    print("the package installs, serves, upgrades and goes")


if __name__ == "__main__":
    main(*sys.argv[1:])
