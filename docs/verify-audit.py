#!/usr/bin/env python3
"""Verifies the audit log of a Polykey node with nothing but Python's standard library.

    python3 verify-audit.py EXPORT... --public-key KEY [--checkpoint FILE]...
    python3 verify-audit.py --sink FILE... --public-key KEY [--checkpoint FILE]...

EXPORT is what `polykey audit export` or `polykey audit archive` writes, or the node into its directory of
archives; several that follow one another, oldest first, are verified as one log. With --sink, FILEs are the copies that a sink of
[audit.sinks] keeps, oldest first, in which leaves may stand twice; archives may be among them. KEY is the node's public key, in
base64 or a file with it; keep it where whoever has the node cannot change it. FILE of --checkpoint
is a checkpoint kept from earlier (`polykey audit checkpoint -o json`, or the note in it): the log
must still begin with everything that it covers, so that nothing before it can be cut off.

Ends with 0 if the log is whole and signed, with 1 if not, with 2 if it cannot be read.

What is checked: each leaf is hashed again, SHA-256(0x00, salt and body); the tree over them is that
of RFC 9162 section 2.1; each checkpoint (a C2SP signed note) has an Ed25519 signature (RFC 8032) of
a given key and the root of that tree. Each leaf names its place and its node. So whatever was edited,
removed, put in, moved or cut off up to a checkpoint is found. A file that does not begin with the log names
the subtrees over what is before; its checkpoints sign those as well, and the file before must end with them. A signature that is not Ed25519 of a
given key (of ML-DSA-65, say) is named and not checked. Nothing here is secret: the arithmetic need not
run in constant time, and must not be used for signing.
"""

import argparse
import base64
import binascii
import functools
import hashlib
import json
import re
import sys

# ---- Ed25519, RFC 8032 section 5.1, verification alone -------------------------------------------

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)


def add(a, b):
    """The sum of two points in extended coordinates (section 5.1.4)."""
    e = (a[1] - a[0]) * (b[1] - b[0]) % P
    f = (a[1] + a[0]) * (b[1] + b[0]) % P
    g = 2 * a[3] * b[3] * D % P
    h = 2 * a[2] * b[2] % P
    x, y, z, t = f - e, h - g, h + g, f + e
    return (x * y % P, z * t % P, y * z % P, x * t % P)


def multiply(scalar, point):
    result = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point = add(point, point)
        scalar >>= 1
    return result


def decode_point(data):
    """The point that 32 bytes encode (section 5.1.3), or None."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * ROOT_OF_MINUS_ONE % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return (x, y, 1, x * y % P)


def encode_point(point):
    inverse = pow(point[2], P - 2, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


BASE_POINT = decode_point((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))


@functools.lru_cache(maxsize=65536)
def ed25519_verifies(public_key, message, signature):
    """Whether a signature holds (section 5.1.7, without the cofactor, as most libraries do)."""
    if len(public_key) != 32 or len(signature) != 64:
        return False
    point = decode_point(public_key)
    s = int.from_bytes(signature[32:], "little")
    if point is None or s >= ORDER:
        return False
    digest = hashlib.sha512(signature[:32] + public_key + message).digest()
    k = int.from_bytes(digest, "little") % ORDER
    negated = (P - point[0], point[1], point[2], P - point[3])
    return encode_point(add(multiply(s, BASE_POINT), multiply(k, negated))) == signature[:32]


# ---- The tree, RFC 9162 section 2.1 --------------------------------------------------------------


class Tree:
    """The roots of the complete subtrees, largest first: all that appending needs."""

    def __init__(self):
        self.size = 0
        self.roots = []

    def push(self, leaf_hash):
        size = self.size
        while size & 1:
            leaf_hash = hashlib.sha256(b"\x01" + self.roots.pop() + leaf_hash).digest()
            size >>= 1
        self.roots.append(leaf_hash)
        self.size += 1

    def begin(self, size, roots):
        """Goes on behind `size` leaves under these roots; False if that cannot be."""
        if self.size == size and self.roots == roots:
            return True
        if self.size or bin(size).count("1") != len(roots):
            return False
        self.size, self.roots = size, list(roots)
        return True

    def root(self):
        if not self.roots:
            return hashlib.sha256(b"").digest()
        root = self.roots[-1]
        for left in reversed(self.roots[:-1]):
            root = hashlib.sha256(b"\x01" + left + root).digest()
        return root


# ---- Checkpoints: C2SP signed notes --------------------------------------------------------------


def decode_base64(text):
    """The bytes of base64 as it is written, and of nothing that only resembles it."""
    if isinstance(text, str):
        text = text.encode()
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if base64.b64encode(data) == text else None


# Bytes of a signature.
ML_DSA_65 = 3309

NUMBER = r"(0|[1-9][0-9]{0,19})"
NOTE = re.compile(
    rf"([^ +\n]+)\n{NUMBER}\n([A-Za-z0-9+/]{{43}}=)\ntime (-?[0-9]{{1,20}})\n\n((?:\u2014 [^\n]+\n)+)"
)


class Checkpoint:
    """A statement of the log's size and root, with its signatures."""

    def __init__(self, note):
        parts = NOTE.fullmatch(note)
        if parts is None:
            raise ValueError("not a checkpoint")
        self.origin = parts[1]
        self.size = int(parts[2])
        self.root = decode_base64(parts[3])
        self.signed = note[: parts.start(5) - 1].encode()
        self.signatures = []
        for line in parts[5].split("\n")[:-1]:
            name, _, signature = line[2:].rpartition(" ")
            signature = decode_base64(signature)
            if name != self.origin or signature is None or len(signature) < 5 or self.root is None:
                raise ValueError("not a checkpoint")
            self.signatures.append((signature[:4], signature[4:]))

    def check(self, keys):
        """Whether a given key has signed it, and the hints of the signatures of other keys."""
        signed, others = False, []
        for hint, signature in self.signatures:
            mine = [key for key in keys if hint == key_hint(self.origin, key)]
            if any(ed25519_verifies(key, self.signed, signature) for key in mine):
                signed = True
            elif not mine:
                kind = "ML-DSA-65" if len(signature) == ML_DSA_65 else "another key or kind"
                others.append((hint.hex(), kind))
        return signed, others


