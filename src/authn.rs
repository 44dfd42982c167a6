//! Who the caller is: the certificate of the connection and the token of the request.

pub mod certificate;
