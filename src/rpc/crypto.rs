//! `polykey.v2.CryptoService`: keys at work, one operation a call, or many in a batch or stream.

mod large;
mod parse;
pub(crate) use parse::wire_scheme;

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::{StreamExt, stream};
use pb::crypto_operation::Operation;
use pb::crypto_result::Result as Outcome;
use polykey_proto::polykey::v2 as pb;
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use super::admit::Admitted;
use super::batch::Item;
use super::key_service::{Answers, KeyService};
use super::{convert, status, stream as streams};
use crate::command::Mutation;
use crate::context::Context;
use crate::error::Error;
use crate::keyring::work::{Checked, Encrypted, Shared};
use crate::limits;
use crate::share::Places;

/// Operations of a batch worked on at the same time: slow ones have threads of their own.
const PARALLEL: usize = 16;
/// Random bytes that one batch may ask for.
const BATCH_RANDOM: usize = 4 * 1024 * 1024;

/// Bytes of results after which a batch does nothing more.
const ANSWER: usize = 4 * 1024 * 1024;
/// Large streams at the same time, each of which holds some MiB.
const LARGE_STREAMS: usize = 64;

/// The service; it works on the same keyring, in the same ways. Beside it, the places of large streams.
#[derive(Clone)]
pub(crate) struct CryptoService(KeyService, Places<String>);

impl CryptoService {
    pub(crate) fn new(keys: KeyService) -> Self {
        Self(keys, Places::new(LARGE_STREAMS))
    }
}

/// One operation's surroundings.
struct Call<'a> {
    service: &'a KeyService,
    admitted: &'a Admitted,
    cx: Context,
    /// The idempotency method and item of an import.
    import: (&'static str, u32),
}

fn number(version: u32) -> i32 {
    i32::try_from(version).unwrap_or(i32::MAX)
}

fn bytes(secret: &[u8]) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(secret)
}