@functools.lru_cache(maxsize=1024)
def key_hint(origin, key):
    return hashlib.sha256(origin.encode() + b"\n\x01" + key).digest()[:4]


# ---- Leaves --------------------------------------------------------------------------------------

SALT = 32


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def place_of(body):
    """The index and the node that a body (protobuf `polykey.record.v1.AuditBody`) names, or None.

    They stand before the events, which are the rest: fields 1 and 2, written in order.
    """
    index, node, at = 0, b"", 0
    try:
        while at < len(body):
            tag, at = varint(body, at)
            field, kind = tag >> 3, tag & 7
            if field > 2:
                break
            if kind == 0:
                value, at = varint(body, at)
            elif kind == 2:
                length, at = varint(body, at)
                value, at = body[at : at + length], at + length
                if at > len(body):
                    return None
            else:
                return None
            if (field, kind) == (1, 0):
                index = value
            elif (field, kind) == (2, 2):
                node = value
    except (IndexError, ValueError):
        return None
    return index, node


# ---- The log -------------------------------------------------------------------------------------

LEAF = re.compile(rb'\{"leaf":(0|[1-9][0-9]{0,19}),"data":"([A-Za-z0-9+/]*={0,2})"\}')
END = re.compile(rb'\{"end":(0|[1-9][0-9]{0,19})\}')
HEADER = re.compile(
    rb'\{"polykey_audit_export":(1|2),"origin":"(polykey/[0-9a-f]{32})","public_keys":\[([^\[\]]*)\]'
    rb'(?:,"first":([1-9][0-9]{0,19}),"subtrees":\[([^\[\]]*)\])?\}'
)


def header_of(line):
    """Log, names of keys, first leaf and roots before it of an export's first line; None if it is none."""
    found = HEADER.fullmatch(line)
    if found is None or (found[1] == b"2") != (found[4] is not None):
        return None
    roots = []
    for name in filter(None, (found[5] or b"").split(b",")):
        root = decode_base64(name.strip(b'"'))
        if root is None or len(root) != 32 or name != b'"' + base64.b64encode(root) + b'"':
            return None
        roots.append(root)
    return found[2].decode(), found[3], int(found[4] or 0), roots


def checkpoint_of(line):
    """The checkpoint of a line; None if the line is of another kind."""
    if not line.startswith(b'{"checkpoint":'):
        return None
    note = json.loads(line)["checkpoint"]
    if not isinstance(note, str):
        raise ValueError("not a checkpoint")
    again = json.dumps({"checkpoint": note}, ensure_ascii=False, separators=(",", ":"))
    if again.encode() != line:
        raise ValueError("not written as a checkpoint is")
    return Checkpoint(note)


