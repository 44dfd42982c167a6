//! `grpc.health.v1`: the same state for whoever asks by the standard.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use polykey_proto::grpc::health::v1 as pb;
use polykey_proto::polykey::v2::{
    admin_service_server, key_lifecycle_service_server, polykey_service_server,
};
use tonic::{Request, Response, Status};

use super::{Health, State};
use pb::health_check_response::ServingStatus;

/// The services that can be asked about; "" is the node as a whole. All of them stand and fall
/// together.
pub const SERVICES: [&str; 5] = [
    "",
    pb::health_server::SERVICE_NAME,
    polykey_service_server::SERVICE_NAME,
    key_lifecycle_service_server::SERVICE_NAME,
    admin_service_server::SERVICE_NAME,
];

/// The service.
#[derive(Clone, Debug)]
pub struct HealthService(pub Arc<Health>);

fn answer(state: &State) -> pb::HealthCheckResponse {
    let status = if state.serves() { ServingStatus::Serving } else { ServingStatus::NotServing };
    pb::HealthCheckResponse { status: status.into() }
}

type Watching = Pin<Box<dyn Stream<Item = Result<pb::HealthCheckResponse, Status>> + Send>>;

#[tonic::async_trait]
impl pb::health_server::Health for HealthService {
    async fn check(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<pb::HealthCheckResponse>, Status> {
        if !SERVICES.contains(&request.get_ref().service.as_str()) {
            return Err(Status::not_found("unknown service"));
        }
        Ok(Response::new(answer(&self.0.state())))
    }

    type WatchStream = Watching;

    async fn watch(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<Watching>, Status> {
        if !SERVICES.contains(&request.get_ref().service.as_str()) {
            // The protocol has the call stay open: the service might come.
            let unknown = pb::HealthCheckResponse { status: ServingStatus::ServiceUnknown.into() };
            let once = futures::stream::once(async move { Ok(unknown) });
            let stream = futures::StreamExt::chain(once, futures::stream::pending());
            return Ok(Response::new(Box::pin(stream)));
        }
        let mut changes = self.0.watch();
        changes.mark_changed();
        // A change of reason alone is no change here.
        let stream = futures::stream::unfold((changes, None), |(mut changes, told)| async move {
            loop {
                // The sender is gone when the node is: the stream ends.
                changes.changed().await.ok()?;
                let now = answer(&changes.borrow_and_update());
                if told != Some(now.status) {
                    return Some((Ok(now), (changes, Some(now.status))));
                }
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures::StreamExt;
    use pb::health_server::Health as _;

    use super::*;

    fn asked(service: &str) -> Request<pb::HealthCheckRequest> {
        Request::new(pb::HealthCheckRequest { service: service.into() })
    }

    #[tokio::test]
    async fn checks_and_watches_tell_the_state() {
        let bad = Arc::new(AtomicBool::new(false));
        let look = Arc::clone(&bad);
        let health = Health::new(vec![Box::new(move || {
            if look.load(Ordering::Relaxed) { State::NotServing("x") } else { State::Serving }
        })]);
        let service = HealthService(Arc::clone(&health));
        for name in SERVICES {
            let told = service.check(asked(name)).await.unwrap().into_inner();
            assert_eq!(told.status(), ServingStatus::Serving);
        }
        let error = service.check(asked("nobody")).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::NotFound);
        let mut unknown = service.watch(asked("nobody")).await.unwrap().into_inner();
        let first = unknown.next().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::ServiceUnknown);

        let mut watching = service.watch(asked("")).await.unwrap().into_inner();
        let first = watching.next().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::Serving);
        bad.store(true, Ordering::Relaxed);
        health.refresh();
        let second = watching.next().await.unwrap().unwrap();
        assert_eq!(second.status(), ServingStatus::NotServing);
    }
}
