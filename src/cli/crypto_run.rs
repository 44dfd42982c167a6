//! What `polykey encrypt`, `sign` and the others do.

use std::collections::BTreeMap;
use std::path::Path;

use polykey_hsm::work::{self, CiphertextKind, SignatureScheme};
use polykey_hsm::{Algorithm, KeyMaterial, PublicKey, import};
use polykey_proto::polykey::v2 as pb;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::App;
use super::crypto::{
    AgreeArgs, Binding, DataKeyArgs, DecapsulateArgs, DecryptArgs, DeriveArgs, EncapsulateArgs,
    EncryptArgs, ImportArgs, ImportParametersArgs, InspectArgs, MacArgs, Protection, PublicKeyArgs,
    RandomArgs, RewrapArgs, SignArgs, UnwrapArgs, VerifyArgs, VerifyMacArgs, WorkCommand, WrapArgs,
};
use super::crypto_large as large;
use super::error::{CliError, Exit};
use super::output::{Human, View, is_terminal, write_out};
use super::remote::Remote;
use super::view::{KeyView, pem};
use crate::client::{file, rpc};

/// What a single call takes: larger files go through a stream.
const MESSAGE: u64 = 4 * 1024 * 1024;
/// What is encrypted in one call unless something else is asked for.
pub(super) const SMALL: u64 = 1024 * 1024;
/// A ciphertext of such a message in its longest form.
const CIPHERTEXT: u64 = 6 * 1024 * 1024;
/// Keys, signatures, salts.
const SHORT: u64 = 64 * 1024;
/// Readable by everybody.
const PUBLIC: u32 = 0o644;

pub(super) async fn run(app: &App, command: WorkCommand) -> Result<(), CliError> {
    if let WorkCommand::Inspect(args) = &command {
        return inspect(app, args);
    }
    let remote = app.connect().await?;
    match command {
        WorkCommand::Encrypt(args) => encrypt(&remote, args).await,
        WorkCommand::Decrypt(args) => decrypt(&remote, args).await,
        WorkCommand::Rewrap(args) => rewrap(&remote, args).await,
        WorkCommand::DataKey(args) => data_key(app, &remote, args).await,
        WorkCommand::Sign(args) => sign(&remote, args).await,
        WorkCommand::Verify(args) => verify(app, &remote, args).await,
        WorkCommand::Mac(args) => mac(&remote, args).await,
        WorkCommand::VerifyMac(args) => verify_mac(app, &remote, args).await,
        WorkCommand::Derive(args) => derive(&remote, args).await,
        WorkCommand::Agree(args) => agree(&remote, args).await,
        WorkCommand::Encapsulate(args) => encapsulate(app, &remote, args).await,
        WorkCommand::Decapsulate(args) => decapsulate(&remote, args).await,
        WorkCommand::Wrap(args) => wrap(&remote, args).await,
        WorkCommand::Unwrap(args) => unwrap(&remote, args).await,
        WorkCommand::Random(args) => random(&remote, args).await,
        WorkCommand::PublicKey(args) => public_key(&remote, args).await,
        WorkCommand::Import(args) => import_key(app, &remote, *args).await,
        WorkCommand::ImportParameters(args) => import_parameters(app, &remote, args).await,
        WorkCommand::Inspect(_) => Ok(()),
    }
}

pub(super) fn read(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, CliError> {
    file::read(path, limit).map_err(|error| CliError::file(path, &error))
}

/// Bytes to a file of their own, or to standard output if they may go there.
pub(super) fn put(out: Option<&Path>, bytes: &[u8]) -> Result<(), CliError> {
    match out {
        Some(path) => {
            file::write(path, bytes, file::PRIVATE).map_err(|error| CliError::file(path, &error))
        }
        None => {
            let printable = |b: &u8| b.is_ascii_graphic() || b.is_ascii_whitespace();
            if is_terminal() && !bytes.iter().all(printable) {
                let text = "the result is not text and would go to a terminal";
                return Err(CliError::usage(text).hint("Add `--out FILE`, or pipe it on."));
            }
            write_out(bytes)?;
            if is_terminal() && !bytes.ends_with(b"\n") { write_out(b"\n") } else { Ok(()) }
        }
    }
}

fn put_public(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    file::write(path, bytes, PUBLIC).map_err(|error| CliError::file(path, &error))
}

pub(super) fn sent(bytes: &[u8]) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(bytes)
}

/// A binding as it is sent: context and additional data.
pub(super) fn bound(
    binding: Binding,
) -> Result<(BTreeMap<String, String>, bytes::Bytes), CliError> {
    let aad = match &binding.aad_file {
        Some(path) => sent(&read(path, SHORT)?),
        None => bytes::Bytes::new(),
    };
    Ok((binding.context.into_iter().collect(), aad))
}