impl Call<'_> {
    fn keyring(&self) -> &crate::keyring::Keyring {
        &self.service.0.keyring
    }

    async fn encrypt(&self, m: pb::EncryptRequest) -> Result<pb::EncryptResponse, Error> {
        let done = self.keyring().encrypt(&self.cx, &parse::encrypt(m)?).await?;
        let Encrypted { ciphertext, key, version, algorithm } = done;
        Ok(pb::EncryptResponse {
            ciphertext: ciphertext.into(),
            key_id: key.to_string(),
            version: number(version),
            algorithm: algorithm.name().to_owned(),
        })
    }

    async fn decrypt(&self, m: pb::DecryptRequest) -> Result<pb::DecryptResponse, Error> {
        let mut done = self.keyring().decrypt(&self.cx, &parse::decrypt(m)?).await?;
        Ok(pb::DecryptResponse {
            plaintext: std::mem::take(&mut *done.plaintext).into(),
            key_id: done.key.to_string(),
            version: number(done.version),
            algorithm: done.algorithm.name().to_owned(),
        })
    }

    async fn rewrap(&self, m: pb::RewrapRequest) -> Result<pb::RewrapResponse, Error> {
        let done = self.keyring().rewrap(&self.cx, &parse::rewrap(m)?).await?;
        Ok(pb::RewrapResponse {
            ciphertext: done.now.ciphertext.into(),
            key_id: done.now.key.to_string(),
            version: number(done.now.version),
            algorithm: done.now.algorithm.name().to_owned(),
            source_key_id: done.key.to_string(),
            source_version: number(done.version),
        })
    }

    async fn generate_data_key(
        &self,
        m: pb::GenerateDataKeyRequest,
    ) -> Result<pb::GenerateDataKeyResponse, Error> {
        let (command, shown) = parse::data_key(m)?;
        let done = self.keyring().generate_data_key(&self.cx, &command, shown).await?;
        Ok(pb::GenerateDataKeyResponse {
            plaintext: done.plaintext.map(|p| bytes(&p)).unwrap_or_default(),
            ciphertext: done.sealed.ciphertext.into(),
            key_id: done.sealed.key.to_string(),
            version: number(done.sealed.version),
            public_key_der: done.public.into(),
            audit_index: done.leaf.unwrap_or(0),
        })
    }

    async fn sign(&self, m: pb::SignRequest) -> Result<pb::SignResponse, Error> {
        let done = self.keyring().sign(&self.cx, &parse::sign(m)?).await?;
        Ok(pb::SignResponse {
            signature: done.signature.into(),
            key_id: done.key.to_string(),
            version: number(done.version),
            scheme: wire_scheme(done.scheme).into(),
        })
    }

    async fn verify(&self, m: pb::VerifyRequest) -> Result<pb::VerifyResponse, Error> {
        let Checked { valid, key, version } =
            self.keyring().verify(&self.cx, &parse::verify(m)?).await?;
        Ok(pb::VerifyResponse { valid, key_id: key.to_string(), version: number(version) })
    }

    async fn generate_mac(
        &self,
        m: pb::GenerateMacRequest,
    ) -> Result<pb::GenerateMacResponse, Error> {
        let done = self.keyring().mac(&self.cx, &parse::generate_mac(m)?).await?;
        Ok(pb::GenerateMacResponse {
            mac: done.mac.into(),
            key_id: done.key.to_string(),
            version: number(done.version),
        })
    }

    async fn verify_mac(&self, m: pb::VerifyMacRequest) -> Result<pb::VerifyMacResponse, Error> {
        let Checked { valid, key, version } =
            self.keyring().verify_mac(&self.cx, &parse::verify_mac(m)?).await?;
        Ok(pb::VerifyMacResponse { valid, key_id: key.to_string(), version: number(version) })
    }

    async fn derive_key(&self, m: pb::DeriveKeyRequest) -> Result<pb::DeriveKeyResponse, Error> {
        let Shared { secret, ciphertext: _, key, version, leaf } =
            self.keyring().derive(&self.cx, &parse::derive(m)?).await?;
        Ok(pb::DeriveKeyResponse {
            derived_key: bytes(&secret),
            key_id: key.to_string(),
            version: number(version),
            audit_index: leaf,
        })
    }

    async fn agree(&self, m: pb::AgreeRequest) -> Result<pb::AgreeResponse, Error> {
        let Shared { secret, ciphertext: _, key, version, leaf } =
            self.keyring().agree(&self.cx, &parse::agree(m)?).await?;
        Ok(pb::AgreeResponse {
            shared_secret: bytes(&secret),
            key_id: key.to_string(),
            version: number(version),
            audit_index: leaf,
        })
    }

    async fn encapsulate(
        &self,
        m: pb::EncapsulateRequest,
    ) -> Result<pb::EncapsulateResponse, Error> {
        let Shared { secret, ciphertext, key, version, leaf } =
            self.keyring().encapsulate(&self.cx, &parse::encapsulate(m)?).await?;
        Ok(pb::EncapsulateResponse {
            ciphertext: ciphertext.into(),
            shared_secret: bytes(&secret),
            key_id: key.to_string(),
            version: number(version),
            audit_index: leaf,
        })
    }

    async fn decapsulate(
        &self,
        m: pb::DecapsulateRequest,
    ) -> Result<pb::DecapsulateResponse, Error> {
        let Shared { secret, ciphertext: _, key, version, leaf } =
            self.keyring().decapsulate(&self.cx, &parse::decapsulate(m)?).await?;
        Ok(pb::DecapsulateResponse {
            shared_secret: bytes(&secret),
            key_id: key.to_string(),
            version: number(version),
            audit_index: leaf,
        })
    }

    async fn wrap_key(&self, m: pb::WrapKeyRequest) -> Result<pb::WrapKeyResponse, Error> {
        let done = self.keyring().wrap(&self.cx, &parse::wrap(m)?).await?;
        Ok(pb::WrapKeyResponse {
            wrapped_key: done.bytes.into(),
            key_id: done.key.to_string(),
            version: number(done.version),
            algorithm: done.algorithm.to_owned(),
            audit_index: done.leaf.unwrap_or(0),
        })
    }

    async fn unwrap_key(&self, m: pb::UnwrapKeyRequest) -> Result<pb::UnwrapKeyResponse, Error> {
        let Shared { secret, ciphertext: _, key, version, leaf } =
            self.keyring().unwrap(&self.cx, &parse::unwrap(m)?).await?;
        Ok(pb::UnwrapKeyResponse {
            key_material: bytes(&secret),
            key_id: key.to_string(),
            version: number(version),
            audit_index: leaf,
        })
    }

    async fn generate_random(
        &self,
        m: pb::GenerateRandomRequest,
    ) -> Result<pb::GenerateRandomResponse, Error> {
        let random = self.keyring().random(&self.cx, &parse::random(m)?).await?;
        Ok(pb::GenerateRandomResponse { random: random.into() })
    }

    async fn get_public_key(
        &self,
        m: pb::GetPublicKeyRequest,
    ) -> Result<pb::GetPublicKeyResponse, Error> {
        let done = self.keyring().public(&self.cx, &parse::public_key(m)?).await?;
        Ok(pb::GetPublicKeyResponse {
            public_key: done.bytes.into(),
            key_id: done.key.to_string(),
            version: number(done.version),
            key_type: convert::key_type(done.algorithm).into(),
            purpose: convert::purpose(done.purpose).into(),
            schemes: done.schemes.into_iter().map(|s| wire_scheme(s).into()).collect(),
        })
    }

    async fn get_import_parameters(
        &self,
        m: pb::GetImportParametersRequest,
    ) -> Result<pb::GetImportParametersResponse, Error> {
        let key = self.admitted.once("GetImportParameters", 0, m.encode_to_vec());
        let command = parse::import_parameters(m)?;
        let done = self.keyring().import_parameters(&self.cx, &command, key.as_ref()).await?;
        Ok(pb::GetImportParametersResponse {
            public_key: done.public.into(),
            import_token: parse::token(&done.id),
            expires_at: Some(convert::timestamp(done.expires_at)),
            hpke_info: done.info.into(),
        })
    }

    async fn import_key(
        &self,
        mut m: pb::ImportKeyRequest,
    ) -> Result<pb::ImportKeyResponse, Error> {
        let requester = m.key.as_mut().and_then(|key| key.requester_context.take());
        let cx = self
            .admitted
            .context(requester.as_ref(), None)
            .map_err(|error| parse::within("key", error))?;
        let encoded = m.encode_to_vec();
        let command = parse::import(m, self.admitted.times_from())?;
        let mutation = Mutation::Create(Box::new(command));
        let place = self.import;
        let (done, view) =
            self.service.change_item(&cx, self.admitted, &mutation, place, encoded).await?;
        let key = convert::create_response(&done, &view, cx.now);
        Ok(pb::ImportKeyResponse { key: Some(key) })
    }

    /// One operation of several.
    async fn run(&self, operation: Operation) -> Result<Outcome, Error> {
        Ok(match operation {
            Operation::Encrypt(m) => Outcome::Encrypt(self.encrypt(m).await?),
            Operation::Decrypt(m) => Outcome::Decrypt(self.decrypt(m).await?),
            Operation::Rewrap(m) => Outcome::Rewrap(self.rewrap(m).await?),
            Operation::GenerateDataKey(m) => {
                Outcome::GenerateDataKey(self.generate_data_key(m).await?)
            }
            Operation::Sign(m) => Outcome::Sign(self.sign(m).await?),
            Operation::Verify(m) => Outcome::Verify(self.verify(m).await?),
            Operation::GenerateMac(m) => Outcome::GenerateMac(self.generate_mac(m).await?),
            Operation::VerifyMac(m) => Outcome::VerifyMac(self.verify_mac(m).await?),
            Operation::DeriveKey(m) => Outcome::DeriveKey(self.derive_key(m).await?),
            Operation::Agree(m) => Outcome::Agree(self.agree(m).await?),
            Operation::Encapsulate(m) => Outcome::Encapsulate(self.encapsulate(m).await?),
            Operation::Decapsulate(m) => Outcome::Decapsulate(self.decapsulate(m).await?),
            Operation::WrapKey(m) => Outcome::WrapKey(self.wrap_key(m).await?),
            Operation::UnwrapKey(m) => Outcome::UnwrapKey(self.unwrap_key(m).await?),
            Operation::GenerateRandom(m) => Outcome::GenerateRandom(self.generate_random(m).await?),
            Operation::GetPublicKey(m) => Outcome::GetPublicKey(self.get_public_key(m).await?),
            Operation::ImportKey(m) => Outcome::ImportKey(Box::pin(self.import_key(m)).await?),
        })
    }
}

