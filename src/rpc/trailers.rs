//! Response trailers of successful calls: what clients whose stubs lack a field read instead.

use std::pin::Pin;
use std::task::{Context, Poll};

use http::{HeaderMap, HeaderName, HeaderValue, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::body::Body;
use tower::Service;

/// The refresh token of a login or refresh.
pub(crate) const REFRESH_TOKEN: HeaderName = HeaderName::from_static("polykey-refresh-token");
/// The key's revision after the call.
pub(crate) const REVISION: HeaderName = HeaderName::from_static("polykey-revision");
/// Exported material.
pub(crate) const PLAINTEXT: HeaderName = HeaderName::from_static("polykey-plaintext-bin");

/// Trailers that a handler wants on its answer, in the response's extensions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trailers(HeaderMap);

impl Trailers {
    /// Text, if it is fit for a header.
    pub(crate) fn text(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(mut value) = HeaderValue::from_str(value) {
            value.set_sensitive(name == REFRESH_TOKEN);
            self.0.insert(name, value);
        }
        self
    }

    /// Bytes, in base64 as gRPC has it for names that end in `-bin`.
    pub(crate) fn binary(mut self, name: HeaderName, value: &[u8]) -> Self {
        let text = data_encoding::BASE64_NOPAD.encode(value);
        if let Ok(mut value) = HeaderValue::from_str(&text) {
            value.set_sensitive(true);
            self.0.insert(name, value);
        }
        self
    }
}

/// Puts [`Trailers`] where they belong.
#[derive(Clone, Debug)]
pub(crate) struct WithTrailers<S>(pub(crate) S);

impl<S, R> Service<R> for WithTrailers<S>
where
    S: Service<R, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            let Some(Trailers(extra)) = response.extensions_mut().remove::<Trailers>() else {
                return Ok(response);
            };
            Ok(response.map(|body| Body::new(Trailed { body, extra: Some(extra) })))
        })
    }
}

struct Trailed {
    body: Body,
    extra: Option<HeaderMap>,
}

impl HttpBody for Trailed {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
            && let Some(extra) = self.extra.take()
        {
            trailers.extend(extra);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
