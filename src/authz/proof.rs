//! The permit is the command: a value that only a decision of this module can make.

use std::fmt;
use std::sync::Arc;

use super::action::{Action, ActionSet};
use super::facts::{DecisionId, PrincipalFacts, ResourceId};
use super::policies::PolicyId;

/// A parsed request that says which right it takes.
pub trait Command {
    /// The right that every such command takes.
    const ACTION: Action;

    /// Further rights that this one takes, for instance [`Action::ShareKey`] when an update
    /// touches contexts. All of them must be allowed.
    fn also(&self) -> ActionSet {
        ActionSet::EMPTY
    }
}

/// A command that its principal may carry out, on one resource. There is no other way to get one
/// than [`Authorizer::authorize`](super::Authorizer::authorize):
///
/// ```compile_fail,E0451
/// use polykey::authz::{Action, Authorized, Command};
/// struct Revoke;
/// impl Command for Revoke {
///     const ACTION: Action = Action::RevokeKey;
/// }
/// fn forge(from: Authorized<Revoke>) -> Authorized<Revoke> {
///     Authorized { command: Revoke, ..from }
/// }
/// ```
///
/// Nor can one be used twice, where the action must happen once:
///
/// ```compile_fail,E0599
/// use polykey::authz::Authorized;
/// fn twice<C>(permit: Authorized<C>) -> (Authorized<C>, Authorized<C>) {
///     (permit.clone(), permit)
/// }
/// ```
#[must_use = "an authorized command that is dropped has no effect"]
pub struct Authorized<C> {
    command: C,
    principal: Arc<PrincipalFacts>,
    resource: ResourceId,
    actions: ActionSet,
    decision_id: DecisionId,
    reasons: Arc<[PolicyId]>,
}

/// Leaves the command out: it may carry a secret.
impl<C> fmt::Debug for Authorized<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorized")
            .field("client", &self.principal.client)
            .field("resource", &self.resource)
            .field("actions", &self.actions)
            .field("decision_id", &self.decision_id)
            .finish_non_exhaustive()
    }
}

/// What an [`Authorized`] is made of, for those who carry it out.
#[derive(Debug)]
pub struct Permit {
    /// Who may.
    pub principal: Arc<PrincipalFacts>,
    /// On what: act on this and nothing else.
    pub resource: ResourceId,
    /// Every right that was decided.
    pub actions: ActionSet,
    /// The decision.
    pub decision_id: DecisionId,
    /// The policies that allowed the main right.
    pub reasons: Arc<[PolicyId]>,
}

impl<C> Authorized<C> {
    pub(super) fn new(command: C, permit: Permit) -> Self {
        let Permit { principal, resource, actions, decision_id, reasons } = permit;
        Self { command, principal, resource, actions, decision_id, reasons }
    }

    /// The command.
    pub fn command(&self) -> &C {
        &self.command
    }

    /// Who may carry it out.
    pub fn principal(&self) -> &Arc<PrincipalFacts> {
        &self.principal
    }

    /// What it was authorized on: act on this, not on what the command names.
    pub fn resource(&self) -> &ResourceId {
        &self.resource
    }

    /// Every right that was decided.
    pub fn actions(&self) -> ActionSet {
        self.actions
    }

    /// The id of the decision, for the reply and the audit trail.
    pub fn decision_id(&self) -> DecisionId {
        self.decision_id
    }

    /// The policies that allowed the main right.
    pub fn reasons(&self) -> &[PolicyId] {
        &self.reasons
    }

    /// Takes it apart; the parts cannot be put together again.
    pub fn into_parts(self) -> (C, Permit) {
        let Self { command, principal, resource, actions, decision_id, reasons } = self;
        let permit = Permit { principal, resource, actions, decision_id, reasons };
        (command, permit)
    }
}
