//! `polykey encrypt`, `sign` and the others: what is typed to have keys work.

use std::path::PathBuf;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use polykey_hsm::work::SignatureScheme;
use polykey_proto::polykey::v2 as pb;

use super::key::{KeyType, PairType, Purpose};
use super::value;

/// Which key and version works.
#[derive(Args, Debug)]
pub struct Worker {
    /// The key: its id, or alias/NAME.
    #[arg(long, value_name = "KEY", value_parser = value::key_name)]
    pub key: String,
    /// The version; the primary one if not given.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(i32).range(0..))]
    pub version: i32,
}

/// Where bytes come from and go to.
#[derive(Args, Debug)]
pub struct Files {
    /// What to read; standard input if not given.
    #[arg(long = "in", value_name = "FILE", default_value = "-", hide_default_value = true)]
    pub input: PathBuf,
    /// Where to write, readable by you alone; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What a ciphertext is bound to.
#[derive(Args, Debug)]
pub struct Binding {
    /// A pair that the ciphertext is bound to; not secret, recorded in the audit log. May be repeated.
    #[arg(long = "context", value_name = "NAME=VALUE", value_parser = value::pair)]
    pub context: Vec<(String, String)>,
    /// A file whose content the ciphertext is bound to.
    #[arg(long, value_name = "FILE")]
    pub aad_file: Option<PathBuf>,
}

/// Commands that have keys work.
#[derive(Subcommand, Debug)]
pub enum WorkCommand {
    /// Encrypt a file of any size.
    Encrypt(EncryptArgs),
    /// Decrypt what `encrypt` or `data-key` made.
    Decrypt(DecryptArgs),
    /// Encrypt a ciphertext anew, under the newest version or another key; nobody sees the plaintext.
    Rewrap(RewrapArgs),
    /// Make a data key, encrypted under a key.
    DataKey(DataKeyArgs),
    /// Sign a file.
    Sign(SignArgs),
    /// Verify a signature; exits with 7 if it is not valid.
    Verify(VerifyArgs),
    /// Make a message authentication code of a file.
    Mac(MacArgs),
    /// Verify a message authentication code; exits with 7 if it is not valid.
    VerifyMac(VerifyMacArgs),
    /// Derive a key from a secret.
    Derive(DeriveArgs),
    /// Agree on a shared secret with the holder of another key pair.
    Agree(AgreeArgs),
    /// Make a shared secret for a key (KEM).
    Encapsulate(EncapsulateArgs),
    /// Get a shared secret from its ciphertext (KEM).
    Decapsulate(DecapsulateArgs),
    /// Wrap key material: AES-KWP or RSA-OAEP.
    Wrap(WrapArgs),
    /// Unwrap key material.
    Unwrap(UnwrapArgs),
    /// Get random bytes from the server.
    Random(RandomArgs),
    /// Print the public part of a key.
    PublicKey(PublicKeyArgs),
    /// Make a key from material that exists.
    Import(Box<ImportArgs>),
    /// Get a one-time public key under which material can be imported.
    ImportParameters(ImportParametersArgs),
    /// Tell what a ciphertext says of itself; no server is asked.
    Inspect(InspectArgs),
}

/// Arguments of `encrypt`.
#[derive(Args, Debug)]
pub struct EncryptArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The files.
    #[command(flatten)]
    pub files: Files,
    /// What the ciphertext is bound to.
    #[command(flatten)]
    pub binding: Binding,
    /// Write the printable form.
    #[arg(long, conflicts_with_all = ["stream", "raw"])]
    pub text: bool,
    /// Write what RSA-OAEP gives and nothing else; RSA keys only.
    #[arg(long, conflicts_with = "stream")]
    pub raw: bool,
    /// Write the form for large data, whatever the size. What is larger than 1 MiB has it anyway.
    #[arg(long)]
    pub stream: bool,
}

/// Arguments of `decrypt`.
#[derive(Args, Debug)]
pub struct DecryptArgs {
    /// The key that the ciphertext must be of; without it, the one that it names.
    #[arg(long, value_name = "KEY", value_parser = value::key_name)]
    pub key: Option<String>,
    /// With --raw: the version; the primary one if not given.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "raw", value_parser = clap::value_parser!(i32).range(0..))]
    pub version: i32,
    /// The files.
    #[command(flatten)]
    pub files: Files,
    /// What the ciphertext is bound to.
    #[command(flatten)]
    pub binding: Binding,
    /// The ciphertext is what RSA-OAEP gives and nothing else.
    #[arg(long, requires = "key")]
    pub raw: bool,
}

