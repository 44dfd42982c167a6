//! A client that is told methods by name and messages as JSON, and takes both from the contract's descriptors.

use std::str::FromStr;
use std::sync::LazyLock;

use futures::StreamExt;
use http::uri::PathAndQuery;
use polykey::net::client::{ClientFiles, ClientTls, ConnectOptions};
use polykey_proto::google::rpc;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, MessageDescriptor, MethodDescriptor, SerializeOptions,
};
use serde_json::{Value, json};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue, MetadataKey, MetadataMap};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(polykey_proto::FILE_DESCRIPTOR_SET).unwrap());

/// The contract.
pub(crate) fn pool() -> &'static DescriptorPool {
    &POOL
}

/// The method of this name in any service of the contract; `Service/Method` where the name alone would not do.
pub(crate) fn method(name: &str) -> MethodDescriptor {
    let (service, short) = name.split_once('/').map_or((None, name), |(s, m)| (Some(s), m));
    pool()
        .services()
        .filter(|s| service.is_none_or(|name| s.name() == name))
        .flat_map(|s| s.methods().collect::<Vec<_>>())
        .find(|m| m.name() == short)
        .unwrap_or_else(|| panic!("no method {name}"))
}

/// `/package.Service/Method`.
pub(crate) fn path(method: &MethodDescriptor) -> String {
    format!("/{}/{}", method.parent_service().full_name(), method.name())
}

/// The message that this JSON stands for.
pub(crate) fn message(descriptor: MessageDescriptor, body: &Value) -> DynamicMessage {
    let name = descriptor.full_name().to_owned();
    DynamicMessage::deserialize(descriptor, body)
        .unwrap_or_else(|error| panic!("{name} of {body}: {error}"))
}

fn text(message: &DynamicMessage) -> Value {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .skip_default_fields(false)
        .stringify_64_bit_integers(false);
    message.serialize_with_options(serde_json::value::Serializer, &options).unwrap()
}

#[derive(Clone)]
struct Dynamic(MessageDescriptor);

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        self.clone()
    }

    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Encoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        DynamicMessage::decode(self.0.clone(), buffer)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    /// The message, or all messages of a stream.
    pub(crate) body: Value,
    /// Headers and trailers.
    pub(crate) metadata: MetadataMap,
}

impl Reply {
    /// A binary header or trailer.
    pub(crate) fn header_bin(&self, name: &str) -> Option<Vec<u8>> {
        self.metadata.get_bin(name).map(|value| value.to_bytes().unwrap().to_vec())
    }
}

/// A refusal, with its details decoded.
#[derive(Debug, Clone)]
pub(crate) struct Fail {
    /// The code.
    pub(crate) code: Code,
    /// Its text.
    pub(crate) text: String,
    /// `field: description`, or of quotas `name: description`.
    pub(crate) violations: Vec<(String, String)>,
    /// Of google.rpc.ErrorInfo.
    pub(crate) reason: String,
    /// Of google.rpc.RetryInfo.
    pub(crate) retry: bool,
    /// All of it.
    pub(crate) status: Status,
}

impl From<Status> for Fail {
    fn from(status: Status) -> Self {
        let mut fail = Self {
            code: status.code(),
            text: status.message().to_owned(),
            violations: Vec::new(),
            reason: String::new(),
            retry: false,
            status: status.clone(),
        };
        let details = rpc::Status::decode(status.details()).unwrap_or_default().details;
        for any in details {
            match any.type_url.rsplit('/').next().unwrap_or_default() {
                "google.rpc.BadRequest" => {
                    let bad = rpc::BadRequest::decode(any.value.as_slice()).unwrap();
                    fail.violations
                        .extend(bad.field_violations.into_iter().map(|v| (v.field, v.description)));
                }
                "google.rpc.ErrorInfo" => {
                    fail.reason = rpc::ErrorInfo::decode(any.value.as_slice()).unwrap().reason;
                }
                "google.rpc.QuotaFailure" => {
                    let quotas = rpc::QuotaFailure::decode(any.value.as_slice()).unwrap();
                    let all = quotas.violations.into_iter().map(|v| (v.quota_id, v.description));
                    fail.violations.extend(all);
                }
                "google.rpc.RetryInfo" => fail.retry = true,
                other => panic!("unexpected detail {other}"),
            }
        }
        fail
    }
}

/// Metadata of a request; a name that ends in `-bin` is sent as binary.
pub(crate) type Meta<'a> = &'a [(&'a str, &'a [u8])];

/// Someone with a certificate, and perhaps a token.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) channel: Channel,
    pub(crate) address: String,
    pub(crate) files: ClientFiles,
    pub(crate) id: String,
    pub(crate) api_key: String,
    pub(crate) token: String,
    pub(crate) refresh: String,
}

impl Client {
    pub(crate) fn new(address: &str, files: ClientFiles, id: &str, api_key: &str) -> Self {
        let channel = ClientTls::load(&files)
            .unwrap()
            .connect_lazy(&format!("https://{address}"), &ConnectOptions::default())
            .unwrap();
        Self {
            channel,
            address: address.to_owned(),
            files,
            id: id.to_owned(),
            api_key: api_key.to_owned(),
            token: String::new(),
            refresh: String::new(),
        }
    }

