//! The client's half: where the server is, who we are, and a session that logs in by itself.
//!
//! ```no_run
//! use polykey::client::{Profile, Session, rpc};
//! use polykey_proto::polykey::v2 as pb;
//!
//! # async fn sample() -> Result<(), Box<dyn std::error::Error>> {
//! let profile = Profile::find(None)?;
//! let session = Session::connect(profile).await?;
//! let request = pb::CreateKeyRequest {
//!     key_type: pb::KeyType::Aes256.into(),
//!     description: "orders".into(),
//!     ..Default::default()
//! };
//! let created =
//!     session.mutate(request, rpc!(PolykeyServiceClient, create_key)).await?.into_inner();
//! println!("{}", created.key_id);
//! # Ok(())
//! # }
//! ```

mod failure;
pub(crate) mod file;
mod profile;
mod session;
mod token;

pub(crate) use failure::causes;
pub use failure::{Failure, Violation};
pub use profile::{Profile, ProfileError, ProfileText};
pub use session::{ClientError, MAX_MESSAGE, Session};
pub use token::{Token, TokenCache, TokenError};

/// The generated clients, for [`rpc!`].
#[doc(hidden)]
pub mod generated {
    pub use polykey_proto::polykey::v2::admin_service_client::AdminServiceClient;
    pub use polykey_proto::polykey::v2::crypto_service_client::CryptoServiceClient;
    pub use polykey_proto::polykey::v2::key_lifecycle_service_client::KeyLifecycleServiceClient;
    pub use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;
}

/// Names a method of a service for [`Session::read`] and [`Session::mutate`]:
/// `rpc!(PolykeyServiceClient, get_key)`.
#[macro_export]
#[doc(hidden)]
macro_rules! client_rpc {
    ($service:ident, $method:ident) => {
        |channel, request| {
            let mut client = $crate::client::generated::$service::new(channel)
                .max_decoding_message_size($crate::client::MAX_MESSAGE);
            async move { client.$method(request).await }
        }
    };
}
#[doc(inline)]
pub use crate::client_rpc as rpc;
