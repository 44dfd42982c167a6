"""All 23 RPCs of `PolykeyService` through the published Python stubs, against a running server.

Usage: python conformance.py SETTINGS.json, where SETTINGS names `stubs`, `address`, `ca`, and for
`admin` and `user` each `id`, `api_key`, `certificate`, `key`. Prints one line per check group and exits
with 1 at the first answer that is not as the contract says.
"""

import datetime
import json
import pathlib
import sys
import uuid

import grpc
from google.protobuf import empty_pb2, timestamp_pb2

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import polykey_stubs

SETTINGS = json.loads(pathlib.Path(sys.argv[1]).read_text())
S = polykey_stubs.load(SETTINGS["stubs"])
ONE, BATCH, STREAM = S.single_operations_pb2, S.batch_operations_pb2, S.stream_operations_pb2
TYPES, AUTH = S.key_types_pb2, S.auth_pb2
NIL = "00000000-0000-0000-0000-000000000000"
SEEN = set()


def timestamp(seconds):
    """Now and so many seconds, as a protobuf timestamp."""
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds))
    return stamp


class Client:
    """A channel with a client certificate, and the token of a login."""

    def __init__(self, who):
        read = lambda path: pathlib.Path(path).read_bytes()
        credentials = grpc.ssl_channel_credentials(
            read(SETTINGS["ca"]), read(who["key"]), read(who["certificate"]))
        self.id, self.api_key, self.token = who["id"], who["api_key"], None
        self.stub = S.service_pb2_grpc.PolykeyServiceStub(
            grpc.secure_channel(SETTINGS["address"], credentials))

    def metadata(self, extra):
        token = [("authorization", f"Bearer {self.token}")] if self.token else []
        return token + list((extra or {}).items())

    def __call__(self, name, request, extra=None):
        """Calls a unary method; the reply and its headers and trailers."""
        SEEN.add(name)
        reply, call = getattr(self.stub, name).with_call(request, metadata=self.metadata(extra), timeout=60)
        found = dict(call.initial_metadata() or ())
        found.update(call.trailing_metadata() or ())
        return reply, found

    def stream(self, name, requests, extra=None):
        """Calls a streaming method and drains it; the replies, and headers and trailers."""
        SEEN.add(name)
        call = getattr(self.stub, name)(requests, metadata=self.metadata(extra), timeout=60)
        replies = list(call)
        found = dict(call.initial_metadata() or ())
        found.update(call.trailing_metadata() or ())
        return replies, found

    def refused(self, code, name, request, extra=None):
        """Calls a method that must fail with `code`; the error."""
        try:
            if name.startswith("Stream"):
                self.stream(name, request, extra)
            else:
                self(name, request, extra)
        except grpc.RpcError as error:
            assert error.code() == code, f"{name}: {error.code()} {error.details()}, not {code}"
            trailers = dict(error.trailing_metadata() or ())
            headers = dict(error.initial_metadata() or ())
            assert "polykey-request-id" in {**headers, **trailers}, f"{name}: an error without a request id"
            return error
        raise AssertionError(f"{name} succeeded, not {code}")

    def login(self):
        reply, found = self("Authenticate", AUTH.AuthenticateRequest(client_id=self.id, api_key=self.api_key))
        self.token = reply.access_token
        return reply, found

    def create(self, **fields):
        fields.setdefault("key_type", TYPES.KEY_TYPE_AES_256)
        return self("CreateKey", ONE.CreateKeyRequest(**fields))[0]

    def get(self, key_id, **fields):
        return self("GetKey", ONE.GetKeyRequest(key_id=key_id, **fields))[0]

    def about(self, key_id, **fields):
        return self("GetKeyMetadata", ONE.GetKeyMetadataRequest(key_id=key_id, **fields))[0]


def same(actual, expected, what):
    assert actual == expected, f"{what}: {actual!r}, not {expected!r}"


def counts(reply, good, bad, what):
    same((reply.successful_count, reply.failed_count), (good, bad), f"{what}: counts")
    same(len(reply.results), good + bad, f"{what}: results")
    assert reply.response_timestamp.seconds > 0, f"{what}: no timestamp"