    /// The same client at another address, as after a restart.
    pub(crate) fn at(&self, address: &str) -> Self {
        let fresh = Self::new(address, self.files.clone(), &self.id, &self.api_key);
        Self { token: self.token.clone(), refresh: self.refresh.clone(), ..fresh }
    }

    /// The same client over a connection of its own with another certificate.
    pub(crate) fn with_files(&self, files: ClientFiles) -> Self {
        let fresh = Self::new(&self.address, files, &self.id, &self.api_key);
        Self { token: self.token.clone(), refresh: self.refresh.clone(), ..fresh }
    }

    /// The same connection with another token.
    pub(crate) fn with_token(&self, token: &str) -> Self {
        Self { token: token.to_owned(), ..self.clone() }
    }

    /// Logs in with the API key where there is one, else with the certificate alone.
    pub(crate) async fn login(&mut self) -> Result<Value, Fail> {
        let body = if self.api_key.is_empty() {
            json!({"client_id": self.id, "grant_type": "mtls"})
        } else {
            json!({"client_id": self.id, "api_key": self.api_key})
        };
        let reply = self.with_token("").call("Authenticate", body).await?;
        self.token = reply["access_token"].as_str().unwrap().to_owned();
        self.refresh = reply["refresh_token"].as_str().unwrap().to_owned();
        Ok(reply)
    }

    /// A call of a unary method.
    pub(crate) async fn call(&self, name: &str, body: Value) -> Result<Value, Fail> {
        Ok(self.call_with(name, body, &[]).await?.body)
    }

    /// A call of a unary method, with metadata.
    pub(crate) async fn call_with(
        &self,
        name: &str,
        body: Value,
        meta: Meta<'_>,
    ) -> Result<Reply, Fail> {
        let method = method(name);
        let body = message(method.input(), &body);
        self.send(&method, vec![body], meta).await
    }

    /// A call of a streaming method; all answers.
    pub(crate) async fn stream(&self, name: &str, bodies: Vec<Value>) -> Result<Vec<Value>, Fail> {
        let reply = self.stream_with(name, bodies, &[]).await?;
        Ok(reply.body.as_array().unwrap().clone())
    }

    /// A call of a streaming method, with metadata.
    pub(crate) async fn stream_with(
        &self,
        name: &str,
        bodies: Vec<Value>,
        meta: Meta<'_>,
    ) -> Result<Reply, Fail> {
        let method = method(name);
        let bodies = bodies.iter().map(|body| message(method.input(), body)).collect();
        self.send(&method, bodies, meta).await
    }

    /// Any call.
    pub(crate) async fn send(
        &self,
        method: &MethodDescriptor,
        mut messages: Vec<DynamicMessage>,
        meta: Meta<'_>,
    ) -> Result<Reply, Fail> {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone())
            .max_decoding_message_size(64 * 1024 * 1024)
            .max_encoding_message_size(64 * 1024 * 1024);
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_str(&path(method)).unwrap();
        let codec = Dynamic(method.output());
        let mut metadata = MetadataMap::new();
        if !self.token.is_empty() {
            let value = format!("Bearer {}", self.token);
            metadata.insert("authorization", value.parse().unwrap());
        }
        for (name, value) in meta {
            if name.ends_with("-bin") {
                let name = MetadataKey::from_bytes(name.as_bytes()).unwrap();
                metadata.append_bin(name, BinaryMetadataValue::from_bytes(value));
            } else {
                let name = MetadataKey::from_bytes(name.as_bytes()).unwrap();
                metadata.append(name, AsciiMetadataValue::try_from(*value).unwrap());
            }
        }
        if !method.is_client_streaming() && !method.is_server_streaming() {
            let mut request = Request::new(messages.remove(0));
            *request.metadata_mut() = metadata;
            let reply = grpc.unary(request, path, codec).await?;
            let (metadata, body, _) = reply.into_parts();
            return Ok(Reply { body: text(&body), metadata });
        }
        let mut request = Request::new(futures::stream::iter(messages));
        *request.metadata_mut() = metadata;
        let (mut metadata, mut stream, _) =
            grpc.streaming(request, path, codec).await?.into_parts();
        let mut bodies = Vec::new();
        while let Some(body) = stream.next().await {
            bodies.push(text(&body?));
        }
        if let Some(trailers) = stream.trailers().await? {
            metadata = {
                let mut headers = metadata.into_headers();
                headers.extend(trailers.into_headers());
                MetadataMap::from_headers(headers)
            };
        }
        Ok(Reply { body: Value::Array(bodies), metadata })
    }

    /// Creates a key with these fields and gives its id.
    pub(crate) async fn create(&self, fields: Value) -> String {
        let mut body = json!({"key_type": "KEY_TYPE_AES_256"});
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        let created = self.call("CreateKey", body).await.unwrap();
        created["key_id"].as_str().unwrap().to_owned()
    }
}

/// The refusal of a call that must fail.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Fail>, code: Code) -> Fail {
    let fail = result.unwrap_err();
    assert_eq!(fail.code, code, "{fail:?}");
    fail
}
