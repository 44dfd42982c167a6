//! Roles.

use polykey_proto::polykey::v2 as pb;
use tonic::Request;

use super::{AdminService, commands, event, page, parse, settled};
use crate::authz::{Action, PermissionSet, Resource, RoleFacts};
use crate::context::Context;
use crate::directory::Role;
use crate::error::Error;
use crate::keyring::Idempotency;
use crate::limits::{self, Violations};
use crate::rpc::convert::timestamp;

impl AdminService {
    pub(super) async fn list_roles(
        &self,
        request: Request<pb::ListRolesRequest>,
    ) -> Result<pb::ListRolesResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let size = parse::page_size(&mut v, m.page_size);
        v.finish()?;
        let vault = self.directory().vault();
        let after = page::last_name(vault, "roles", "", &m.page_token)?.unwrap_or_default();
        self.look(&cx, commands::ReadPolicies, &[]).await?;
        let mut roles = self.directory().roles().await?;
        roles.retain(|role| role.name > after);
        let more = roles.len() > size;
        roles.truncate(size);
        let next_page_token = match roles.last() {
            Some(last) if more => page::token(vault, "roles", "", last.name.as_bytes()),
            _ => String::new(),
        };
        Ok(pb::ListRolesResponse { roles: roles.iter().map(record).collect(), next_page_token })
    }

    pub(super) async fn put_role(
        &self,
        request: Request<pb::PutRoleRequest>,
    ) -> Result<pb::PutRoleResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "PutRole", &m);
        let mut v = Violations::new();
        parse::role_name(&mut v, &m.name);
        parse::permissions(&mut v, "permissions", &m.permissions);
        v.check(!m.permissions.is_empty(), "permissions", "must have 1 to 100 entries");
        limits::description(&mut v, "description", &m.description);
        v.finish()?;
        settled!(m.expected_revision, self.try_put_role(&cx, &m, key.as_ref()))
    }

    async fn try_put_role(
        &self,
        cx: &Context,
        m: &pb::PutRoleRequest,
        key: Option<&Idempotency>,
    ) -> Result<pb::PutRoleResponse, Error> {
        let old = self.directory().role(&m.name).await?;
        let new = PermissionSet::parse(m.permissions.iter().map(String::as_str))
            .map_err(|unknown| Error::invalid("permissions", unknown.to_string()))?;
        let facts = RoleFacts {
            name: m.name.clone(),
            permissions: old.as_ref().map_or(new, |old| old.set.union(new)),
        };
        let decision = self.authorize(cx, Resource::Role(&facts), commands::DefineRole).await?;
        if self.repeated(cx, key).await? {
            let role = old.as_deref().ok_or(Error::NotFound)?;
            return Ok(pb::PutRoleResponse { role: Some(record(role)), audit_index: 0 });
        }
        let permissions = m.permissions.join(",");
        let details = [("role", m.name.as_str()), ("permissions", permissions.as_str())];
        let event = event(cx, Action::DefineRole, decision, &details);
        // Decided for what it is now: another change meanwhile is decided anew.
        let seen = old.map_or(0, |old| old.revision);
        let expected = m.expected_revision.unwrap_or(seen);
        let change = self.change(cx, event, expected, key, &m.name);
        let put = self.directory().put_role(&m.name, &m.permissions, &m.description, &change);
        let (role, receipt) = put.await?;
        let audit_index = receipt.leaf.unwrap_or(0);
        Ok(pb::PutRoleResponse { role: Some(record(&role)), audit_index })
    }

    pub(super) async fn delete_role(
        &self,
        request: Request<pb::DeleteRoleRequest>,
    ) -> Result<pb::DeleteRoleResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "DeleteRole", &m);
        let mut v = Violations::new();
        parse::role_name(&mut v, &m.name);
        v.finish()?;
        settled!(m.expected_revision, self.try_delete_role(&cx, &m, key.as_ref()))
    }

    async fn try_delete_role(
        &self,
        cx: &Context,
        m: &pb::DeleteRoleRequest,
        key: Option<&Idempotency>,
    ) -> Result<pb::DeleteRoleResponse, Error> {
        let old = self.directory().role(&m.name).await?;
        let facts = RoleFacts {
            name: m.name.clone(),
            permissions: old.as_ref().map_or(PermissionSet::EMPTY, |old| old.set),
        };
        let decision = self.authorize(cx, Resource::Role(&facts), commands::DeleteRole).await?;
        if self.repeated(cx, key).await? {
            return Ok(pb::DeleteRoleResponse { audit_index: 0 });
        }
        let old = old.ok_or(Error::NotFound)?;
        let event = event(cx, Action::DeleteRole, decision, &[("role", &m.name)]);
        let expected = m.expected_revision.unwrap_or(old.revision);
        let change = self.change(cx, event, expected, key, &m.name);
        let receipt = self.directory().delete_role(&m.name, &change).await?;
        Ok(pb::DeleteRoleResponse { audit_index: receipt.leaf.unwrap_or(0) })
    }
}

fn record(role: &Role) -> pb::RoleRecord {
    pb::RoleRecord {
        name: role.name.clone(),
        permissions: role.permissions.clone(),
        description: role.description.clone(),
        built_in: role.built_in,
        created_at: role.created_at.map(timestamp),
        updated_at: role.updated_at.map(timestamp),
        revision: role.revision,
    }
}
