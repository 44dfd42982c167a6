"""A client in Python with the published stubs: log in, create a key, rotate it, read it, revoke it.

    examples/client.py 127.0.0.1:50053 .polykey admin

The second argument is a directory with ca.pem, NAME.pem, NAME.key and NAME.api-key, as `polykey dev`
makes it. `pip install grpcio protobuf`, and the stubs unpacked (see tests/python/polykey_stubs.py).
"""

import pathlib
import sys
import uuid

import grpc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "python"))
import polykey_stubs

address, directory, name = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
stubs_at = sys.argv[4] if len(sys.argv) > 4 else ".venv/stubs"
stubs = polykey_stubs.load(stubs_at)
auth, single, types = stubs.auth_pb2, stubs.single_operations_pb2, stubs.key_types_pb2

channel = grpc.secure_channel(
    address,
    grpc.ssl_channel_credentials(
        root_certificates=(directory / "ca.pem").read_bytes(),
        private_key=(directory / f"{name}.key").read_bytes(),
        certificate_chain=(directory / f"{name}.pem").read_bytes(),
    ),
)
service = stubs.service_pb2_grpc.PolykeyServiceStub(channel)

login = service.Authenticate(
    auth.AuthenticateRequest(
        client_id=name, api_key=(directory / f"{name}.api-key").read_text().strip()
    ),
    timeout=10,
)


def call(method, request):
    """A call with the token, and an idempotency key under which it may be sent again."""
    metadata = [
        ("authorization", f"Bearer {login.access_token}"),
        ("idempotency-key", str(uuid.uuid4())),
    ]
    return method(request, metadata=metadata, timeout=30)


created = call(
    service.CreateKey,
    single.CreateKeyRequest(
        key_type=types.KEY_TYPE_AES_256, description="orders", tags={"team": "shop"}
    ),
)
print("created", created.key_id)

rotated = call(
    service.RotateKey,
    single.RotateKeyRequest(
        key_id=created.key_id, strategy=types.ROTATION_STRATEGY_HOT, grace_period_seconds=86400
    ),
)
print("version", rotated.new_version, "follows", rotated.previous_version)

got = call(service.GetKey, single.GetKeyRequest(key_id=created.key_id))
print(len(got.key_material.encrypted_key_data), "bytes,", got.key_material.encryption_algorithm)

call(
    service.RevokeKey,
    single.RevokeKeyRequest(key_id=created.key_id, revocation_reason="the sample is over"),
)
print("revoked")

try:
    call(service.GetKey, single.GetKeyRequest(key_id=created.key_id))
except grpc.RpcError as error:
    print("refused:", error.code().name)
