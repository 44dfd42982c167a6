//! `polykey key export|open-export|export-keygen`: key material that leaves the server, on purpose.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use data_encoding::{BASE64, HEXLOWER};
use polykey_hsm::{
    ExportInfo, HpkeExport, RecipientPrivateKey, generate_recipient_keypair, open_hpke_export,
    recipient_key_sha256,
};
use polykey_proto::polykey::v2 as pb;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::App;
use super::error::{CliError, Exit};
use super::key::KeyArg;
use super::output::{Format, Human, View, is_terminal, write_out};
use super::remote::Remote;
use super::view::pem;
use crate::client::{file, rpc};

/// How material is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Encoding {
    /// Its bytes: a symmetric key or credential as it is, PKCS #8 DER of a private key.
    #[default]
    Raw,
    /// Base64 on one line.
    Base64,
    /// Hexadecimal on one line.
    Hex,
}

/// Arguments of `key export`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("form").args(["plain", "recipient"]).required(true))]
pub struct ExportArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArg,
    /// The version; the primary one if not given.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(i32).range(0..))]
    pub version: i32,
    /// The material itself.
    #[arg(long)]
    pub plain: bool,
    /// The material encrypted to the X25519 public key in this file (PEM, or 32 raw bytes).
    #[arg(long, value_name = "FILE")]
    pub recipient: Option<PathBuf>,
    /// Where to write it, readable by you alone; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// With --plain: how it is written.
    #[arg(long, value_enum, default_value_t, conflicts_with = "recipient")]
    pub encoding: Encoding,
}

/// Arguments of `key open-export`.
#[derive(Args, Debug)]
pub struct OpenExportArgs {
    /// The X25519 private key (PKCS #8 PEM, or 32 raw bytes).
    #[arg(long, value_name = "FILE")]
    pub private: PathBuf,
    /// What `key export --recipient` wrote; - for standard input.
    #[arg(long = "in", value_name = "FILE")]
    pub input: PathBuf,
    /// Where to write the material, readable by you alone; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// How it is written.
    #[arg(long, value_enum, default_value_t)]
    pub encoding: Encoding,
}

/// Arguments of `key export-keygen`.
#[derive(Args, Debug)]
pub struct KeygenArgs {
    /// Where to write the private key, PEM, readable by you alone.
    #[arg(long, value_name = "FILE")]
    pub private: PathBuf,
    /// Where to write the public key, PEM.
    #[arg(long, value_name = "FILE")]
    pub public: PathBuf,
}

/// Largest file that is read here, in bytes.
const MAX_FILE: u64 = 256 * 1024;
/// What names the form of an export file.
const FORMAT: &str = "polykey-hpke-export/1";
/// SubjectPublicKeyInfo of an X25519 key up to the key itself (RFC 8410).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x03, 0x21, 0x00];
/// PKCS #8 of an X25519 private key up to the key itself (RFC 8410).
const PKCS8: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x04, 0x22, 0x04, 0x20,
];

/// An export as it stands in a file: what is needed to open it, except the private key.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportFile {
    format: String,
    suite: String,
    /// The node that exported, a UUID.
    node: String,
    key_id: String,
    version: u32,
    /// The client that asked for it.
    principal: String,
    /// Hexadecimal.
    recipient_key_sha256: String,
    /// The encapsulated key, base64.
    enc: String,
    /// Base64.
    ciphertext: String,
}

impl ExportFile {
    fn info(&self) -> Option<ExportInfo> {
        Some(ExportInfo {
            node: *Uuid::try_parse(&self.node).ok()?.as_bytes(),
            key_id: *Uuid::try_parse(&self.key_id).ok()?.as_bytes(),
            version: self.version,
            principal: self.principal.clone(),
        })
    }
}

/// What was written where.
#[derive(Serialize)]
struct WrittenView {
    file: PathBuf,
    bytes: usize,
}

impl View for WrittenView {
    fn human(&self) -> Human {
        Human::Text(format!("{}: {} bytes written", self.file.display(), self.bytes))
    }
}

/// Material for a program.
#[derive(Serialize)]
struct MaterialView {
    key_id: Option<String>,
    version: Option<u32>,
    material_base64: String,
}