/// The name of an operation, as its field has it.
fn name(operation: &Operation) -> &'static str {
    match operation {
        Operation::Encrypt(_) => "encrypt",
        Operation::Decrypt(_) => "decrypt",
        Operation::Rewrap(_) => "rewrap",
        Operation::GenerateDataKey(_) => "generate_data_key",
        Operation::Sign(_) => "sign",
        Operation::Verify(_) => "verify",
        Operation::GenerateMac(_) => "generate_mac",
        Operation::VerifyMac(_) => "verify_mac",
        Operation::DeriveKey(_) => "derive_key",
        Operation::Agree(_) => "agree",
        Operation::Encapsulate(_) => "encapsulate",
        Operation::Decapsulate(_) => "decapsulate",
        Operation::WrapKey(_) => "wrap_key",
        Operation::UnwrapKey(_) => "unwrap_key",
        Operation::GenerateRandom(_) => "generate_random",
        Operation::GetPublicKey(_) => "get_public_key",
        Operation::ImportKey(_) => "import_key",
    }
}

/// What an item of several is answered with.
fn outcome(item: Item<Outcome>) -> Outcome {
    let failure = item.failure();
    match item {
        Item::Done(outcome) => outcome,
        Item::Failed(_) | Item::NotTried | Item::NoRoom => {
            let (message, code, reason) = failure.unwrap_or_default();
            Outcome::Error(pb::CryptoError { code, message, reason })
        }
    }
}