def outcomes(results):
    return [r.WhichOneof("result") == "success" for r in results]


def health(admin, user):
    anonymous = Client(SETTINGS["user"])
    reply, found = anonymous("HealthCheck", empty_pb2.Empty())
    same(reply.status, S.metrics_pb2.HEALTH_STATUS_HEALTHY, "status")
    assert reply.service_version and reply.timestamp.seconds, reply
    assert reply.metrics.uptime_since.seconds > 0
    assert 0 <= reply.metrics.cpu_usage_percent <= 100 and 0 < reply.metrics.memory_usage_percent <= 100
    before = reply.metrics.active_keys_count
    admin.create()
    after = anonymous("HealthCheck", empty_pb2.Empty())[0].metrics
    same(after.active_keys_count, before + 1, "active keys")
    assert after.total_requests_handled > reply.metrics.total_requests_handled
    assert found["polykey-request-id"], "no request id"
    _, found = anonymous("HealthCheck", empty_pb2.Empty(), {"polykey-request-id": "my-own.id:1"})
    same(found["polykey-request-id"], "my-own.id:1", "echoed request id")


def tokens(admin, user):
    reply, found = user.login()
    same(reply.token_type, "Bearer", "token type")
    same(reply.expires_in, 900, "expires_in")
    same(reply.client_tier, S.tier.CLIENT_TIER_PRO, "tier")
    assert "keys:create" in reply.permissions and list(reply.permissions) == sorted(reply.permissions)
    assert reply.access_token.startswith("v4.public."), "not a PASETO v4.public"
    refresh = found["polykey-refresh-token"]
    again, found = user("RefreshToken", AUTH.RefreshTokenRequest(refresh_token=refresh))
    assert again.access_token != reply.access_token and again.issued_at.seconds
    assert found["polykey-refresh-token"] not in ("", refresh)
    bad = grpc.StatusCode.UNAUTHENTICATED
    texts = {
        user.refused(bad, "Authenticate", AUTH.AuthenticateRequest(client_id=c, api_key=k, grant_type=g)).details()
        for c, k, g in [
            (user.id, "wrong", ""), ("nobody", user.api_key, ""), (user.id, "wrong", "api_key"),
            (admin.id, admin.api_key, ""), (admin.id, "", "mtls"),
        ]
    }
    same(len(texts), 1, f"texts of refused logins {texts}")
    user.refused(bad, "RefreshToken", AUTH.RefreshTokenRequest(refresh_token="v4.public.x"))
    user.refused(grpc.StatusCode.INVALID_ARGUMENT, "Authenticate", AUTH.AuthenticateRequest(grant_type="password"))
    # By the certificate alone.
    assert user("Authenticate", AUTH.AuthenticateRequest(client_id=user.id, grant_type="mtls"))[0].access_token
    # Revocation: genuine tokens only, and at once.
    doomed = again.access_token
    reply, _ = user("RevokeToken", AUTH.RevokeTokenRequest(access_token=doomed, client_id=user.id))
    assert reply.revoked and reply.revoked_at.seconds
    keep, user.token = user.token, doomed
    user.refused(bad, "ListKeys", ONE.ListKeysRequest())
    user.token = keep
    forged = doomed[:-4] + ("AAAA" if not doomed.endswith("AAAA") else "BBBB")
    try:
        reply, _ = user("RevokeToken", AUTH.RevokeTokenRequest(access_token=forged))
        assert not reply.revoked, "a forged token was revoked"
    except grpc.RpcError as error:
        assert error.code() in (bad, grpc.StatusCode.INVALID_ARGUMENT), error.code()
    user.token = None
    user.refused(bad, "ListKeys", ONE.ListKeysRequest())
    user.login()