pub(super) async fn export(app: &App, remote: &Remote, args: ExportArgs) -> Result<(), CliError> {
    let recipient = args.recipient.as_deref().map(public_key).transpose()?;
    let mode = if recipient.is_some() { pb::ExportMode::Hpke } else { pb::ExportMode::Plain };
    let request = pb::ExportKeyRequest {
        key_id: args.key.key,
        version: args.version,
        mode: mode.into(),
        recipient_public_key: bytes::Bytes::copy_from_slice(recipient.as_ref().map_or(&[], |r| r)),
    };
    // An export is recorded durably: like a mutation it is repeated under one key.
    let answer = remote.mutate(request, rpc!(KeyLifecycleServiceClient, export_key)).await?;
    let material = answer.key_material.unwrap_or_default();
    let version = u32::try_from(answer.version).unwrap_or(0);
    let Some(recipient) = recipient else {
        let secret = Zeroizing::new(material.plaintext.to_vec());
        return deliver(
            app,
            args.out.as_deref(),
            args.encoding,
            &secret,
            Some((answer.key_id, version)),
        );
    };
    let sent = recipient_key_sha256(&recipient).map_err(|_| not_x25519(Path::new("recipient")))?;
    if material.recipient_key_sha256 != sent.as_slice() {
        return Err(CliError::new(
            Exit::DataLoss,
            "the server encrypted the export to another key than the one sent; it was not written",
        ));
    }
    let ciphertext = material
        .encrypted_key_data
        .strip_prefix(material.hpke_enc.as_ref())
        .unwrap_or(&material.encrypted_key_data);
    let me = remote.read(pb::WhoAmIRequest {}, rpc!(AdminServiceClient, who_am_i)).await?;
    let export = ExportFile {
        format: FORMAT.to_owned(),
        suite: HpkeExport::SUITE.to_owned(),
        node: me.node_id,
        key_id: answer.key_id,
        version,
        principal: me.client_id,
        recipient_key_sha256: HEXLOWER.encode(&sent),
        enc: BASE64.encode(&material.hpke_enc),
        ciphertext: BASE64.encode(ciphertext),
    };
    let mut text = serde_json::to_string_pretty(&export)
        .map_err(|error| CliError::new(Exit::Other, error.to_string()))?;
    text.push('\n');
    match args.out {
        None => write_out(text.as_bytes()),
        Some(out) => save(app, &out, text.as_bytes(), file::PRIVATE),
    }
}

/// Hands plain material to whoever asked for it.
fn deliver(
    app: &App,
    out: Option<&Path>,
    encoding: Encoding,
    secret: &[u8],
    of: Option<(String, u32)>,
) -> Result<(), CliError> {
    let line = |mut text: String| {
        text.push('\n');
        Zeroizing::new(text.into_bytes())
    };
    let encoded = match encoding {
        Encoding::Raw => Zeroizing::new(secret.to_vec()),
        Encoding::Base64 => line(BASE64.encode(secret)),
        Encoding::Hex => line(HEXLOWER.encode(secret)),
    };
    if let Some(out) = out {
        return save(app, out, &encoded, file::PRIVATE);
    }
    if app.out.format == Format::Json {
        let (key_id, version) = of.unzip();
        let view = MaterialView { key_id, version, material_base64: BASE64.encode(secret) };
        let text = Zeroizing::new(
            serde_json::to_vec_pretty(&view)
                .map_err(|error| CliError::new(Exit::Other, error.to_string()))?,
        );
        return write_out(&text).and_then(|()| write_out(b"\n"));
    }
    let printable = encoded.iter().all(|b| b.is_ascii_graphic() || *b == b' ' || *b == b'\n');
    if is_terminal() && !printable {
        return Err(CliError::usage("the material is not text and would go to a terminal")
            .hint("Add `--out FILE` or `--encoding base64`."));
    }
    write_out(&encoded)?;
    if is_terminal() && encoding == Encoding::Raw { write_out(b"\n") } else { Ok(()) }
}

fn save(app: &App, path: &Path, bytes: &[u8], mode: u32) -> Result<(), CliError> {
    file::write(path, bytes, mode).map_err(|error| CliError::file(path, &error))?;
    app.out.print(&WrittenView { file: path.to_owned(), bytes: bytes.len() })
}

fn not_x25519(path: &Path) -> CliError {
    CliError::usage(format!("{}: not an X25519 key, PEM or 32 raw bytes", path.display()))
        .hint("`polykey key export-keygen` makes a pair.")
}

/// The raw public key in a file.
fn public_key(path: &Path) -> Result<[u8; 32], CliError> {
    let bytes = file::read(path, MAX_FILE).map_err(|error| CliError::file(path, &error))?;
    let der = SubjectPublicKeyInfoDer::from_pem_slice(&bytes).ok();
    let der: &[u8] = der.as_ref().map_or(&bytes, |der| der);
    let raw = der.strip_prefix(&SPKI).unwrap_or(der);
    raw.try_into().map_err(|_| not_x25519(path))
}

/// The private key in a file.
fn private_key(path: &Path) -> Result<RecipientPrivateKey, CliError> {
    let bytes = file::read(path, MAX_FILE).map_err(|error| CliError::file(path, &error))?;
    let der = PrivatePkcs8KeyDer::from_pem_slice(&bytes).ok();
    let der: &[u8] = der.as_ref().map_or(&bytes, |der| der.secret_pkcs8_der());
    let raw = der.strip_prefix(&PKCS8).unwrap_or(der);
    let raw = <[u8; 32]>::try_from(raw).map_err(|_| not_x25519(path))?;
    Ok(RecipientPrivateKey::from_bytes(Zeroizing::new(raw)))
}