/// Runs one operation of several; its fields are named from `path` on.
async fn run_one(call: &Call<'_>, path: &str, operation: pb::CryptoOperation) -> Item<Outcome> {
    let pb::CryptoOperation { operation, reference } = operation;
    if reference.len() > limits::REFERENCE {
        let text = "must have at most 256 bytes";
        return Item::Failed(parse::within(path, Error::invalid("reference", text)));
    }
    let Some(operation) = operation else {
        return Item::Failed(parse::within(path, Error::invalid("operation", "must be set")));
    };
    let path = format!("{path}.{}", name(&operation));
    match call.run(operation).await {
        Ok(outcome) => Item::Done(outcome),
        Err(failure) => {
            status::log(&failure);
            Item::Failed(parse::within(&path, failure))
        }
    }
}

impl CryptoService {
    async fn batch(
        &self,
        request: Request<pb::BatchCryptoRequest>,
    ) -> Result<pb::BatchCryptoResponse, Error> {
        let first = self.0.admit(&request)?;
        let pb::BatchCryptoRequest { operations, continue_on_error } = request.into_inner();
        if !(1..=limits::BATCH).contains(&operations.len()) {
            return Err(Error::invalid("operations", "must have 1 to 1000 items"));
        }
        self.0.count_items(&first, "BatchCrypto", ("operations", operations.len()))?;
        let random = |o: &pb::CryptoOperation| match &o.operation {
            Some(Operation::GenerateRandom(m)) => usize::try_from(m.length).unwrap_or(0),
            _ => 0,
        };
        if operations.iter().map(random).fold(0, usize::saturating_add) > BATCH_RANDOM {
            return Err(Error::invalid("operations", "ask for more than 4 MiB of random bytes"));
        }
        let references: Vec<String> = operations.iter().map(|o| o.reference.clone()).collect();
        let answered = AtomicUsize::new(0);
        let one = |(index, operation): (usize, pb::CryptoOperation)| {
            let (service, first, answered) = (&self.0, &first, &answered);
            async move {
                let path = format!("operations[{index}]");
                if answered.load(Ordering::Relaxed) > ANSWER {
                    return outcome(Item::NoRoom);
                }
                let again = async {
                    let admitted = first.again(&service.0).await?;
                    let cx = admitted.context(None, None)?;
                    Ok::<_, Error>((admitted, cx))
                };
                let (admitted, cx) = match again.await {
                    Ok(now) => now,
                    Err(failure) => return outcome(Item::Failed(failure)),
                };
                let item = u32::try_from(index).unwrap_or(u32::MAX);
                let import = ("BatchCrypto", item);
                let call = Call { service, admitted: &admitted, cx, import };
                let outcome = outcome(Box::pin(run_one(&call, &path, operation)).await);
                answered.fetch_add(outcome.encoded_len(), Ordering::Relaxed);
                outcome
            }
        };
        let mut outcomes = Vec::with_capacity(references.len());
        let items = operations.into_iter().enumerate();
        if continue_on_error {
            outcomes = stream::iter(items.map(one)).buffered(PARALLEL).collect().await;
        } else {
            let mut failed = false;
            for item in items {
                let outcome = if failed { outcome(Item::NotTried) } else { one(item).await };
                failed |= matches!(outcome, Outcome::Error(_));
                outcomes.push(outcome);
            }
        }
        let failed = outcomes.iter().filter(|o| matches!(o, Outcome::Error(_))).count();
        let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let (successful_count, failed_count) = (count(outcomes.len() - failed), count(failed));
        let result = |((index, outcome), reference): ((usize, Outcome), String)| pb::CryptoResult {
            result: Some(outcome),
            reference: if reference.len() > limits::REFERENCE { String::new() } else { reference },
            index: i64::try_from(index).unwrap_or(i64::MAX),
        };
        let results = outcomes.into_iter().enumerate().zip(references).map(result).collect();
        Ok(pb::BatchCryptoResponse { results, successful_count, failed_count })
    }
}

