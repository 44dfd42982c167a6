//! The codec of every generated client and server: protobuf with small buffers.
use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec as TonicCodec};
use tonic_prost::{ProstDecoder, ProstEncoder};

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
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(INITIAL, YIELD))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(INITIAL, YIELD))
    }
}