def create_and_get(admin, user):
    made = user.create(
        description="orders", tags={"team": "shop", "env": "test"}, expires_at=timestamp(3600),
        initial_authorized_contexts=["billing"], data_classification="secret")
    m = made.metadata
    same(uuid.UUID(made.key_id).version, 7, "version of the id")
    same((m.key_id, m.version, m.key_type), (made.key_id, 1, TYPES.KEY_TYPE_AES_256), "metadata")
    same((m.status, m.creator_identity, m.description), (TYPES.KEY_STATUS_ACTIVE, user.id, "orders"), "metadata")
    same((dict(m.tags), list(m.authorized_contexts)), ({"team": "shop", "env": "test"}, ["billing"]), "metadata")
    same((m.data_classification, m.storage_type), ("secret", TYPES.STORAGE_PROFILE_STANDARD), "metadata")
    assert m.metadata_checksum and m.created_at.seconds and m.expires_at.seconds
    assert made.key_material.encrypted_key_data and made.key_material.key_checksum
    got = user.get(made.key_id)
    same(got.key_material.key_checksum, made.key_material.key_checksum, "checksum")
    assert got.authorization_decision_id and got.response_timestamp.seconds and got.metadata.key_id
    assert not user.get(made.key_id, skip_metadata=True).HasField("metadata"), "skip_metadata"
    same(user.get(made.key_id.upper()).metadata.key_id, made.key_id, "upper case")
    for type_ in (TYPES.KEY_TYPE_API_KEY, TYPES.KEY_TYPE_ECDSA_P384):
        same(user.create(key_type=type_).metadata.key_type, type_, "type")
    missing = grpc.StatusCode.NOT_FOUND
    for key_id in (NIL, str(uuid.uuid4()), "alias/none"):
        for who in (admin, user):
            who.refused(missing, "GetKey", ONE.GetKeyRequest(key_id=key_id))
    user.refused(grpc.StatusCode.INVALID_ARGUMENT, "GetKey", ONE.GetKeyRequest(key_id="nonsense"))
    user.refused(grpc.StatusCode.FAILED_PRECONDITION, "GetKey", ONE.GetKeyRequest(key_id=made.key_id, version=2))
    user.refused(grpc.StatusCode.INVALID_ARGUMENT, "CreateKey", ONE.CreateKeyRequest())
    user.refused(grpc.StatusCode.INVALID_ARGUMENT, "CreateKey", ONE.CreateKeyRequest(
        key_type=TYPES.KEY_TYPE_AES_256, expires_at=timestamp(-10)))
    hidden = admin.create()
    user.refused(missing, "GetKey", ONE.GetKeyRequest(key_id=hidden.key_id))
    # Claims never grant, and are refused when they contradict.
    claims = S.common_pb2.RequesterContext
    denied = grpc.StatusCode.PERMISSION_DENIED
    user.refused(denied, "GetKey", ONE.GetKeyRequest(
        key_id=made.key_id, requester_context=claims(client_identity=admin.id)))
    user.refused(denied, "GetKey", ONE.GetKeyRequest(
        key_id=made.key_id, requester_context=claims(client_tier=S.tier.CLIENT_TIER_ENTERPRISE)))
    user.get(made.key_id, requester_context=claims(client_identity=user.id, correlation_id="c-1"))


def rotate(admin, user):
    key = user.create().key_id
    first = user.get(key).key_material.key_checksum
    hot, found = user("RotateKey", ONE.RotateKeyRequest(
        key_id=key, strategy=TYPES.ROTATION_STRATEGY_HOT, grace_period_seconds=600))
    same((hot.key_id, hot.new_version, hot.previous_version), (key, 2, 1), "versions")
    same(hot.old_version_expires_at.seconds - hot.rotation_timestamp.seconds, 600, "grace")
    assert hot.new_key_material.key_checksum != first
    assert found["polykey-revision"].isdigit(), found
    same(user.get(key).metadata.version, 2, "primary")
    old = user.get(key, version=1)
    same((old.metadata.status, old.key_material.key_checksum), (TYPES.KEY_STATUS_DEPRECATED, first), "old version")
    staged, _ = user("RotateKey", ONE.RotateKeyRequest(key_id=key, strategy=TYPES.ROTATION_STRATEGY_STAGED))
    same((staged.new_version, staged.previous_version), (3, 2), "staged")
    same(user.get(key).metadata.version, 2, "primary while staged")
    same(user.about(key, version=3).metadata.status, TYPES.KEY_STATUS_ROTATING, "staged version")
    user("RotateKey", ONE.RotateKeyRequest(key_id=key, strategy=TYPES.ROTATION_STRATEGY_STAGED))
    same(user.get(key).metadata.version, 3, "primary after the second call")
    user("RotateKey", ONE.RotateKeyRequest(
        key_id=key, strategy=TYPES.ROTATION_STRATEGY_SCHEDULED, generation_params={"rotation_period_seconds": "86400"}))
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    user.refused(invalid, "RotateKey", ONE.RotateKeyRequest(key_id=key, grace_period_seconds=-1))
    user.refused(invalid, "RotateKey", ONE.RotateKeyRequest(key_id=key, strategy=9))


