//! The commands of the administration: one type a right, so that each call says which it takes.

use crate::authz::{Action, ActionSet, Command};

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $action:ident;)*) => {
        $($(#[$doc])*
        pub(super) struct $name;

        impl Command for $name {
            const ACTION: Action = Action::$action;
        })*
    };
}

commands! {
    /// See a client.
    ReadClient = ReadClient;
    /// List clients.
    ListClients = ListClients;
    /// Disable one.
    DisableClient = DisableClient;
    /// Enable one.
    EnableClient = EnableClient;
    /// Remove one.
    RemoveClient = RemoveClient;
    /// Give one a new API key.
    RotateApiKey = RotateApiKey;
    /// Revoke the tokens of one.
    RevokeTokens = RevokeToken;
    /// List roles and policies.
    ReadPolicies = ReadPolicies;
    /// Make or change a role.
    DefineRole = DefineRole;
    /// Remove one.
    DeleteRole = DeleteRole;
    /// Look at root, store, jobs and configuration.
    ReadNode = ReadNode;
    /// Make a new root.
    RotateRoot = RotateRoot;
    /// Replace a master key.
    RewrapRoot = RewrapRoot;
    /// Ask what another may do.
    ExplainDecision = ExplainDecision;
    /// Read the audit trail.
    ReadAudit = ReadAudit;
    /// Take archived leaves out of the store.
    ArchiveAudit = ArchiveAudit;
    /// Ask what stands in the trail for a value.
    HashAuditValue = HashAuditValue;
    /// Check every record.
    VerifyStore = VerifyStore;
    /// Take a backup.
    BackupStore = BackupStore;
    /// Read files again.
    Reload = ReloadConfiguration;
    /// Say that the clock is right.
    ConfirmClock = ConfirmClock;
}

/// Add a client.
pub(super) struct CreateClient {
    /// Whether it gets roles or permissions.
    pub(super) assigns: bool,
}

impl Command for CreateClient {
    const ACTION: Action = Action::CreateClient;

    fn also(&self) -> ActionSet {
        also(self.assigns, Action::AssignRoles)
    }
}

/// Change a client in what is not its authority.
pub(super) struct UpdateClient {
    /// Whether roles or permissions change as well.
    pub(super) assigns: bool,
}

impl Command for UpdateClient {
    const ACTION: Action = Action::UpdateClient;

    fn also(&self) -> ActionSet {
        also(self.assigns, Action::AssignRoles)
    }
}

/// Change roles and permissions alone.
pub(super) struct AssignRoles;

impl Command for AssignRoles {
    const ACTION: Action = Action::AssignRoles;
}

/// Issue a certificate.
pub(super) struct IssueCertificate {
    /// Whether the client gets an identity by it.
    pub(super) adds: bool,
}

impl Command for IssueCertificate {
    const ACTION: Action = Action::IssueCertificate;

    fn also(&self) -> ActionSet {
        also(self.adds, Action::UpdateClient)
    }
}

fn also(condition: bool, action: Action) -> ActionSet {
    if condition { ActionSet::EMPTY.with(action) } else { ActionSet::EMPTY }
}
