"""What interop.rs asks of Python's `cryptography`: one request in JSON on standard input, one answer on standard output."""

import base64
import hashlib
import json
import sys

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import mldsa, mlkem

request = json.load(sys.stdin)


def get(name):
    return base64.b64decode(request[name])


def spki(key):
    return key.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo)


def generate():
    module = mlkem if request["name"].startswith("MLKEM") else mldsa
    key = getattr(module, request["name"] + "PrivateKey").generate()
    pkcs8 = key.private_bytes(s.Encoding.DER, s.PrivateFormat.PKCS8, s.NoEncryption())
    return {"pkcs8": pkcs8, "spki": spki(key.public_key())}


def encapsulate():
    secret, ciphertext = s.load_der_public_key(get("spki")).encapsulate()
    return {"secret": secret, "ciphertext": ciphertext}


def decapsulate():
    return {"secret": s.load_der_private_key(get("pkcs8"), None).decapsulate(get("ciphertext"))}


def verify():
    private = s.load_der_private_key(get("pkcs8"), None)
    public = s.load_der_public_key(get("spki"))
    try:
        public.verify(get("signature"), get("message"))
        valid = True
    except InvalidSignature:
        valid = False
    return {"valid": valid, "spki": spki(private.public_key()), "signature": private.sign(get("message"))}


def wrap():
    public = s.load_der_public_key(get("spki"))
    raw = public.public_bytes(s.Encoding.Raw, s.PublicFormat.Raw)
    token = get("token")
    info = b"polykey-import-v1" + get("node") + len(token).to_bytes(4, "big") + token + hashlib.sha256(raw).digest()
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    return {"wrapped": suite.encrypt(get("key"), public, info)}


actions = {"generate": generate, "encapsulate": encapsulate, "decapsulate": decapsulate, "verify": verify, "hpke": wrap}
answer = actions[request["do"]]()
json.dump({k: v if isinstance(v, bool) else base64.b64encode(v).decode() for k, v in answer.items()}, sys.stdout)