class Log:
    """Takes leaves in order and compares the tree with each checkpoint of its size."""

    def __init__(self, origin, keys, kept):
        self.origin = origin
        self.keys = keys
        self.tree = Tree()
        self.first = 0
        self.ahead = {}
        self.covered = 0
        self.checkpoints = 0
        self.notes = []
        self.kept = list(kept)

    def begin(self):
        for checkpoint in self.kept:
            yield from self.expect(checkpoint)

    def expect(self, checkpoint):
        """Its signature is checked at once, its root when the tree has its size."""
        size = checkpoint.size
        if self.origin is None:
            self.origin = checkpoint.origin
        signed, others = checkpoint.check(self.keys)
        for hint, kind in others:
            note = f"a signature with the hint {hint} is of {kind}: not checked here"
            if note not in self.notes:
                self.notes.append(note)
        if checkpoint.origin != self.origin:
            yield f"the checkpoint at {size} is of {checkpoint.origin}"
        elif not signed:
            yield f"the checkpoint at {size} is signed by no given key"
        elif size < self.first:
            yield f"the checkpoint at {size} cannot be compared: give the archives before leaf {self.first} too"
        elif size < self.tree.size:
            yield f"the checkpoint at {size} stands behind its leaves"
        elif size == self.tree.size:
            yield from self.compare(checkpoint)
        else:
            self.ahead.setdefault(size, []).append(checkpoint)

    def compare(self, checkpoint):
        if checkpoint.root == self.tree.root():
            self.checkpoints += 1
            self.covered = max(self.covered, checkpoint.size)
        else:
            yield f"the first {checkpoint.size} leaves are not those that were signed then"

    def leaf(self, data):
        index = self.tree.size
        place = place_of(data[SALT:]) if len(data) >= SALT else None
        if place is None:
            yield f"leaf {index} does not decode"
        elif place[0] != index:
            yield f"leaf {index} names itself {place[0]}"
        elif self.origin is not None and "polykey/" + place[1].hex() != self.origin:
            yield f"leaf {index} is of another node"
        self.tree.push(hashlib.sha256(b"\x00" + data).digest())
        for checkpoint in self.ahead.pop(self.tree.size, ()):
            yield from self.compare(checkpoint)

    def finish(self):
        for size in sorted(self.ahead):
            yield f"{self.tree.size} leaves were found, {size} were signed: the end was cut off"


def verify_export(lines, keys, kept=(), log=None):
    """What is wrong with an export, one text after the other; nothing if nothing is.

    `lines` are those of the file with their ends, `keys` 32 bytes each, `kept` Checkpoints.
    """
    yield from verify_exports([lines], keys, kept, log)


def verify_exports(files, keys, kept=(), log=None):
    """The same of several that follow one another."""
    log = log or Log(None, keys, kept)
    begun = False
    for lines in files:
        lines = iter(lines)
        header = header_of(next(lines, b"").removesuffix(b"\n"))
        if header is None:
            yield "it does not begin as an audit export of format 1 or 2"
            return
        origin, names, first, roots = header
        if begun and origin != log.origin:
            yield f"a file is of {origin}"
            return
        before = log.tree.size
        if (begun and first != before) or not log.tree.begin(first, roots):
            yield f"a file begins with leaf {first}, which does not go on from the {before} before"
            return
        log.origin = origin
        for name in filter(None, names.split(b",")):
            key = decode_base64(name.strip(b'"'))
            if key is None or len(key) != 32 or name != b'"' + base64.b64encode(key) + b'"':
                yield "the first line is not written as that of an export is"
            elif key not in keys:
                yield "the first line names a public key that was not given"
        if not begun:
            log.first = first
            if first:
                log.notes.append(f"the leaves before {first} were not given: they are in archives")
            yield from log.begin()
        begun = True
        yield from verify_lines(lines, log)
    yield from log.finish()


def verify_lines(lines, log):
    """What stands behind the first line."""
    ended, whole, begun = False, False, log.tree.size
    for number, line in enumerate(lines, 2):
        if ended:
            yield f"line {number} stands behind the end"
            return
        if not line.endswith(b"\n"):
            yield f"line {number} is cut off"
            continue
        line = line[:-1]
        if found := LEAF.fullmatch(line):
            if int(found[1]) != log.tree.size:
                yield f"leaf {int(found[1])} stands where leaf {log.tree.size} belongs"
            data = decode_base64(found[2])
            if data is None:
                yield f"line {number} holds no leaf"
            else:
                yield from log.leaf(data)
        elif found := END.fullmatch(line):
            ended = True
            if int(found[1]) != log.tree.size:
                yield f"{log.tree.size} leaves were found, {int(found[1])} were exported"
        else:
            try:
                checkpoint = checkpoint_of(line)
            except (ValueError, KeyError, RecursionError):
                yield f"line {number} holds a malformed checkpoint"
                continue
            if checkpoint is None:
                yield f"line {number} is no line of an export"
            else:
                whole = checkpoint
                yield from log.expect(checkpoint)
    if not ended:
        yield "the file ends before its end: it was cut off"
    if log.tree.size > begun and (not whole or whole.size != log.tree.size):
        yield "no checkpoint of the export covers all of its leaves"


