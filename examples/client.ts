// A client in TypeScript: log in, create a key, rotate it, read it, revoke it.
//
//     npm install @grpc/grpc-js @grpc/proto-loader
//     npx tsx examples/client.ts 127.0.0.1:50053 .polykey admin
//
// The .proto files of this repository are loaded as they are; generated stubs work the same way.
import * as fs from "node:fs";
import * as path from "node:path";
import { randomUUID } from "node:crypto";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

const [address, directory, name] = process.argv.slice(2);
if (!address || !directory || !name) throw new Error("usage: client.ts ADDRESS DIRECTORY NAME");
const file = (suffix: string): Buffer => fs.readFileSync(path.join(directory, suffix));

const definition = protoLoader.loadSync("polykey/v2/service.proto", {
  includeDirs: ["proto"],
  keepCase: true,
  longs: Number,
  enums: String,
});
const polykey = (grpc.loadPackageDefinition(definition) as any).polykey.v2;
const service = new polykey.PolykeyService(
  address,
  grpc.credentials.createSsl(file("ca.pem"), file(`${name}.key`), file(`${name}.pem`)),
);

// A call with the token, and an idempotency key under which it may be sent again.
function call<Q, A>(method: string, request: Q, token?: string): Promise<A> {
  const metadata = new grpc.Metadata();
  if (token) {
    metadata.set("authorization", `Bearer ${token}`);
    metadata.set("idempotency-key", randomUUID());
  }
  const options = { deadline: Date.now() + 30_000 };
  return new Promise((resolve, reject) =>
    service[method](request, metadata, options, (error: grpc.ServiceError | null, answer: A) =>
      error ? reject(error) : resolve(answer),
    ),
  );
}

async function main(): Promise<void> {
  const apiKey = file(`${name}.api-key`).toString().trim();
  const login = await call<object, { access_token: string }>("Authenticate", {
    client_id: name,
    api_key: apiKey,
  });
  const token = login.access_token;

  const created = await call<object, { key_id: string }>(
    "CreateKey",
    { key_type: "KEY_TYPE_AES_256", description: "orders", tags: { team: "shop" } },
    token,
  );
  console.log("created", created.key_id);

  const rotated = await call<object, { new_version: number; previous_version: number }>(
    "RotateKey",
    { key_id: created.key_id, strategy: "ROTATION_STRATEGY_HOT", grace_period_seconds: 86400 },
    token,
  );
  console.log("version", rotated.new_version, "follows", rotated.previous_version);

  const got = await call<object, { key_material: { encrypted_key_data: Buffer } }>(
    "GetKey",
    { key_id: created.key_id },
    token,
  );
  console.log(got.key_material.encrypted_key_data.length, "bytes");

  await call("RevokeKey", { key_id: created.key_id, revocation_reason: "the sample is over" }, token);
  console.log("revoked");
}

main()
  .catch((error) => {
    console.error(error);
    process.exitCode = 1;
  })
  .finally(() => service.close());