pub(super) fn open(app: &App, args: &OpenExportArgs) -> Result<(), CliError> {
    let private = private_key(&args.private)?;
    let bytes = file::read(&args.input, MAX_FILE).map_err(|e| CliError::file(&args.input, &e))?;
    let path = args.input.display();
    let damaged = |what: &str| {
        CliError::usage(format!("{path}: not an export of `polykey key export`: {what}"))
    };
    let export: ExportFile =
        serde_json::from_slice(&bytes).map_err(|error| damaged(&error.to_string()))?;
    if export.format != FORMAT || export.suite != HpkeExport::SUITE {
        return Err(damaged("unknown format or suite"));
    }
    let info = export.info().ok_or_else(|| damaged("an id is not a UUID"))?;
    let enc = BASE64.decode(export.enc.as_bytes()).map_err(|_| damaged("enc"))?;
    let ciphertext =
        BASE64.decode(export.ciphertext.as_bytes()).map_err(|_| damaged("ciphertext"))?;
    let material = open_hpke_export(&private, &info, &enc, &ciphertext).map_err(|_| {
        CliError::new(
            Exit::DataLoss,
            format!("{path}: does not open with {}", args.private.display()),
        )
        .hint("It was made for another key, or changed on its way.")
    })?;
    let of = Some((export.key_id, export.version));
    deliver(app, args.out.as_deref(), args.encoding, &material.expose_for_export(), of)
}

pub(super) fn keygen(app: &App, args: &KeygenArgs) -> Result<(), CliError> {
    for path in [&args.private, &args.public] {
        if path.exists() {
            return Err(CliError::usage(format!("{}: exists already", path.display()))
                .hint("Remove it first, or choose another name."));
        }
    }
    let (private, public) = generate_recipient_keypair()
        .map_err(|error| CliError::new(Exit::Other, error.to_string()))?;
    let pkcs8 = Zeroizing::new([PKCS8.as_slice(), private.expose().as_slice()].concat());
    let private = Zeroizing::new(pem("PRIVATE KEY", &pkcs8));
    let public = pem("PUBLIC KEY", &[SPKI.as_slice(), public.as_slice()].concat());
    file::write(&args.private, private.as_bytes(), file::PRIVATE)
        .map_err(|error| CliError::file(&args.private, &error))?;
    save(app, &args.public, public.as_bytes(), file::PUBLIC)
}

#[cfg(test)]
mod tests {
    use polykey_hsm::{KeyMaterial, export_hpke};

    use super::super::output::Output;
    use super::*;

    fn app() -> App {
        App { out: Output { format: Format::Table }, profile: None }
    }

    #[test]
    fn what_is_exported_to_a_made_key_opens_with_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let args = KeygenArgs { private: at("key.pem"), public: at("pub.pem") };
        keygen(&app(), &args).unwrap();
        assert_eq!(keygen(&app(), &args).unwrap_err().exit, Exit::Usage);
        let raw = public_key(&args.public).unwrap();
        std::fs::write(at("raw"), raw).unwrap();
        assert_eq!(public_key(&at("raw")).unwrap(), raw);

        let (node, key) = (Uuid::now_v7(), Uuid::now_v7());
        let info = ExportInfo {
            node: *node.as_bytes(),
            key_id: *key.as_bytes(),
            version: 2,
            principal: "alice".into(),
        };
        let secret = Zeroizing::new(vec![7; 32]);
        let material = KeyMaterial::from_secret(secret.to_vec()).unwrap();
        let sealed = export_hpke(&raw, &info, &material).unwrap();
        let export = |version| ExportFile {
            format: FORMAT.into(),
            suite: HpkeExport::SUITE.into(),
            node: node.simple().to_string(),
            key_id: key.to_string(),
            version,
            principal: "alice".into(),
            recipient_key_sha256: HEXLOWER.encode(&sealed.recipient_key_sha256),
            enc: BASE64.encode(&sealed.enc),
            ciphertext: BASE64.encode(&sealed.ciphertext),
        };
        std::fs::write(at("x.hpke"), serde_json::to_vec(&export(2)).unwrap()).unwrap();
        let open_args = |input: &str, private: &str| OpenExportArgs {
            private: at(private),
            input: at(input),
            out: Some(at("material")),
            encoding: Encoding::Raw,
        };
        open(&app(), &open_args("x.hpke", "key.pem")).unwrap();
        assert_eq!(std::fs::read(at("material")).unwrap(), *secret);

        std::fs::write(at("y.hpke"), serde_json::to_vec(&export(3)).unwrap()).unwrap();
        let error = open(&app(), &open_args("y.hpke", "key.pem")).unwrap_err();
        assert_eq!(error.exit, Exit::DataLoss);
        let error = open(&app(), &open_args("key.pem", "key.pem")).unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        assert_eq!(private_key(&args.public).unwrap_err().exit, Exit::Usage);
    }
}