async fn encrypt(remote: &Remote, args: EncryptArgs) -> Result<(), CliError> {
    let EncryptArgs { worker, files, binding, text, raw, stream } = args;
    let (context, additional_data) = bound(binding)?;
    let begin = large::Source::open(&files.input)?;
    let whole = !stream && (text || raw || begin.is_small());
    if !whole {
        let header = pb::EncryptStreamHeader {
            key_id: worker.key,
            version: worker.version,
            context,
            additional_data,
            chunk_size: 0,
        };
        return large::encrypt(remote, header, begin, files.out.as_deref()).await;
    }
    let format = match (text, raw) {
        (true, _) => pb::CiphertextFormat::Text,
        (_, true) => pb::CiphertextFormat::Raw,
        _ => pb::CiphertextFormat::Blob,
    };
    let request = pb::EncryptRequest {
        key_id: worker.key,
        version: worker.version,
        plaintext: sent(&begin.all(MESSAGE)?),
        context,
        additional_data,
        format: format.into(),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, encrypt)).await?;
    put(files.out.as_deref(), &answer.ciphertext)
}

async fn decrypt(remote: &Remote, args: DecryptArgs) -> Result<(), CliError> {
    let DecryptArgs { key, version, files, binding, raw } = args;
    let (context, additional_data) = bound(binding)?;
    let begin = large::Source::open(&files.input)?;
    if !raw && begin.is_stream() {
        let key_id = key.unwrap_or_default();
        let header = pb::DecryptStreamHeader { key_id, context, additional_data };
        return large::decrypt(remote, header, begin, files.out.as_deref()).await;
    }
    let ciphertext = binary(begin.all(CIPHERTEXT)?);
    let format = if raw { pb::CiphertextFormat::Raw } else { pb::CiphertextFormat::Unspecified };
    let request = pb::DecryptRequest {
        key_id: key.unwrap_or_default(),
        ciphertext: sent(&ciphertext),
        context,
        additional_data,
        format: format.into(),
        version,
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, decrypt)).await?;
    let plaintext = Zeroizing::new(Vec::from(answer.plaintext));
    put(files.out.as_deref(), &plaintext)
}

/// The printable form, as an editor leaves it, in the shorter form that a message has room for. What
/// only looks like it goes as it is: the server says what is wrong with it.
fn binary(ciphertext: Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    if !work::is_text(&ciphertext) {
        return ciphertext;
    }
    let text = std::str::from_utf8(ciphertext.trim_ascii_end()).unwrap_or_default();
    work::from_text(text).map_or(ciphertext, Zeroizing::new)
}

async fn rewrap(remote: &Remote, args: RewrapArgs) -> Result<(), CliError> {
    let RewrapArgs { to_key, to_version, files, binding, text } = args;
    let (context, additional_data) = bound(binding)?;
    let ciphertext = binary(read(&files.input, CIPHERTEXT)?);
    let format = if text { pb::CiphertextFormat::Text } else { pb::CiphertextFormat::Blob };
    let request = pb::RewrapRequest {
        ciphertext: sent(&ciphertext),
        context,
        additional_data,
        destination_key_id: to_key.unwrap_or_default(),
        destination_version: to_version,
        format: format.into(),
        ..Default::default()
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, rewrap)).await?;
    put(files.out.as_deref(), &answer.ciphertext)
}

/// Which key did something.
#[derive(Serialize)]
struct ByView {
    key_id: String,
    version: i32,
}

impl View for ByView {
    fn human(&self) -> Human {
        Human::Record(vec![("key", self.key_id.clone()), ("version", self.version.to_string())])
    }
}

async fn data_key(app: &App, remote: &Remote, args: DataKeyArgs) -> Result<(), CliError> {
    let DataKeyArgs { worker, binding, bits, pair, wrapped, plaintext, public } = args;
    let (context, additional_data) = bound(binding)?;
    let request = pb::GenerateDataKeyRequest {
        key_id: worker.key,
        version: worker.version,
        context,
        additional_data,
        bits: if pair.is_some() { 0 } else { bits.parse().unwrap_or(256) },
        without_plaintext: plaintext.is_none(),
        key_pair_type: pair.map_or(0, |t| pb::KeyType::from(t).into()),
        format: pb::CiphertextFormat::Blob.into(),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, generate_data_key)).await?;
    if let Some(path) = &plaintext {
        let secret = Zeroizing::new(Vec::from(answer.plaintext));
        put(Some(path), &secret)?;
    }
    put(Some(&wrapped), &answer.ciphertext)?;
    if let Some(path) = &public {
        put_public(path, pem("PUBLIC KEY", &answer.public_key_der).as_bytes())?;
    }
    app.out.print(&ByView { key_id: answer.key_id, version: answer.version })
}