def update_and_metadata(admin, user):
    key = user.create(tags={"a": "1", "b": "2"}).key_id
    revision = user("RotateKey", ONE.RotateKeyRequest(key_id=key))[1]["polykey-revision"]
    checksum = user.about(key).metadata.metadata_checksum
    _, found = user("UpdateKeyMetadata", ONE.UpdateKeyMetadataRequest(
        key_id=key, description="new", tags_to_add={"c": "3"}, tags_to_remove=["a"], contexts_to_add=["x", "y"],
        policies_to_update={"never-from-nowhere": 'permit (principal, action, resource == ?resource);'},
        data_classification="internal", expires_at=timestamp(7200)), {"polykey-expected-revision": revision})
    assert int(found["polykey-revision"]) > int(revision)
    about = user.about(key, include_access_history=True, include_policy_details=True)
    m = about.metadata
    same((m.description, dict(m.tags)), ("new", {"b": "2", "c": "3"}), "update")
    same((list(m.authorized_contexts), list(m.access_policies)), (["x", "y"], ["never-from-nowhere"]), "update")
    assert m.metadata_checksum != checksum and m.updated_at.seconds >= m.created_at.seconds
    assert {d.policy_type for d in about.policy_details.values()} <= {"RBAC", "ABAC", "TimeBased"}
    assert any("text" in d.policy_params for d in about.policy_details.values()), about.policy_details
    assert {h.client_identity for h in about.access_history} == {user.id} and all(
        h.success for h in about.access_history), about.access_history
    aborted = grpc.StatusCode.ABORTED
    user.refused(aborted, "UpdateKeyMetadata", ONE.UpdateKeyMetadataRequest(key_id=key, description="late"),
                 {"polykey-expected-revision": revision})
    user.refused(aborted, "RotateKey", ONE.RotateKeyRequest(key_id=key), {"polykey-expected-revision": revision})
    same(user.about(key).metadata.description, "new", "after a conflict")
    user("UpdateKeyMetadata", ONE.UpdateKeyMetadataRequest(key_id=key, contexts_to_remove=["x"]))
    same(list(user.about(key).metadata.authorized_contexts), ["y"], "contexts")


def revoke(admin, user):
    key = user.create().key_id
    user("RevokeKey", ONE.RevokeKeyRequest(key_id=key, revocation_reason="leaked", immediate=True))
    state = grpc.StatusCode.FAILED_PRECONDITION
    same(user.about(key).metadata.status, TYPES.KEY_STATUS_REVOKED, "status")
    for name, request in [
        ("GetKey", ONE.GetKeyRequest(key_id=key)), ("RotateKey", ONE.RotateKeyRequest(key_id=key)),
        ("UpdateKeyMetadata", ONE.UpdateKeyMetadataRequest(key_id=key, description="x")),
    ]:
        user.refused(state, name, request)
    later = user.create().key_id
    user("RevokeKey", ONE.RevokeKeyRequest(key_id=later, effective_at=timestamp(3600)))
    user.get(later)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    user.refused(invalid, "RevokeKey", ONE.RevokeKeyRequest(key_id=later, immediate=True, effective_at=timestamp(9)))
    user("RevokeKey", ONE.RevokeKeyRequest(key_id=later))
    user.refused(state, "GetKey", ONE.GetKeyRequest(key_id=later))


