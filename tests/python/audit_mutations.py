"""Changes an exported audit log in thousands of ways and asks docs/verify-audit.py about each.

    audit_mutations.py VERIFIER EXPORT KEY OLDER NEWER COUNT SEED

OLDER and NEWER are two checkpoints of the log (notes); NEWER covers all of the export and is the one that the verifier
was given to keep. Some changes are careless; in others the attacker knows the format: numbers leaves and bodies
anew, corrects the end, and puts the older checkpoint, which is genuine, in the place of the newer one.
"""

import base64
import collections
import importlib.util
import json
import random
import sys


def load(path):
    spec = importlib.util.spec_from_file_location("verify_audit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rfc8032(verifier):
    """Tests 1 to 3 of RFC 8032 section 7.1, and that one bit more or less is refused."""
    vectors = [
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
            "4a7c15e9716ed28dc027beceea1ec40a",
        ),
    ]
    for vector in vectors:
        key, message, signature = map(bytes.fromhex, vector)
        assert verifier.ed25519_verifies(key, message, signature), vector
        for bit in range(0, 512, 7):
            bad = bytearray(signature)
            bad[bit // 8] ^= 1 << bit % 8
            assert not verifier.ed25519_verifies(key, message, bytes(bad)), (vector, bit)
        # The same signature with s + L, which a sloppy verifier takes.
        s = int.from_bytes(signature[32:], "little") + verifier.ORDER
        assert not verifier.ed25519_verifies(key, message, signature[:32] + s.to_bytes(32, "little"))


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


class Log:
    """An export taken apart, so that an attacker can put it together again."""

    def __init__(self, verifier, raw, older):
        self.verifier = verifier
        lines = raw.splitlines(keepends=True)
        self.raw, self.header, self.last = raw, lines[0], lines[-2]
        self.leaves = [json.loads(line)["data"] for line in lines if line.startswith(b'{"leaf"')]
        self.leaves = [base64.b64decode(data) for data in self.leaves]
        text = json.dumps({"checkpoint": older}, ensure_ascii=False, separators=(",", ":"))
        self.older = (verifier.Checkpoint(older).size, text.encode() + b"\n")
        assert self.last.startswith(b'{"checkpoint"') and lines[-1].startswith(b'{"end"')

    def numbered(self, data, index):
        """A leaf that names another place."""
        salt, body = data[:32], data[32:]
        if body[0] == 8:
            body = body[self.verifier.varint(body, 1)[1] :]
        return salt + (b"\x08" + varint(index) if index else b"") + body

    def write(self, leaves, checkpoints, end=None):
        lines = [self.header]
        for index, data in enumerate(leaves):
            lines.append(b'{"leaf":%d,"data":"%s"}\n' % (index, base64.b64encode(data)))
            if index + 1 == self.older[0] and "older" in checkpoints:
                lines.append(self.older[1])
        if "last" in checkpoints:
            lines.append(self.last)
        lines.append(b'{"end":%d}\n' % (len(leaves) if end is None else end))
        return b"".join(lines)


def flip(random, data):
    data = bytearray(data)
    at = random.randrange(len(data))
    data[at] ^= 1 << random.randrange(8)
    return bytes(data), at


def mutate(random, log):
    """One change: what was done, and the file."""
    leaves, total = list(log.leaves), len(log.leaves)
    signed = random.choice([("last",), ("older", "last"), ("older",), ()])
    anew = random.random() < 0.5
    # One leaf or a run of them, anywhere.
    run = min(total - 1, 1 + int(random.expovariate(0.3)))
    at = random.randrange(total - run + 1)
    kind = random.choice(["edit", "delete", "reorder", "truncate", "insert"])
    what = f"{kind} {run} at {at}, {'anew' if anew else 'as they are'}, signed by {signed}"
    if kind == "edit":
        if anew:
            leaves[at], place = flip(random, leaves[at])
            return f"{what}, byte {place} of the leaf", log.write(leaves, signed)
        raw, place = flip(random, log.raw)
        return f"edit byte {place} of the file", raw
    if kind == "truncate":
        if not anew:
            place = random.randrange(len(log.raw))
            return f"truncate at byte {place}", log.raw[:place]
        keep = log.older[0] if random.random() < 0.3 else random.randrange(total)
        return f"truncate to {keep} leaves, signed by {signed}", log.write(leaves[:keep], signed)
    if kind == "delete":
        del leaves[at : at + run]
    elif kind == "insert":
        copies = leaves[at : at + run]
        place = random.randrange(total + 1)
        leaves[place:place] = copies
        what += f", at {place}"
    else:
        moved = leaves[at : at + run]
        del leaves[at : at + run]
        place = random.choice([i for i in range(len(leaves) + 1) if i != at])
        leaves[place:place] = moved
        what += f", to {place}"
    if anew:
        leaves = [log.numbered(data, index) for index, data in enumerate(leaves)]
    return what, log.write(leaves, signed)


def main():
    verifier, export, key, older, newer, count, seed = sys.argv[1:]
    verifier = load(verifier)
    rfc8032(verifier)
    with open(export, "rb") as file:
        raw = file.read()
    notes = [open(path, encoding="utf-8").read() for path in (older, newer)]
    keys = [base64.b64decode(key)]
    older, newer = map(verifier.Checkpoint, notes)
    log = Log(verifier, raw, notes[0])
    assert older.size < newer.size == len(log.leaves), (older.size, newer.size, len(log.leaves))
    assert log.write(log.leaves, ("last",)) == raw, "the export is not put together as it was"

    def first(raw, kept):
        return next(verifier.verify_export(raw.splitlines(keepends=True), keys, kept), None)

    chance = random.Random(int(seed))
    counted, missed = collections.Counter(), []
    for number in range(int(count)):
        if number % 500 == 0:
            for kept in ([], [older], [newer], [older, newer]):
                assert first(raw, kept) is None, first(raw, kept)
            both = log.write(log.leaves, ("older", "last"))
            assert first(both, [newer]) is None
        what, changed = mutate(chance, log)
        assert changed != raw, what
        counted[what.split(" ", 1)[0]] += 1
        if first(changed, [newer]) is None:
            missed.append(what)
    print(f"{sum(counted.values())} mutations of {len(log.leaves)} leaves: {dict(counted)}")
    for what in missed[:10]:
        print(f"NOT DETECTED: {what}")
    print(f"{len(missed)} not detected")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
