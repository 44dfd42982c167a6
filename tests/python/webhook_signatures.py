"""Verifies messages of webhooks as a receiver would, by the standard library alone.

Reads JSON lines: secret, id, timestamp, signature, body (base64). Says what is wrong, and ends with 1.
The scheme is that of Standard Webhooks 1.0.0.
"""

import base64
import hashlib
import hmac
import json
import sys
import time

count = 0
for line in sys.stdin:
    message = json.loads(line)
    secret = message["secret"]
    if secret.startswith("whsec_"):
        key = base64.b64decode(secret[len("whsec_") :])
    else:
        key = secret.encode()
    body = base64.b64decode(message["body"])
    signed = f"{message['id']}.{message['timestamp']}.".encode() + body
    mac = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    valid = [s for s in message["signature"].split(" ") if hmac.compare_digest(s, f"v1,{mac}")]
    if not valid:
        sys.exit(f"{message['id']}: the signature is not that of the body")
    if abs(time.time() - int(message["timestamp"])) > 300:
        sys.exit(f"{message['id']}: the timestamp is not of now")
    count += 1
print(count)