def verify_sinks(files, keys, kept=(), log=None):
    """What is wrong with the copies of a sink: leaves may stand twice, and the end is open."""
    log = log or Log(None, keys, kept)
    leaves, checkpoints, torn = {}, [], 0
    for name, lines in files:
        for number, line in enumerate(lines, 1):
            found = LEAF.fullmatch(line.removesuffix(b"\n"))
            data = decode_base64(found[2]) if found else None
            if data is not None:
                if leaves.setdefault(int(found[1]), data) != data:
                    yield f"{name}:{number}: leaf {int(found[1])} stands there twice and differs"
                continue
            try:
                checkpoint = checkpoint_of(line.removesuffix(b"\n"))
            except (ValueError, KeyError, RecursionError):
                checkpoint = None
            if checkpoint is not None:
                checkpoints.append(checkpoint)
            elif header_of(line.removesuffix(b"\n")) or END.fullmatch(line.removesuffix(b"\n")):
                continue
            elif line.startswith(b"{") and not line.endswith((b"}", b"}\n")):
                # A node was killed while it wrote: the whole line follows, or the leaf is missing.
                torn += 1
            else:
                yield f"{name}:{number}: no line of a sink"
    if torn:
        log.notes.append(f"{torn} lines were torn off while they were written: passed over")
    yield from log.begin()
    for checkpoint in {c.signed: c for c in checkpoints}.values():
        yield from log.expect(checkpoint)
    first = min(leaves, default=0)
    if first:
        yield f"the copies begin at leaf {first}: give the older ones, or the archives, as well"
        return
    for index in range(len(leaves)):
        if index not in leaves:
            yield f"leaf {index} is missing"
            return
        yield from log.leaf(leaves[index])
    # What is signed beyond the end has not been copied yet, unless it was kept elsewhere.
    for size in {kept.size for kept in log.kept} & set(log.ahead):
        yield f"{log.tree.size} leaves were found, {size} were signed: the end was cut off"


# ---- The command line ----------------------------------------------------------------------------


def read_key(text):
    key = decode_base64(text.strip())
    if key is None or len(key) != 32:
        with open(text, encoding="ascii") as file:
            key = decode_base64(file.read().strip())
    if key is None or len(key) != 32:
        raise ValueError(f"{text}: no Ed25519 public key in base64")
    return key


def read_checkpoint(path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("{"):
        text = json.loads(text)["note"]
    try:
        return Checkpoint(text)
    except ValueError:
        raise ValueError(f"{path}: not a checkpoint") from None


def main():
    parser = argparse.ArgumentParser(description="Verifies the audit log of a Polykey node.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="the exports in order, or with --sink copies")
    parser.add_argument("--sink", action="store_true", help="the files are the copies of a sink")
    parser.add_argument("--public-key", action="append", required=True, metavar="KEY")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="FILE")
    options = parser.parse_args()
    try:
        keys = [read_key(text) for text in options.public_key]
        kept = [read_checkpoint(path) for path in options.checkpoint]
        log = Log(None, keys, kept)
        files = [(path, open(path, "rb")) for path in options.files]
        found = verify_sinks(files, keys, log=log) if options.sink else verify_exports(
            (lines for _, lines in files), keys, log=log
        )
        bad = 0
        for bad, text in enumerate(found, 1):
            if bad <= 100:
                print(f"finding: {text}")
    except (OSError, ValueError, KeyError) as error:
        print(f"verify-audit: {error}", file=sys.stderr)
        return 2
    for note in log.notes:
        print(f"note: {note}")
    bare = log.tree.size - log.covered
    if bare:
        print(f"note: the last {bare} leaves are not covered by a checkpoint")
    print(f"log: {log.origin}, {log.tree.size} leaves, {log.checkpoints} checkpoints hold")
    if not bad and log.tree.size and not log.covered:
        print("the log is signed by nobody")
        return 1
    print("the log is DAMAGED" if bad else "the log is whole and signed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