/// Arguments of `rewrap`.
#[derive(Args, Debug)]
pub struct RewrapArgs {
    /// The key to encrypt under; without it, the one that the ciphertext names.
    #[arg(long, value_name = "KEY", value_parser = value::key_name)]
    pub to_key: Option<String>,
    /// The version to encrypt under; the primary one if not given.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(i32).range(0..))]
    pub to_version: i32,
    /// The files.
    #[command(flatten)]
    pub files: Files,
    /// What the ciphertext is bound to, and stays so.
    #[command(flatten)]
    pub binding: Binding,
    /// Write the printable form.
    #[arg(long)]
    pub text: bool,
}

/// Arguments of `data-key`.
#[derive(Args, Debug)]
pub struct DataKeyArgs {
    /// The key and version it is encrypted under.
    #[command(flatten)]
    pub worker: Worker,
    /// What the ciphertext is bound to.
    #[command(flatten)]
    pub binding: Binding,
    /// The bits of a symmetric data key.
    #[arg(long, default_value = "256", value_parser = ["128", "256", "512"])]
    pub bits: String,
    /// Make a key pair of this type instead.
    #[arg(long, value_name = "TYPE", value_enum, conflicts_with = "bits")]
    pub pair: Option<PairType>,
    /// Where to write the encrypted data key.
    #[arg(long, value_name = "FILE")]
    pub wrapped: PathBuf,
    /// Where to write the data key itself (of a pair: PKCS #8), readable by you alone. Without it the
    /// server does not show it.
    #[arg(long, value_name = "FILE")]
    pub plaintext: Option<PathBuf>,
    /// Where to write the public key of a pair, PEM.
    #[arg(long, value_name = "FILE", requires = "pair")]
    pub public: Option<PathBuf>,
}

/// A signature scheme by name.
fn scheme() -> impl TypedValueParser<Value = SignatureScheme> {
    let names = SignatureScheme::ALL.iter().map(|s| PossibleValue::new(s.name()).help(s.about()));
    clap::builder::PossibleValuesParser::new(names).try_map(|name| {
        SignatureScheme::from_name(&name).ok_or_else(|| format!("there is no scheme {name}"))
    })
}

/// Arguments of `sign`.
#[derive(Args, Debug)]
pub struct SignArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The files.
    #[command(flatten)]
    pub files: Files,
    /// How; the first scheme of the key's type if not given.
    #[arg(long, value_name = "SCHEME", value_parser = scheme())]
    pub scheme: Option<SignatureScheme>,
    /// What is read is the digest of the message, its bytes.
    #[arg(long)]
    pub digest: bool,
}

/// Arguments of `verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// What was signed; standard input if not given.
    #[arg(long = "in", value_name = "FILE", default_value = "-", hide_default_value = true)]
    pub input: PathBuf,
    /// The signature.
    #[arg(long, value_name = "FILE")]
    pub signature: PathBuf,
    /// How it was made; the first scheme of the key's type if not given.
    #[arg(long, value_name = "SCHEME", value_parser = scheme())]
    pub scheme: Option<SignatureScheme>,
    /// What is read is the digest of the message, its bytes.
    #[arg(long)]
    pub digest: bool,
}

/// Arguments of `mac`.
#[derive(Args, Debug)]
pub struct MacArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The files.
    #[command(flatten)]
    pub files: Files,
}

/// Arguments of `verify-mac`.
#[derive(Args, Debug)]
pub struct VerifyMacArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The message; standard input if not given.
    #[arg(long = "in", value_name = "FILE", default_value = "-", hide_default_value = true)]
    pub input: PathBuf,
    /// The code.
    #[arg(long, value_name = "FILE")]
    pub mac: PathBuf,
}

/// Arguments of `derive`.
#[derive(Args, Debug)]
pub struct DeriveArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// What the derived key is for; another context gives another key. May be repeated.
    #[arg(long = "context", value_name = "NAME=VALUE", value_parser = value::pair, required = true)]
    pub context: Vec<(String, String)>,
    /// A file with the salt.
    #[arg(long, value_name = "FILE")]
    pub salt_file: Option<PathBuf>,
    /// Bytes to derive.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(i32).range(16..=8160))]
    pub length: i32,
    /// Where to write the key, readable by you alone; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `agree`.
#[derive(Args, Debug)]
pub struct AgreeArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The other side's public key: PEM, DER or JWK.
    #[arg(long, value_name = "FILE")]
    pub peer: PathBuf,
    /// Derive a key from the secret with HKDF-SHA-256 for this purpose. Without it: the secret as it is.
    #[arg(long, value_name = "TEXT")]
    pub info: Option<String>,
    /// With --info: bytes to derive.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        requires = "info"
    )]
    pub length: i32,
    /// Where to write the secret, readable by you alone; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `encapsulate`.
