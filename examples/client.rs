//! A client in Rust: log in, create a key, rotate it, read it, revoke it.
//!
//! `cargo run --example client -- .polykey/profile.toml`
#![allow(clippy::print_stdout)]

use polykey::client::{Profile, Session, rpc};
use polykey_proto::polykey::v2 as pb;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let named = std::env::args_os().nth(1).map(std::path::PathBuf::from);
    // Address, CA, certificate, key and API key stand in the profile; the session logs in by itself,
    // refreshes its token, and sends an idempotency key with every mutation.
    let session = Session::connect(Profile::find(named.as_deref())?).await?;

    let create = pb::CreateKeyRequest {
        key_type: pb::KeyType::Aes256.into(),
        description: "orders".into(),
        tags: [("team".to_owned(), "shop".to_owned())].into(),
        ..Default::default()
    };
    let created =
        session.mutate(create, rpc!(PolykeyServiceClient, create_key)).await?.into_inner();
    println!("created {}", created.key_id);

    let rotate = pb::RotateKeyRequest {
        key_id: created.key_id.clone(),
        strategy: pb::RotationStrategy::Hot.into(),
        grace_period_seconds: 86_400,
        ..Default::default()
    };
    let rotated =
        session.mutate(rotate, rpc!(PolykeyServiceClient, rotate_key)).await?.into_inner();
    println!("version {} follows {}", rotated.new_version, rotated.previous_version);

    let get = pb::GetKeyRequest { key_id: created.key_id.clone(), ..Default::default() };
    let got = session.read(get, rpc!(PolykeyServiceClient, get_key)).await?.into_inner();
    let material = got.key_material.unwrap_or_default();
    println!("{} bytes, {}", material.encrypted_key_data.len(), material.encryption_algorithm);

    let revoke = pb::RevokeKeyRequest {
        key_id: created.key_id,
        revocation_reason: "the sample is over".into(),
        ..Default::default()
    };
    session.mutate(revoke, rpc!(PolykeyServiceClient, revoke_key)).await?;
    println!("revoked");
    Ok(())
}