/// The wire's value of a scheme: its name is the enum's.
fn wire_scheme(scheme: Option<SignatureScheme>) -> i32 {
    scheme.map_or(0, |scheme| crate::rpc::crypto::wire_scheme(scheme).into())
}

async fn sign(remote: &Remote, args: SignArgs) -> Result<(), CliError> {
    use pb::sign_request::Input;
    let SignArgs { worker, files, scheme, digest } = args;
    let bytes = sent(&read(&files.input, MESSAGE)?);
    let request = pb::SignRequest {
        key_id: worker.key,
        version: worker.version,
        input: Some(if digest { Input::Digest(bytes) } else { Input::Message(bytes) }),
        scheme: wire_scheme(scheme),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, sign)).await?;
    put(files.out.as_deref(), &answer.signature)
}

/// Whether something is valid.
#[derive(Serialize)]
struct CheckedView {
    valid: bool,
    key_id: String,
    version: i32,
}

impl View for CheckedView {
    fn human(&self) -> Human {
        let result = if self.valid { "valid" } else { "NOT VALID" };
        Human::Record(vec![
            ("result", result.to_owned()),
            ("key", self.key_id.clone()),
            ("version", self.version.to_string()),
        ])
    }
}

fn checked(app: &App, view: &CheckedView) -> Result<(), CliError> {
    app.out.print(view)?;
    if view.valid { Ok(()) } else { Err(CliError::silent(Exit::DataLoss)) }
}

async fn verify(app: &App, remote: &Remote, args: VerifyArgs) -> Result<(), CliError> {
    use pb::verify_request::Input;
    let VerifyArgs { worker, input, signature, scheme, digest } = args;
    let bytes = sent(&read(&input, MESSAGE)?);
    let request = pb::VerifyRequest {
        key_id: worker.key,
        version: worker.version,
        input: Some(if digest { Input::Digest(bytes) } else { Input::Message(bytes) }),
        signature: sent(&read(&signature, SHORT)?),
        scheme: wire_scheme(scheme),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, verify)).await?;
    let pb::VerifyResponse { valid, key_id, version } = answer;
    checked(app, &CheckedView { valid, key_id, version })
}

async fn mac(remote: &Remote, args: MacArgs) -> Result<(), CliError> {
    let request = pb::GenerateMacRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        message: sent(&read(&args.files.input, MESSAGE)?),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, generate_mac)).await?;
    put(args.files.out.as_deref(), &answer.mac)
}

async fn verify_mac(app: &App, remote: &Remote, args: VerifyMacArgs) -> Result<(), CliError> {
    let request = pb::VerifyMacRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        message: sent(&read(&args.input, MESSAGE)?),
        mac: sent(&read(&args.mac, SHORT)?),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, verify_mac)).await?;
    let pb::VerifyMacResponse { valid, key_id, version } = answer;
    checked(app, &CheckedView { valid, key_id, version })
}

async fn derive(remote: &Remote, args: DeriveArgs) -> Result<(), CliError> {
    let salt = match &args.salt_file {
        Some(path) => sent(&read(path, SHORT)?),
        None => bytes::Bytes::new(),
    };
    let request = pb::DeriveKeyRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        context: args.context.into_iter().collect(),
        salt,
        length: args.length,
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, derive_key)).await?;
    put(args.out.as_deref(), &Zeroizing::new(Vec::from(answer.derived_key)))
}

async fn agree(remote: &Remote, args: AgreeArgs) -> Result<(), CliError> {
    let derivation = match args.info {
        Some(_) => pb::KeyDerivation::HkdfSha256,
        None => pb::KeyDerivation::None,
    };
    let request = pb::AgreeRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        peer_public_key: sent(&read(&args.peer, SHORT)?),
        derivation: derivation.into(),
        salt: bytes::Bytes::new(),
        info: args.info.unwrap_or_default().into(),
        length: args.length,
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, agree)).await?;
    put(args.out.as_deref(), &Zeroizing::new(Vec::from(answer.shared_secret)))
}

async fn encapsulate(app: &App, remote: &Remote, args: EncapsulateArgs) -> Result<(), CliError> {
    let EncapsulateArgs { worker, ciphertext, secret } = args;
    let request = pb::EncapsulateRequest { key_id: worker.key, version: worker.version };
    let answer = remote.read(request, rpc!(CryptoServiceClient, encapsulate)).await?;
    put(Some(&secret), &Zeroizing::new(Vec::from(answer.shared_secret)))?;
    put(Some(&ciphertext), &answer.ciphertext)?;
    app.out.print(&ByView { key_id: answer.key_id, version: answer.version })
}

