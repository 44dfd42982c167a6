//! OpenSSL's command line and Python's `cryptography` read what is made here, and the reverse.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use data_encoding::{BASE64, HEXLOWER};
use polykey_hsm::algorithm::{generate, import};
use polykey_hsm::import::{
    ImportInfo, ImportWrapping, generate_one_time_key, unwrap_hpke, unwrap_rsa_aes,
};
use polykey_hsm::work::asymmetric::Pair;
use polykey_hsm::work::{SignInput, SignatureScheme, encapsulate, encrypt_to, verify};
use polykey_hsm::{Algorithm, Generated, GenerationParams, KeyMaterial, PublicKey, Purpose};
use serde_json::{Value, json};
use tempfile::TempDir;

const MESSAGE: &[u8] = b"a message for both sides";

/// Tells `make test` of a test that cannot run here.
fn skipped(name: &str, reason: &str) {
    println!("SKIPPED {name}: {reason}");
    if let Some(path) = std::env::var_os("POLYKEY_TEST_SKIPS") {
        let mut file = fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        writeln!(file, "{name}: {reason}").unwrap();
    }
}

/// OpenSSL's command line in a directory of its own, or `None` where there is none.
struct OpenSsl(TempDir);

impl OpenSsl {
    fn here(test: &str) -> Option<Self> {
        let version = Command::new("openssl").arg("version").stdin(Stdio::null()).output();
        match version {
            Ok(output) if output.status.success() && output.stdout.starts_with(b"OpenSSL 3") => {
                Some(Self(tempfile::tempdir().unwrap()))
            }
            _ => {
                skipped(test, "OpenSSL 3 is not here");
                None
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Runs a command whose words name files of the directory.
    fn output(&self, command: &str) -> Output {
        Command::new("openssl")
            .args(command.split(' '))
            .current_dir(&self.0)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn run(&self, command: &str) {
        let output = self.output(command);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {command}: {complaint}");
    }

    /// A key made there, taken over here from its PKCS#8 PEM.
    fn key(&self, algorithm: Algorithm, options: &str) -> Generated {
        self.run(&format!("genpkey {options} -out theirs.pem"));
        self.run("pkey -in theirs.pem -pubout -out theirs.pub.pem");
        self.run("pkcs8 -topk8 -nocrypt -in theirs.pem -outform DER -out theirs.der");
        let made = import(algorithm, material(&self.read("theirs.der"))).unwrap();
        let pem = String::from_utf8(self.read("theirs.pub.pem")).unwrap();
        assert_eq!(PublicKey::from_pem(algorithm, &pem).unwrap(), *made.public.as_ref().unwrap());
        assert_eq!(made.public.as_ref().unwrap().to_pem().unwrap(), pem, "{algorithm}");
        made
    }

    /// A key made here as `ours.pem` and `ours.pub.pem`, and again here.
    fn give(&self, algorithm: Algorithm) -> Generated {
        let made = generate(algorithm, GenerationParams::default()).unwrap();
        let pkcs8 = made.material.expose_for_export();
        self.write("ours.der", &*pkcs8);
        self.run("pkey -inform DER -in ours.der -out ours.pem");
        let public = made.public.unwrap();
        self.write("ours.pub.pem", public.to_pem().unwrap());
        self.run("pkey -in ours.pem -pubout -out derived.pub.pem");
        assert_eq!(self.read("derived.pub.pem"), self.read("ours.pub.pem"), "{algorithm}");
        Generated { material: material(&pkcs8), public: Some(public) }
    }
}

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

/// The options of `genpkey` for a key of this type.
fn genpkey(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::Rsa2048 => "-algorithm RSA -pkeyopt rsa_keygen_bits:2048",
        Algorithm::Rsa3072 => "-algorithm RSA -pkeyopt rsa_keygen_bits:3072",
        Algorithm::Rsa4096 => "-algorithm RSA -pkeyopt rsa_keygen_bits:4096",
        Algorithm::EcdsaP256 | Algorithm::EcdhP256 => {
            "-algorithm EC -pkeyopt ec_paramgen_curve:P-256"
        }
        Algorithm::EcdsaP384 | Algorithm::EcdhP384 => {
            "-algorithm EC -pkeyopt ec_paramgen_curve:P-384"
        }
        Algorithm::EcdsaP521 | Algorithm::EcdhP521 => {
            "-algorithm EC -pkeyopt ec_paramgen_curve:P-521"
        }
        Algorithm::EcdsaSecp256k1 => "-algorithm EC -pkeyopt ec_paramgen_curve:secp256k1",
        Algorithm::Ed25519 => "-algorithm ED25519",
        _ => "-algorithm X25519",
    }
}

/// How OpenSSL says a scheme: the command up to the key.
fn dgst(scheme: SignatureScheme) -> Option<String> {
    let hash = scheme.name().split('-').find(|part| part.starts_with("sha"))?;
    let options = if scheme.name().starts_with("rsa-pss") {
        format!(
            "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest -sigopt rsa_mgf1_md:{hash} "
        )
    } else {
        String::new()
    };
    Some(format!("dgst -{hash} {options}"))
}

#[test]
fn openssl_verifies_signatures_and_signs() {
    let Some(openssl) = OpenSsl::here("openssl_verifies_signatures_and_signs") else { return };
    openssl.write("message", MESSAGE);
    for algorithm in [
        Algorithm::Rsa2048,
        Algorithm::Rsa3072,
        Algorithm::Rsa4096,
        Algorithm::EcdsaP256,
        Algorithm::EcdsaP384,
        Algorithm::EcdsaP521,
        Algorithm::EcdsaSecp256k1,
        Algorithm::Ed25519,
    ] {
        let theirs = openssl.key(algorithm, genpkey(algorithm));
        let ours = openssl.give(algorithm);
        for &scheme in SignatureScheme::ALL {
            // OpenSSL's command line has no signatures of fixed length.
            if !scheme.serves(algorithm) || scheme.name().ends_with("p1363") {
                continue;
            }
            let input = SignInput::Message(MESSAGE);
            let pair = Pair::new(algorithm, Purpose::Sign, &ours.material).unwrap();
            openssl.write("signature", pair.sign(scheme, input).unwrap());
            let (check, sign) = match dgst(scheme) {
                Some(dgst) => (
                    format!("{dgst}-verify ours.pub.pem -signature signature message"),
                    format!("{dgst}-sign theirs.pem -out theirs.sig message"),
                ),
                None => (
                    "pkeyutl -verify -rawin -pubin -inkey ours.pub.pem -sigfile signature -in message".into(),
                    "pkeyutl -sign -rawin -inkey theirs.pem -in message -out theirs.sig".into(),
                ),
            };
            openssl.run(&check);
            openssl.write("signature", pair.sign(scheme, SignInput::Message(b"another")).unwrap());
            assert!(
                !openssl.output(&check).status.success(),
                "{algorithm} {scheme}: a signature of something else"
            );
            openssl.run(&sign);
            let signature = openssl.read("theirs.sig");
            let public = theirs.public.as_ref().unwrap();
            assert_eq!(
                verify(algorithm, scheme, public, input, &signature),
                Ok(true),
                "{algorithm} {scheme}"
            );
        }
    }
}

#[test]
fn openssl_encrypts_and_decrypts_with_oaep() {
    let Some(openssl) = OpenSsl::here("openssl_encrypts_and_decrypts_with_oaep") else { return };
    let oaep =
        "-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256";
    openssl.write("message", MESSAGE);
    for algorithm in [Algorithm::Rsa2048, Algorithm::Rsa3072, Algorithm::Rsa4096] {
        let ours = openssl.give(algorithm);
        openssl.run(&format!(
            "pkeyutl -encrypt -pubin -inkey ours.pub.pem {oaep} -in message -out sealed"
        ));
        let pair = Pair::new(algorithm, Purpose::Encrypt, &ours.material).unwrap();
        assert_eq!(pair.open_raw(&openssl.read("sealed")).unwrap().as_slice(), MESSAGE);
        let theirs = openssl.key(algorithm, genpkey(algorithm));
        let sealed = encrypt_to(algorithm, theirs.public.as_ref().unwrap(), MESSAGE).unwrap();
        openssl.write("sealed", sealed);
        openssl.run(&format!("pkeyutl -decrypt -inkey theirs.pem {oaep} -in sealed -out opened"));
        assert_eq!(openssl.read("opened"), MESSAGE);
    }
}

#[test]
fn openssl_derives_the_same_secret() {
    let Some(openssl) = OpenSsl::here("openssl_derives_the_same_secret") else { return };
    for algorithm in
        [Algorithm::X25519, Algorithm::EcdhP256, Algorithm::EcdhP384, Algorithm::EcdhP521]
    {
        let theirs = openssl.key(algorithm, genpkey(algorithm));
        let ours = openssl.give(algorithm);
        openssl.run("pkeyutl -derive -inkey theirs.pem -peerkey ours.pub.pem -out secret");
        let pair = Pair::new(algorithm, Purpose::Agree, &ours.material).unwrap();
        let secret = pair.agree(&theirs.public.unwrap().spki_der).unwrap();
        assert_eq!(openssl.read("secret"), *secret, "{algorithm}");
    }
}

/// The recipe of the manual for a sender with OpenSSL alone.
#[test]
fn openssl_wraps_a_key_for_import() {
    let Some(openssl) = OpenSsl::here("openssl_wraps_a_key_for_import") else { return };
    let one = generate_one_time_key(ImportWrapping::RsaAes).unwrap();
    openssl.write("wrapping.pub.pem", one.public.unwrap().to_pem().unwrap());
    openssl
        .run("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -outform DER -out plain.der");
    openssl.run("pkcs8 -topk8 -nocrypt -inform DER -in plain.der -outform DER -out key.der");
    openssl.run("rand -out kek 32");
    let kek = HEXLOWER.encode(&openssl.read("kek"));
    openssl.run(&format!("enc -id-aes256-wrap-pad -K {kek} -iv A65959A6 -in key.der -out tail"));
    openssl.run(
        "pkeyutl -encrypt -pubin -inkey wrapping.pub.pem -pkeyopt rsa_padding_mode:oaep \
         -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256 -in kek -out head",
    );
    let wrapped = [openssl.read("head"), openssl.read("tail")].concat();
    let key = unwrap_rsa_aes(&one.material, &wrapped).unwrap();
    let made = import(Algorithm::EcdsaP256, key).unwrap();
    openssl.run("pkey -inform DER -in key.der -pubout -outform DER -out public.der");
    assert_eq!(made.public.unwrap().spki_der, openssl.read("public.der"));
}

/// A run of the script beside this file: a request and its answer, in JSON; `None` where it cannot run.
fn python(test: &str, request: &Value) -> Option<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("POLYKEY_PYTHON")
        .map_or_else(|| root.join("../.venv/bin/python"), PathBuf::from);
    let ready = Command::new(&python)
        .args(["-c", "from cryptography.hazmat.primitives.asymmetric import mlkem, mldsa"])
        .stdin(Stdio::null())
        .output();
    if !ready.is_ok_and(|output| output.status.success()) {
        skipped(test, "there is no Python with cryptography 48 (run .ci/deps)");
        return None;
    }
    let mut child = Command::new(&python)
        .arg(root.join("tests/interop.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{test}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

fn bytes(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

fn text(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

#[test]
fn python_shares_secrets_of_ml_kem() {
    let test = "python_shares_secrets_of_ml_kem";
    for (algorithm, name) in
        [(Algorithm::MlKem768, "MLKEM768"), (Algorithm::MlKem1024, "MLKEM1024")]
    {
        let ours = generate(algorithm, GenerationParams::default()).unwrap();
        let public = ours.public.unwrap();
        let request = json!({ "do": "encapsulate", "name": name, "spki": text(&public.spki_der) });
        let Some(answer) = python(test, &request) else { return };
        let pair = Pair::new(algorithm, Purpose::Encapsulate, &ours.material).unwrap();
        assert_eq!(
            pair.decapsulate(&bytes(&answer["ciphertext"])).unwrap().to_vec(),
            bytes(&answer["secret"])
        );

        // Their key comes as a seed; it decapsulates here as it does there.
        let theirs = python(test, &json!({ "do": "generate", "name": name })).unwrap();
        let made = import(algorithm, material(&bytes(&theirs["pkcs8"]))).unwrap();
        let public = made.public.unwrap();
        assert_eq!(public.spki_der, bytes(&theirs["spki"]));
        let (ciphertext, secret) = encapsulate(algorithm, &public).unwrap();
        let pair = Pair::new(algorithm, Purpose::Encapsulate, &made.material).unwrap();
        assert_eq!(pair.decapsulate(&ciphertext).unwrap(), secret);
        let request = json!({
            "do": "decapsulate", "name": name, "pkcs8": theirs["pkcs8"], "ciphertext": text(&ciphertext),
        });
        assert_eq!(bytes(&python(test, &request).unwrap()["secret"]), *secret);
    }
}

#[test]
fn python_verifies_and_makes_signatures_of_ml_dsa() {
    let test = "python_verifies_and_makes_signatures_of_ml_dsa";
    for (algorithm, name) in [
        (Algorithm::MlDsa44, "MLDSA44"),
        (Algorithm::MlDsa65, "MLDSA65"),
        (Algorithm::MlDsa87, "MLDSA87"),
    ] {
        let (scheme, input) = (SignatureScheme::MlDsa, SignInput::Message(MESSAGE));
        let ours = generate(algorithm, GenerationParams::default()).unwrap();
        let public = ours.public.unwrap();
        let pair = Pair::new(algorithm, Purpose::Sign, &ours.material).unwrap();
        let pkcs8 = ours.material.expose_for_export();
        let request = json!({
            "do": "verify", "name": name, "spki": text(&public.spki_der), "pkcs8": text(&pkcs8),
            "message": text(MESSAGE), "signature": text(&pair.sign(scheme, input).unwrap()),
        });
        let Some(answer) = python(test, &request) else { return };
        assert_eq!(
            (bytes(&answer["spki"]), &answer["valid"]),
            (public.spki_der.clone(), &json!(true))
        );
        let signature = bytes(&answer["signature"]);
        assert_eq!(verify(algorithm, scheme, &public, input, &signature), Ok(true));

        let theirs = python(test, &json!({ "do": "generate", "name": name })).unwrap();
        let made = import(algorithm, material(&bytes(&theirs["pkcs8"]))).unwrap();
        assert_eq!(made.public.unwrap().spki_der, bytes(&theirs["spki"]));
    }
}

/// An independent sender's HPKE (RFC 9180), with the information as it is documented.
#[test]
fn python_wraps_a_key_for_import_with_hpke() {
    let one = generate_one_time_key(ImportWrapping::Hpke).unwrap();
    let info = ImportInfo { node: [5; 16], token: b"a token".to_vec() };
    let request = json!({
        "do": "hpke", "spki": text(&one.public.unwrap().spki_der), "node": text(&info.node),
        "token": text(&info.token), "key": text(&[7; 32]),
    });
    let Some(answer) = python("python_wraps_a_key_for_import_with_hpke", &request) else { return };
    let key = unwrap_hpke(&one.material, &info, &bytes(&answer["wrapped"])).unwrap();
    assert_eq!(key.expose_for_export().as_slice(), [7; 32]);
}
