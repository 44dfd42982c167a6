//! How the node does, and reading its files again.

use data_encoding::HEXLOWER;
use polykey_proto::polykey::v2 as pb;
use tonic::Request;

use super::{AdminService, commands, event};
use crate::authz::{Action, Resource};
use crate::error::Error;
use crate::rpc::convert::timestamp;
use crate::time::Time;

/// Jobs that are counted.
const JOBS: usize = 1_000;

impl AdminService {
    pub(super) async fn get_node_status(
        &self,
        request: Request<pb::GetNodeStatusRequest>,
    ) -> Result<pb::GetNodeStatusResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        self.look(&cx, commands::ReadNode, &[("what", "status")]).await?;
        let (deps, admin) = (&self.0.deps, &self.0.admin);
        let vault = self.directory().vault();
        let now = deps.clock.now();
        let health = deps.health.report(now);
        let jobs = admin.jobs.list(JOBS).await?;
        let count = |of: &dyn Fn(&crate::jobs::Job) -> bool| {
            u32::try_from(jobs.iter().filter(|job| of(job)).count()).unwrap_or(u32::MAX)
        };
        let network = admin.network.get().map(|network| network.snapshot()).unwrap_or_default();
        let trail = deps.trail.status();
        let second = |seconds: u64| {
            timestamp(Time::from_seconds(i64::try_from(seconds).unwrap_or(i64::MAX)))
        };
        Ok(pb::GetNodeStatusResponse {
            health: health.status,
            problems: deps.health.problems(),
            version: health.service_version,
            build_commit: health.build_commit,
            now: Some(timestamp(now)),
            started_at: Some(timestamp(admin.loaded_at)),
            certificate_not_after: Some(second(admin.tls.certificate_not_after())),
            crl_next_update: admin.tls.crl_next_update().map(second),
            metrics: health.metrics,
            connections: network.connections_open,
            requests_in_flight: network.requests_in_flight,
            requests_refused: network.requests_refused,
            handshakes_failed: network.handshakes_failed,
            audit_tree_size: vault.head().leaves,
            audit_queued: trail.queued as u64,
            audit_capacity: trail.capacity as u64,
            jobs: count(&|_| true),
            jobs_due: count(&|job| job.at() <= now),
            jobs_failing: count(&|job| job.record.attempts > 0),
            next_job_at: jobs.first().map(|job| timestamp(job.at())),
            clock_suspended: admin.jobs.clock_in_doubt(),
            revision: vault.store().status().revision.0,
            node_id: HEXLOWER.encode(&vault.node_id()),
        })
    }

    pub(super) async fn reload_configuration(
        &self,
        request: Request<pb::ReloadConfigurationRequest>,
    ) -> Result<pb::ReloadConfigurationResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        let decision = self.authorize(&cx, Resource::Node, commands::Reload).await?;
        // Before it is done: what follows may change who may ask.
        let asked = event(&cx, Action::ReloadConfiguration, decision, &[]);
        self.0.deps.trail.record(asked).await?;
        let parts = (self.0.admin.reload)().await;
        let part = |(name, problem): (&str, Option<String>)| pb::ReloadedPart {
            name: name.to_owned(),
            ok: problem.is_none(),
            problem: problem.unwrap_or_default(),
        };
        Ok(pb::ReloadConfigurationResponse { parts: parts.into_iter().map(part).collect() })
    }
}