def listing(admin, user):
    start = len(all_keys(user))
    ids = [user.create(tags={"set": "list", "n": str(i)}).key_id for i in range(7)]
    api = user.create(key_type=TYPES.KEY_TYPE_API_KEY, tags={"set": "list"}).key_id
    user("RevokeKey", ONE.RevokeKeyRequest(key_id=ids[3], immediate=True))
    page, pages = None, []
    while page is None or page.next_page_token:
        page, _ = user("ListKeys", ONE.ListKeysRequest(
            page_size=3, tag_filters={"set": "list"}, page_token=page.next_page_token if page else ""))
        same((page.total_count, page.filtered_count), (start + 8, 8), "counts")
        assert len(page.keys) <= 3
        pages += [k.key_id for k in page.keys]
    same(pages, ids + [api], "pages in order of creation")
    pick = lambda **f: [k.key_id for k in user("ListKeys", ONE.ListKeysRequest(tag_filters={"set": "list"}, **f))[0].keys]
    same(pick(key_types=[TYPES.KEY_TYPE_API_KEY]), [api], "by type")
    same(pick(statuses=[TYPES.KEY_STATUS_REVOKED]), [ids[3]], "by status")
    same(pick(created_after=timestamp(60)), [], "created_after")
    same(pick(created_before=timestamp(60)), ids + [api], "created_before")
    same(pick(key_types=[TYPES.KEY_TYPE_AES_256], statuses=[TYPES.KEY_STATUS_ACTIVE]),
         [i for i in ids if i != ids[3]], "filters combine")
    one = user("ListKeys", ONE.ListKeysRequest(tag_filters={"set": "list", "n": "5"}))[0]
    same([k.key_id for k in one.keys], [ids[5]], "by two tags")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for bad in (dict(page_size=-1), dict(page_size=1001), dict(page_token="x"), dict(statuses=[0]), dict(key_types=[77])):
        user.refused(invalid, "ListKeys", ONE.ListKeysRequest(**bad))
    token = user("ListKeys", ONE.ListKeysRequest(page_size=1))[0].next_page_token
    admin.refused(invalid, "ListKeys", ONE.ListKeysRequest(page_size=1, page_token=token))
    assert not set(all_keys(user)) & {admin.create().key_id}, "another's key is listed"


def all_keys(client):
    ids, token = [], ""
    while True:
        page, _ = client("ListKeys", ONE.ListKeysRequest(page_size=1000, page_token=token))
        ids += [k.key_id for k in page.keys]
        token = page.next_page_token
        if not token:
            return ids