#[derive(Args, Debug)]
pub struct EncapsulateArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// Where to write the ciphertext.
    #[arg(long, value_name = "FILE")]
    pub ciphertext: PathBuf,
    /// Where to write the shared secret, readable by you alone.
    #[arg(long, value_name = "FILE")]
    pub secret: PathBuf,
}

/// Arguments of `decapsulate`.
#[derive(Args, Debug)]
pub struct DecapsulateArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The files.
    #[command(flatten)]
    pub files: Files,
}

/// Arguments of `wrap`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").args(["input", "target"]).required(true))]
pub struct WrapArgs {
    /// The wrapping key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The material to wrap.
    #[arg(long = "in", value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// An exportable key to wrap instead.
    #[arg(long, value_name = "KEY", value_parser = value::key_name)]
    pub target: Option<String>,
    /// Where to write the wrapped material; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `unwrap`.
#[derive(Args, Debug)]
pub struct UnwrapArgs {
    /// The wrapping key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The files.
    #[command(flatten)]
    pub files: Files,
}

/// Arguments of `random`.
#[derive(Args, Debug)]
pub struct RandomArgs {
    /// How many bytes.
    #[arg(value_name = "N", value_parser = clap::value_parser!(i32).range(1..=65_536))]
    pub length: i32,
    /// Where to write them, readable by you alone; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Forms of public keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PublicForm {
    /// SubjectPublicKeyInfo in PEM.
    #[default]
    Pem,
    /// SubjectPublicKeyInfo in DER.
    Der,
    /// A JSON Web Key.
    Jwk,
}

impl From<PublicForm> for pb::PublicKeyFormat {
    fn from(form: PublicForm) -> Self {
        match form {
            PublicForm::Pem => Self::Pem,
            PublicForm::Der => Self::Der,
            PublicForm::Jwk => Self::Jwk,
        }
    }
}

/// Arguments of `public-key`.
#[derive(Args, Debug)]
pub struct PublicKeyArgs {
    /// The key and version.
    #[command(flatten)]
    pub worker: Worker,
    /// The form.
    #[arg(long, value_enum, default_value_t)]
    pub form: PublicForm,
    /// Where to write it; standard output if not given.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// How material is protected on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protection {
    /// RSA-OAEP and AES-KWP (CKM_RSA_AES_KEY_WRAP).
    RsaAes,
    /// HPKE.
    Hpke,
    /// By the mutual TLS of the connection only; takes the permission keys:import-plain.
    Plain,
}

impl From<Protection> for pb::ImportWrapping {
    fn from(protection: Protection) -> Self {
        match protection {
            Protection::RsaAes => Self::RsaAes,
            Protection::Hpke => Self::Hpke,
            Protection::Plain => Self::Plain,
        }
    }
}

/// Arguments of `import`.
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// What the key is.
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    pub key_type: KeyType,
    /// What it is for; the first purpose of its type if not given.
    #[arg(long, value_name = "PURPOSE", value_enum)]
    pub purpose: Option<Purpose>,
    /// A name for it, with or without alias/ in front.
    #[arg(long, value_name = "NAME")]
    pub alias: Option<String>,
    /// A label; may be repeated.
    #[arg(long = "tag", value_name = "NAME=VALUE", value_parser = value::pair)]
    pub tags: Vec<(String, String)>,
    /// A text for people.
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Whether the material may leave the server again; it cannot be changed later.
    #[arg(long)]
    pub exportable: bool,
    /// The material: raw bytes of a symmetric key, PKCS #8 (PEM or DER) or a private JWK of a pair; -
    /// for standard input.
    #[arg(long = "in", value_name = "FILE", default_value = "-", hide_default_value = true)]
    pub input: PathBuf,
    /// How it is protected on its way. Without --token it is wrapped here.
    #[arg(long, value_enum, default_value = "hpke")]
    pub protection: Protection,
    /// What is read has been wrapped elsewhere, for this token of `import-parameters`.
    #[arg(long, value_name = "TOKEN")]
    pub token: Option<String>,
}

/// Arguments of `import-parameters`.
#[derive(Args, Debug)]
pub struct ImportParametersArgs {
    /// How the material will be protected.
    #[arg(long, value_enum, default_value = "rsa-aes")]
    pub protection: Protection,
    /// Where to write the public key: PEM with rsa-aes, 32 raw bytes with hpke.
    #[arg(long, value_name = "FILE")]
    pub public: PathBuf,
    /// With hpke: where to write the info.
    #[arg(long, value_name = "FILE")]
    pub info: Option<PathBuf>,
}

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// The ciphertext; standard input if not given.
    #[arg(long = "in", value_name = "FILE", default_value = "-", hide_default_value = true)]
    pub input: PathBuf,
}