async fn decapsulate(remote: &Remote, args: DecapsulateArgs) -> Result<(), CliError> {
    let request = pb::DecapsulateRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        ciphertext: sent(&read(&args.files.input, SHORT)?),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, decapsulate)).await?;
    put(args.files.out.as_deref(), &Zeroizing::new(Vec::from(answer.shared_secret)))
}

async fn wrap(remote: &Remote, args: WrapArgs) -> Result<(), CliError> {
    use pb::wrap_key_request::Target;
    let target = match (&args.input, args.target) {
        (Some(path), _) => Some(Target::KeyMaterial(sent(&read(path, SHORT)?))),
        (None, target) => target.map(Target::TargetKeyId),
    };
    let request = pb::WrapKeyRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        target_version: 0,
        target,
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, wrap_key)).await?;
    put(args.out.as_deref(), &answer.wrapped_key)
}

async fn unwrap(remote: &Remote, args: UnwrapArgs) -> Result<(), CliError> {
    let request = pb::UnwrapKeyRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        wrapped_key: sent(&read(&args.files.input, SHORT)?),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, unwrap_key)).await?;
    put(args.files.out.as_deref(), &Zeroizing::new(Vec::from(answer.key_material)))
}

async fn random(remote: &Remote, args: RandomArgs) -> Result<(), CliError> {
    let request = pb::GenerateRandomRequest { length: args.length };
    let answer = remote.read(request, rpc!(CryptoServiceClient, generate_random)).await?;
    put(args.out.as_deref(), &Zeroizing::new(Vec::from(answer.random)))
}

async fn public_key(remote: &Remote, args: PublicKeyArgs) -> Result<(), CliError> {
    let request = pb::GetPublicKeyRequest {
        key_id: args.worker.key,
        version: args.worker.version,
        format: pb::PublicKeyFormat::from(args.form).into(),
    };
    let answer = remote.read(request, rpc!(CryptoServiceClient, get_public_key)).await?;
    match &args.out {
        Some(path) => put_public(path, &answer.public_key),
        None => put(None, &answer.public_key),
    }
}

/// Material as the server takes it: PEM becomes DER, everything else stays, as does a credential.
fn material(algorithm: Algorithm, bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    match PrivatePkcs8KeyDer::from_pem_slice(bytes) {
        Ok(der) if algorithm != Algorithm::ApiKey => {
            Zeroizing::new(der.secret_pkcs8_der().to_vec())
        }
        _ => Zeroizing::new(bytes.to_vec()),
    }
}

async fn import_key(app: &App, remote: &Remote, args: ImportArgs) -> Result<(), CliError> {
    let read = read(&args.input, SHORT)?;
    let wrapping = pb::ImportWrapping::from(args.protection);
    let (import_token, bytes) = match (&args.token, args.protection) {
        (Some(_), Protection::Plain) => {
            return Err(CliError::usage("--token goes with --protection rsa-aes or hpke"));
        }
        (Some(token), _) => (token.clone(), sent(&read)),
        (None, Protection::Plain) => (String::new(), sent(&material(args.key_type.0, &read))),
        (None, _) => wrapped_here(remote, wrapping, args.key_type.0, &read).await?,
    };
    let alias = args.alias.unwrap_or_default();
    let request = pb::ImportKeyRequest {
        key: Some(pb::CreateKeyRequest {
            key_type: pb::KeyType::from(args.key_type).into(),
            purpose: args.purpose.map_or(0, |p| pb::KeyPurpose::from(p).into()),
            alias: alias.strip_prefix("alias/").unwrap_or(&alias).to_owned(),
            tags: args.tags.into_iter().collect(),
            description: args.description.unwrap_or_default(),
            exportable: Some(args.exportable),
            ..Default::default()
        }),
        wrapping: wrapping.into(),
        import_token,
        material: bytes,
    };
    let answer = remote.mutate(request, rpc!(CryptoServiceClient, import_key)).await?;
    app.out.print(&KeyView::of(answer.key.unwrap_or_default().metadata))
}