def batches(admin, user):
    bad = BATCH.CreateKeyItem(key_type=TYPES.KEY_TYPE_AES_256, data_classification="wrong")
    good = lambda n: BATCH.CreateKeyItem(key_type=TYPES.KEY_TYPE_AES_256, description=str(n))
    create = lambda items, **f: user("BatchCreateKeys", BATCH.BatchCreateKeysRequest(keys=items, **f))[0]
    reply = create([good(0), bad, good(2)], continue_on_error=True)
    counts(reply, 2, 1, "create, continue")
    same([r.request_index for r in reply.results], [0, 1, 2], "indices")
    same(outcomes(reply.results), [True, False, True], "create, continue")
    same([r.success.metadata.description for r in reply.results], ["0", "", "2"], "order")
    reply = create([good(0), bad, good(2)])
    counts(reply, 1, 2, "create, stop")
    same(outcomes(reply.results), [True, False, False], "create, stop")
    assert reply.results[1].error != reply.results[2].error, "what was not tried reads like what failed"
    before = len(all_keys(user))
    reply = create([good(0), bad, good(2)], atomic=True)
    counts(reply, 0, 3, "create, atomic")
    same(len(all_keys(user)), before, "keys after an atomic failure")
    counts(create([good(0), good(1)], atomic=True), 2, 0, "create, atomic")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for items, flags in [
        ([good(0)], dict(atomic=True, continue_on_error=True)), ([], {}), ([good(0)] * 1001, {}),
    ]:
        user.refused(invalid, "BatchCreateKeys", BATCH.BatchCreateKeysRequest(keys=items, **flags))

    a, b, c = (user.create().key_id for _ in range(3))
    hidden = admin.create().key_id
    reply, _ = user("BatchGetKeys", BATCH.BatchGetKeysRequest(continue_on_error=True, keys=[
        BATCH.KeyRequestItem(key_id=k) for k in (a, hidden, b, a, NIL)]))
    counts(reply, 3, 2, "get")
    same([r.key_id for r in reply.results], [a, hidden, b, a, NIL], "order")
    same(outcomes(reply.results), [True, False, True, True, False], "get")
    same(reply.results[1].error, reply.results[4].error, "hidden and missing")
    reply, _ = user("BatchGetKeys", BATCH.BatchGetKeysRequest(keys=[
        BATCH.KeyRequestItem(key_id=a, skip_metadata=True), BATCH.KeyRequestItem(key_id=NIL), BATCH.KeyRequestItem(key_id=b)]))
    same(outcomes(reply.results), [True, False, False], "get, stop")
    assert not reply.results[0].success.HasField("metadata")

    reply, _ = user("BatchRotateKeys", BATCH.BatchRotateKeysRequest(continue_on_error=True, keys=[
        BATCH.RotateKeyItem(key_id=a), BATCH.RotateKeyItem(key_id=NIL), BATCH.RotateKeyItem(key_id=b, grace_period_seconds=60)]))
    counts(reply, 2, 1, "rotate")
    same([(r.key_id, r.success.new_version) for r in reply.results], [(a, 2), (NIL, 0), (b, 2)], "rotate")
    reply, _ = user("BatchRotateKeys", BATCH.BatchRotateKeysRequest(atomic=True, keys=[
        BATCH.RotateKeyItem(key_id=a), BATCH.RotateKeyItem(key_id=NIL)]))
    counts(reply, 0, 2, "rotate, atomic")
    same(user.get(a).metadata.version, 2, "after an atomic failure")

    reply, _ = user("BatchUpdateKeyMetadata", BATCH.BatchUpdateKeyMetadataRequest(continue_on_error=True, keys=[
        BATCH.UpdateKeyMetadataItem(key_id=a, description="A"), BATCH.UpdateKeyMetadataItem(key_id=hidden, description="H"),
        BATCH.UpdateKeyMetadataItem(key_id=b, tags_to_add={"t": "B"})]))
    counts(reply, 2, 1, "update")
    same([r.key_id for r in reply.results], [a, hidden, b], "update")
    same([r.success for r in reply.results], [True, False, True], "update")
    reply, _ = user("BatchGetKeyMetadata", BATCH.BatchGetKeyMetadataRequest(continue_on_error=True, keys=[
        BATCH.GetKeyMetadataItem(key_id=b, include_access_history=True), BATCH.GetKeyMetadataItem(key_id=hidden),
        BATCH.GetKeyMetadataItem(key_id=a, include_policy_details=True)]))
    counts(reply, 2, 1, "metadata")
    same(reply.results[2].success.metadata.description, "A", "metadata")
    same(dict(reply.results[0].success.metadata.tags), {"t": "B"}, "metadata")
    assert reply.results[0].success.access_history and reply.results[2].success.policy_details

    reply, _ = user("BatchRevokeKeys", BATCH.BatchRevokeKeysRequest(atomic=True, keys=[
        BATCH.RevokeKeyItem(key_id=c, immediate=True), BATCH.RevokeKeyItem(key_id=NIL, immediate=True)]))
    counts(reply, 0, 2, "revoke, atomic")
    user.get(c)
    reply, _ = user("BatchRevokeKeys", BATCH.BatchRevokeKeysRequest(continue_on_error=True, keys=[
        BATCH.RevokeKeyItem(key_id=c, immediate=True), BATCH.RevokeKeyItem(key_id=NIL, immediate=True)]))
    counts(reply, 1, 1, "revoke")
    same([(r.key_id, r.success) for r in reply.results], [(c, True), (NIL, False)], "revoke")
    user.refused(grpc.StatusCode.FAILED_PRECONDITION, "GetKey", ONE.GetKeyRequest(key_id=c))


