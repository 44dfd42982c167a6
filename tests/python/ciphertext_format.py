"""An independent reader of Polykey's ciphertexts, after docs/ciphertext-format.md alone.

Usage: python ciphertext_format.py VECTORS.json. Reads each vector, and exits with 1 unless each opens, or does not,
as it says. Nothing here comes from Polykey; the ciphers and the key derivation are those of PyPI `cryptography`.
"""

import base64
import hashlib
import hmac
import json
import pathlib
import re
import struct
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

# Code: name, length of the key, cipher.
CIPHERS = {
    1: ("aes-256", 32, AESGCMSIV),
    16: ("aes-128", 16, AESGCMSIV),
    17: ("aes-256-gcm", 32, AESGCM),
    18: ("aes-128-gcm", 16, AESGCM),
    19: ("chacha20-poly1305", 32, ChaCha20Poly1305),
}
# What `cryptography` lacks: counted as skipped.
ELSEWHERE = {"xchacha20-poly1305"}
TAG = 16


class Refused(Exception):
    """It is not what was sealed under this key for this place."""


def join(*parts):
    """Each part after its length as a u64, big-endian."""
    return b"".join(struct.pack(">Q", len(part)) + part for part in parts)


def canonical(context):
    """A context as it is bound: pairs in the order of their names' UTF-8 bytes."""
    pairs = sorted((name.encode(), value.encode()) for name, value in context.items())
    return join(*(part for pair in pairs for part in pair))


def from_text(text):
    """The bytes of the printable form, which has one spelling."""
    if not re.fullmatch(r"polykey:c1:[A-Za-z0-9_-]*", text):
        raise Refused("not the printable form")
    body = text.removeprefix("polykey:c1:")
    blob = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    if base64.urlsafe_b64encode(blob).rstrip(b"=").decode() != body:
        raise Refused("not the printable form")
    return blob


def derive(label, key, code, header, salt, commitment, context, aad):
    """The cipher of one message or stream, once the commitment has been checked."""
    _, length, cipher = CIPHERS[code]
    bound = hashlib.sha256(join(canonical(context), aad)).digest()
    info = join(label, header, bound)
    okm = HKDF(algorithm=SHA256(), length=length + 32, salt=salt, info=info).derive(key)
    if not hmac.compare_digest(okm[length:], commitment):
        raise Refused("commitment")
    return cipher(okm[:length])


def unseal(cipher, counter, last, sealed):
    """One chunk; the nonce is seven zeros, its number, and whether it is the last."""
    if len(sealed) < TAG:
        raise Refused("cut off")
    try:
        return cipher.decrypt(struct.pack(">7xIB", counter, last), sealed, None)
    except InvalidTag:
        raise Refused("tag") from None


def open_ciphertext(blob, algorithm, key, key_id, version, context, aad):
    """The plaintext of a message or of a whole stream."""
    code = next(code for code, (name, _, _) in CIPHERS.items() if name == algorithm)
    place = struct.pack(">16sIH", key_id, version, code)
    if blob[:26] == b"PKC\x01" + place:
        header, rest, label, chunk = blob[:26], blob[26:], b"polykey/message/v1", None
    elif blob[:26] == b"PKS\x01" + place and len(blob) > 26 and 12 <= blob[26] <= 22:
        header, rest, label, chunk = blob[:27], blob[27:], b"polykey/stream/v1", 1 << blob[26]
    else:
        raise Refused("header")
    salt, commitment, sealed = rest[:32], rest[32:64], rest[64:]
    cipher = derive(label, key, code, header, salt, commitment, context, aad)
    if chunk is None:
        return unseal(cipher, 0, 0, sealed)
    chunks = [sealed[at:at + chunk + TAG] for at in range(0, len(sealed), chunk + TAG)]
    if not chunks or (len(chunks) > 1 and len(chunks[-1]) <= TAG):
        raise Refused("cut off, or an empty chunk at the end")
    last = len(chunks) - 1
    return b"".join(unseal(cipher, n, n == last, c) for n, c in enumerate(chunks))


def convergent_salt(blob, key, context, aad, plaintext):
    """The salt of a convergent message."""
    prf = HKDF(algorithm=SHA256(), length=32, salt=None, info=join(b"polykey/convergent/v1")).derive(key)
    bound = hashlib.sha256(join(canonical(context), aad)).digest()
    return hmac.digest(prf, join(blob[:26], bound, plaintext), "sha256")


def check(vector):
    """Fails unless the vector does as it says; whether it was read at all."""
    if vector["algorithm"] in ELSEWHERE:
        return False
    key, aad = bytes.fromhex(vector["key"]), bytes.fromhex(vector["aad"])
    blob = from_text(vector["ciphertext"])
    try:
        plaintext = open_ciphertext(blob, vector["algorithm"], key, bytes.fromhex(vector["key_id"]),
                                    vector["version"], vector["context"], aad)
    except Refused as refusal:
        assert not vector["opens"], f"{vector['name']}: refused: {refusal}"
        return True
    assert vector["opens"], f"{vector['name']}: opened"
    assert plaintext.hex() == vector["plaintext"], f"{vector['name']}: another plaintext"
    if "convergent" in vector["name"]:
        salt = convergent_salt(blob, key, vector["context"], aad, plaintext)
        assert blob[26:58] == salt, f"{vector['name']}: another salt"
    return True


def main():
    """Checks the file that is named."""
    vectors = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))["vectors"]
    read = sum(check(vector) for vector in vectors)
    print(f"{read} vectors do as they say, {len(vectors) - read} skipped, of {len(vectors)}")


if __name__ == "__main__":
    main()