/// Wraps material to a one-time key of the server.
async fn wrapped_here(
    remote: &Remote,
    wrapping: pb::ImportWrapping,
    algorithm: Algorithm,
    bytes: &[u8],
) -> Result<(String, bytes::Bytes), CliError> {
    let text = std::str::from_utf8(bytes).unwrap_or_default().trim();
    let key = if text.starts_with('{') && algorithm != Algorithm::ApiKey {
        import::import_jwk(algorithm, text)
            .map_err(|error| CliError::usage(error.to_string()))?
            .material
    } else {
        KeyMaterial::from_secret(material(algorithm, bytes).to_vec())
            .map_err(|error| CliError::usage(error.to_string()))?
    };
    let request = pb::GetImportParametersRequest { wrapping: wrapping.into() };
    let one_time = remote.mutate(request, rpc!(CryptoServiceClient, get_import_parameters)).await?;
    let refused = |_| CliError::new(Exit::DataLoss, "the server's one-time key is none");
    let wrapped = match wrapping {
        pb::ImportWrapping::Hpke => {
            let raw: [u8; 32] =
                one_time.public_key.as_ref().try_into().map_err(|_| {
                    CliError::new(Exit::DataLoss, "the server's one-time key is none")
                })?;
            import::wrap_hpke_to(&raw, &one_time.hpke_info, &key).map_err(refused)?
        }
        _ => {
            let public = PublicKey::from_spki(Algorithm::Rsa4096, &one_time.public_key)
                .map_err(|_| CliError::new(Exit::DataLoss, "the server's one-time key is none"))?;
            import::wrap_rsa_aes(&public, &key).map_err(refused)?
        }
    };
    Ok((one_time.import_token, wrapped.into()))
}

/// What an import needs that is wrapped elsewhere.
#[derive(Serialize)]
struct ParametersView {
    import_token: String,
    expires_at: Option<String>,
}

impl View for ParametersView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("import token", self.import_token.clone()),
            ("expires", super::view::short(self.expires_at.as_ref())),
        ])
    }
}

async fn import_parameters(
    app: &App,
    remote: &Remote,
    args: ImportParametersArgs,
) -> Result<(), CliError> {
    let wrapping = pb::ImportWrapping::from(args.protection);
    let request = pb::GetImportParametersRequest { wrapping: wrapping.into() };
    let answer = remote.mutate(request, rpc!(CryptoServiceClient, get_import_parameters)).await?;
    match args.protection {
        Protection::RsaAes => {
            put_public(&args.public, pem("PUBLIC KEY", &answer.public_key).as_bytes())?;
        }
        Protection::Hpke | Protection::Plain => put_public(&args.public, &answer.public_key)?,
    }
    if let Some(path) = &args.info {
        put_public(path, &answer.hpke_info)?;
    }
    let expires_at = super::view::time(answer.expires_at.as_ref());
    app.out.print(&ParametersView { import_token: answer.import_token, expires_at })
}

/// What a ciphertext says of itself.
#[derive(Serialize)]
struct InspectedView {
    kind: &'static str,
    format: u8,
    key_id: String,
    version: u32,
    algorithm: &'static str,
    chunk_size: Option<usize>,
    ciphertext_bytes: usize,
    plaintext_bytes: Option<usize>,
}

impl View for InspectedView {
    fn human(&self) -> Human {
        let size = |n: Option<usize>| n.map(|n| n.to_string()).unwrap_or_default();
        Human::Record(vec![
            ("kind", self.kind.to_owned()),
            ("format", self.format.to_string()),
            ("key", self.key_id.clone()),
            ("version", self.version.to_string()),
            ("algorithm", self.algorithm.to_owned()),
            ("chunk size", size(self.chunk_size)),
            ("ciphertext", format!("{} bytes", self.ciphertext_bytes)),
            ("plaintext", size(self.plaintext_bytes)),
            ("note", "nothing of this is authentic before it is decrypted".to_owned()),
        ])
    }
}

fn inspect(app: &App, args: &InspectArgs) -> Result<(), CliError> {
    let bytes = large::Source::open(&args.input)?.everything()?;
    let name = args.input.display();
    let none = || CliError::usage(format!("{name}: not a Polykey ciphertext"));
    let blob = if work::is_text(&bytes) {
        let text = std::str::from_utf8(bytes.trim_ascii_end()).map_err(|_| none())?;
        Zeroizing::new(work::from_text(text).map_err(|_| none())?)
    } else {
        bytes
    };
    let header = work::header(&blob).map_err(|_| none())?;
    app.out.print(&InspectedView {
        kind: match header.kind {
            CiphertextKind::Message => "message",
            CiphertextKind::Stream => "stream",
        },
        format: header.format,
        key_id: Uuid::from_bytes(header.key_id).to_string(),
        version: header.version,
        algorithm: header.algorithm.name(),
        chunk_size: header.chunk_size.map(work::ChunkSize::bytes),
        ciphertext_bytes: blob.len(),
        plaintext_bytes: header.plaintext_len,
    })
}