def streams(admin, user):
    wrap = lambda kind, requests: iter([kind(request=r) for r in requests])
    made, found = user.stream("StreamCreateKeys", wrap(STREAM.StreamCreateKeysRequest, [
        ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_AES_256, description="0"), ONE.CreateKeyRequest(),
        ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_AES_256, description="2")]))
    same([r.request_sequence for r in made], [1, 2, 3], "sequence")
    same(outcomes(made), [True, False, True], "create")
    assert found["polykey-request-id"]
    a, b = made[0].success.key_id, made[2].success.key_id
    hidden = admin.create().key_id
    rotated, _ = user.stream("StreamRotateKeys", wrap(STREAM.StreamRotateKeysRequest, [
        ONE.RotateKeyRequest(key_id=k) for k in (a, hidden, a)]))
    same([(r.key_id, r.success.new_version) for r in rotated], [(a, 2), (hidden, 0), (a, 3)], "rotate")
    got, _ = user.stream("StreamGetKeys", STREAM.StreamGetKeysRequest(key_id=a))
    same([(r.sequence_number, r.success.metadata.version) for r in got], [(1, 1), (2, 2), (3, 3)], "every version")
    got, _ = user.stream("StreamGetKeys", STREAM.StreamGetKeysRequest(key_id=a, version=2, skip_metadata=True))
    same(len(got), 1, "one version")
    assert not got[0].success.HasField("metadata") and got[0].success.key_material.encrypted_key_data
    try:
        got, _ = user.stream("StreamGetKeys", STREAM.StreamGetKeysRequest(key_id=hidden))
        same(outcomes(got), [False], "another's key")
    except grpc.RpcError as error:
        same(error.code(), grpc.StatusCode.NOT_FOUND, "another's key")
    updated, _ = user.stream("StreamUpdateKeyMetadata", wrap(STREAM.StreamUpdateKeyMetadataRequest, [
        ONE.UpdateKeyMetadataRequest(key_id=k, description="stream") for k in (b, NIL)]))
    same([(r.key_id, r.success) for r in updated], [(b, True), (NIL, False)], "update")
    about, _ = user.stream("StreamGetKeyMetadata", wrap(STREAM.StreamGetKeyMetadataRequest, [
        ONE.GetKeyMetadataRequest(key_id=k) for k in (b, NIL, a)]))
    same([(r.key_id, r.success.metadata.description) for r in about], [(b, "stream"), (NIL, ""), (a, "0")], "metadata")
    revoked, _ = user.stream("StreamRevokeKeys", wrap(STREAM.StreamRevokeKeysRequest, [
        ONE.RevokeKeyRequest(key_id=k, immediate=True) for k in (a, NIL, a)]))
    same([(r.key_id, r.success) for r in revoked][:2], [(a, True), (NIL, False)], "revoke")
    got, _ = user.stream("StreamGetKeyMetadata", wrap(STREAM.StreamGetKeyMetadataRequest, [
        ONE.GetKeyMetadataRequest(key_id=a)]))
    same(got[0].success.metadata.status, TYPES.KEY_STATUS_REVOKED, "revoked")


