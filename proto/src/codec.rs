//! The codec of every generated client and server: protobuf with small buffers.
use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec as TonicCodec, DecodeBuf, Decoder as TonicDecoder};
use tonic::{Code, Status};
use tonic_prost::{ProstDecoder, ProstEncoder};

use crate::google::rpc::bad_request::FieldViolation;
use crate::google::rpc::{BadRequest, Status as RpcStatus};

/// Bytes a buffer starts with. Most messages are smaller; tonic's own 8 KiB cost 4 % of a request.
const INITIAL: usize = 512;
/// Bytes of a stream's messages to collect before they are handed on, as tonic has it.
const YIELD: usize = 32 * 1024;

/// Encodes `T` and decodes `U` as protobuf, in buffers that start at 512 bytes and grow at need.
#[derive(Debug, Clone)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> TonicCodec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Decoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(INITIAL, YIELD))
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(ProstDecoder::new(BufferSettings::new(INITIAL, YIELD)))
    }
}

/// Decodes protobuf. What does not decode is the sender's mistake, and the answer names none of the
/// types that it was held against.
#[derive(Debug, Clone)]
pub struct Decoder<U>(ProstDecoder<U>);

impl<U: Message + Default> TonicDecoder for Decoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        self.0.decode(buf).map_err(|_| undecodable())
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

fn undecodable() -> Status {
    const TEXT: &str = "invalid argument: the message is not valid protobuf of its type";
    let violation = FieldViolation {
        description: "the message is not valid protobuf of its type".into(),
        ..Default::default()
    };
    let bad = BadRequest { field_violations: vec![violation] };
    let detail = prost_types::Any {
        type_url: "type.googleapis.com/google.rpc.BadRequest".into(),
        value: bad.encode_to_vec(),
    };
    let code = Code::InvalidArgument;
    let status = RpcStatus { code: code as i32, message: TEXT.into(), details: vec![detail] };
    Status::with_details(code, TEXT, status.encode_to_vec().into())
}