/// The stream of operations.
struct Operations;

#[tonic::async_trait]
impl streams::Operation for Operations {
    type Ask = pb::CryptoOperation;
    type Answer = pb::CryptoResult;
    type Done = Outcome;

    async fn act(
        service: &KeyService,
        admitted: &Admitted,
        ask: Self::Ask,
        sequence: i64,
    ) -> (String, Item<Outcome>) {
        let reference = match ask.reference.len() {
            0..=limits::REFERENCE => ask.reference.clone(),
            _ => String::new(),
        };
        let item = match admitted.context(None, None) {
            Ok(cx) => {
                let item = u32::try_from(sequence).unwrap_or(u32::MAX);
                let call = Call { service, admitted, cx, import: ("StreamCrypto", item) };
                Box::pin(run_one(&call, "operation", ask)).await
            }
            Err(failure) => Item::Failed(failure),
        };
        (reference, item)
    }

    fn answer(reference: String, item: Item<Outcome>, sequence: i64) -> pb::CryptoResult {
        pb::CryptoResult { result: Some(outcome(item)), reference, index: sequence - 1 }
    }
}

macro_rules! unary {
    ($($method:ident($Request:ident) -> $Response:ident;)*) => {
        #[tonic::async_trait]
        impl pb::crypto_service_server::CryptoService for CryptoService {
            $(async fn $method(
                &self,
                request: Request<pb::$Request>,
            ) -> Result<Response<pb::$Response>, Status> {
                let admitted = self.0.admit(&request)?;
                let cx = admitted.context(None, None)?;
                let import = ("ImportKey", 0);
                let call = Call { service: &self.0, admitted: &admitted, cx, import };
                Ok(Response::new(call.$method(request.into_inner()).await?))
            })*

            async fn batch_crypto(
                &self,
                request: Request<pb::BatchCryptoRequest>,
            ) -> Result<Response<pb::BatchCryptoResponse>, Status> {
                Ok(Response::new(self.batch(request).await?))
            }

            type StreamCryptoStream = Answers<pb::CryptoResult>;

            async fn stream_crypto(
                &self,
                request: Request<Streaming<pb::CryptoOperation>>,
            ) -> Result<Response<Self::StreamCryptoStream>, Status> {
                streams::run::<Operations>(&self.0, request).map_err(Status::from)
            }

            type EncryptStreamStream = Answers<pb::EncryptStreamResponse>;

            async fn encrypt_stream(
                &self,
                request: Request<Streaming<pb::EncryptStreamRequest>>,
            ) -> Result<Response<Self::EncryptStreamStream>, Status> {
                large::encrypt(self, request).await.map_err(Status::from)
            }

            type DecryptStreamStream = Answers<pb::DecryptStreamResponse>;

            async fn decrypt_stream(
                &self,
                request: Request<Streaming<pb::DecryptStreamRequest>>,
            ) -> Result<Response<Self::DecryptStreamStream>, Status> {
                large::decrypt(self, request).await.map_err(Status::from)
            }
        }
    };
}

unary! {
    encrypt(EncryptRequest) -> EncryptResponse;
    decrypt(DecryptRequest) -> DecryptResponse;
    rewrap(RewrapRequest) -> RewrapResponse;
    generate_data_key(GenerateDataKeyRequest) -> GenerateDataKeyResponse;
    sign(SignRequest) -> SignResponse;
    verify(VerifyRequest) -> VerifyResponse;
    generate_mac(GenerateMacRequest) -> GenerateMacResponse;
    verify_mac(VerifyMacRequest) -> VerifyMacResponse;
    derive_key(DeriveKeyRequest) -> DeriveKeyResponse;
    agree(AgreeRequest) -> AgreeResponse;
    encapsulate(EncapsulateRequest) -> EncapsulateResponse;
    decapsulate(DecapsulateRequest) -> DecapsulateResponse;
    wrap_key(WrapKeyRequest) -> WrapKeyResponse;
    unwrap_key(UnwrapKeyRequest) -> UnwrapKeyResponse;
    generate_random(GenerateRandomRequest) -> GenerateRandomResponse;
    get_public_key(GetPublicKeyRequest) -> GetPublicKeyResponse;
    get_import_parameters(GetImportParametersRequest) -> GetImportParametersResponse;
    import_key(ImportKeyRequest) -> ImportKeyResponse;
}