def idempotency(admin, user):
    extra = {"idempotency-key": f"create-{uuid.uuid4()}"}
    request = ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_AES_256, description="once")
    first, second = (user("CreateKey", request, extra)[0] for _ in range(2))
    same(first.key_id, second.key_id, "the same key")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    user.refused(invalid, "CreateKey", ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_AES_256, description="two"), extra)
    assert admin("CreateKey", request, extra)[0].key_id != first.key_id, "shared between clients"
    extra = {"idempotency-key": f"rotate-{uuid.uuid4()}"}
    rotate = ONE.RotateKeyRequest(key_id=first.key_id)
    same([user("RotateKey", rotate, extra)[0].new_version for _ in range(3)], [2, 2, 2], "rotation once")
    extra = {"idempotency-key": f"batch-{uuid.uuid4()}"}
    items = [BATCH.CreateKeyItem(key_type=TYPES.KEY_TYPE_AES_256) for _ in range(3)]
    batch = BATCH.BatchCreateKeysRequest(keys=items)
    one, two = (user("BatchCreateKeys", batch, extra)[0] for _ in range(2))
    same([r.success.key_id for r in one.results], [r.success.key_id for r in two.results], "batch once")
    for bad in ("", "x" * 129):
        user.refused(invalid, "CreateKey", request, {"idempotency-key": bad})


def twins(admin, user):
    secret = b"sk_live_" + uuid.uuid4().bytes
    name = f"twin-{uuid.uuid4()}"
    made, found = user("CreateKey", ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_API_KEY),
                       {"polykey-value-bin": secret, "polykey-alias": name})
    assert found["polykey-revision"].isdigit()
    assert secret not in made.SerializeToString()
    got, found = user("GetKey", ONE.GetKeyRequest(key_id=f"alias/{name}"), {"polykey-export": "plain"})
    same(got.metadata.key_id, made.key_id, "by alias")
    same(found["polykey-plaintext-bin"], secret, "plaintext")
    _, found = user("GetKey", ONE.GetKeyRequest(key_id=made.key_id))
    assert "polykey-plaintext-bin" not in found
    closed, _ = user("CreateKey", ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_API_KEY), {"polykey-exportable": "false"})
    state = grpc.StatusCode.FAILED_PRECONDITION
    user.refused(state, "GetKey", ONE.GetKeyRequest(key_id=closed.key_id), {"polykey-export": "plain"})
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    user.refused(invalid, "GetKey", ONE.GetKeyRequest(key_id=made.key_id), {"polykey-export": "yes"})
    user.refused(invalid, "GetKey", ONE.GetKeyRequest(key_id=made.key_id), {"polykey-export": "hpke"})
    user.refused(invalid, "RotateKey", ONE.RotateKeyRequest(key_id=made.key_id), {"polykey-expected-revision": "-1"})
    user.refused(invalid, "CreateKey", ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_AES_256), {"polykey-value-bin": secret})
    fresh = secret[::-1]
    user("RotateKey", ONE.RotateKeyRequest(key_id=made.key_id), {"polykey-value-bin": fresh})
    _, found = user("GetKey", ONE.GetKeyRequest(key_id=made.key_id), {"polykey-export": "plain"})
    same(found["polykey-plaintext-bin"], fresh, "rotated value")
    taken = grpc.StatusCode.ALREADY_EXISTS
    user.refused(taken, "CreateKey", ONE.CreateKeyRequest(key_type=TYPES.KEY_TYPE_AES_256), {"polykey-alias": name})


def main():
    admin, user = Client(SETTINGS["admin"]), Client(SETTINGS["user"])
    admin.login()
    user.login()
    failed = 0
    for part in (health, tokens, create_and_get, rotate, update_and_metadata, revoke, listing, batches, streams,
                 idempotency, twins):
        try:
            part(admin, user)
            print(f"ok {part.__name__}", flush=True)
        except (AssertionError, grpc.RpcError, KeyError, AttributeError) as error:
            failed += 1
            text = f"{error.code()} {error.details()}" if isinstance(error, grpc.RpcError) else repr(error)
            line = error.__traceback__
            while line.tb_next and pathlib.Path(line.tb_next.tb_frame.f_code.co_filename) == pathlib.Path(__file__):
                line = line.tb_next
            print(f"FAILED {part.__name__}, line {line.tb_lineno}: {text}", flush=True)
    methods = {m.name for m in S.service_pb2.DESCRIPTOR.services_by_name["PolykeyService"].methods}
    if methods - SEEN:
        failed += 1
        print(f"FAILED not called: {sorted(methods - SEEN)}")
    print(f"{len(SEEN)} of {len(methods)} methods called")
    sys.exit(1 if failed else 0)


main()
