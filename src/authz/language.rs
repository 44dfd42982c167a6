//! The Cedar schema, parsed once, and the translation of facts into Cedar's entities and requests.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, RestrictedExpression as Value,
    Schema, ValidationMode, Validator,
};

use super::action::{Action, PermissionSet, Target};
use super::facts::{ContextFacts, KeyFacts, PrincipalFacts, Resource};

/// The schema as operators see it; its second half is [`schema_actions`](super::action::schema_actions).
pub const SCHEMA: &str = include_str!("schema.cedarschema");

/// Policies read what is in the request and nothing beyond it (Cedar RFC 76), so that the facts
/// passed in are all that a decision can depend on.
pub(super) const LEVEL: u32 = 1;

/// Why facts could not be put to Cedar; the decision is a denial.
#[derive(Debug, thiserror::Error)]
#[error("cannot put the request to the policies: {0}")]
pub struct LanguageError(String);

impl LanguageError {
    fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// The parsed schema and what follows from it.
pub(super) struct Language {
    pub(super) everything: Validator,
    /// The schema with the actions on keys only: what a key's own policy may speak of.
    pub(super) keys: Validator,
    client: EntityTypeName,
    role: EntityTypeName,
    key: EntityTypeName,
    claims: EntityTypeName,
    node: EntityUid,
    actions: Vec<CedarAction>,
}

/// An action with what every request for it has in common.
pub(super) struct CedarAction {
    pub(super) uid: EntityUid,
    entity: Entity,
    /// All of the context that policies read whose decisions may be remembered.
    minimal: Context,
}

static LANGUAGE: LazyLock<Result<Language, String>> =
    LazyLock::new(|| Language::parse().map_err(|e| e.to_string()));

/// The language of this build.
///
/// # Errors
/// When the built-in schema does not parse, which a test excludes.
pub(super) fn language() -> Result<&'static Language, LanguageError> {
    LANGUAGE.as_ref().map_err(LanguageError::of)
}

impl Language {
    fn parse() -> Result<Self, LanguageError> {
        let (everything, _warnings) =
            Schema::from_cedarschema_str(SCHEMA).map_err(LanguageError::of)?;
        let only_keys: String = SCHEMA
            .lines()
            .filter(|line| !line.starts_with("action ") || !applies_elsewhere(line))
            .flat_map(|line| [line, "\n"])
            .collect();
        let (keys, _warnings) =
            Schema::from_cedarschema_str(&only_keys).map_err(LanguageError::of)?;
        let entities = everything.action_entities().map_err(LanguageError::of)?;
        let actions = Action::ALL
            .iter()
            .map(|action| {
                let uid = uid(&entity_type("Action")?, action.name());
                let entity = entities
                    .get(&uid)
                    .ok_or_else(|| LanguageError(format!("the schema lacks action {action}")))?
                    .clone();
                let minimal = Context::from_pairs([(
                    "permission".to_owned(),
                    text(action.permission().name()),
                )])
                .map_err(LanguageError::of)?;
                Ok(CedarAction { uid, entity, minimal })
            })
            .collect::<Result<Vec<_>, LanguageError>>()?;
        Ok(Self {
            everything: Validator::new(everything),
            keys: Validator::new(keys),
            client: entity_type("Client")?,
            role: entity_type("Role")?,
            key: entity_type("Key")?,
            claims: entity_type("Claims")?,
            node: uid(&entity_type("Node")?, "node"),
            actions,
        })
    }

    pub(super) fn action(&self, action: Action) -> Result<&CedarAction, LanguageError> {
        self.actions
            .get(action as usize)
            .ok_or_else(|| LanguageError(format!("action {action} is not in the schema")))
    }

    pub(super) fn key_uid(&self, id: uuid::Uuid) -> EntityUid {
        uid(&self.key, &id.to_string())
    }

    /// The uid of the resource.
    pub(super) fn resource_uid(&self, resource: &Resource<'_>) -> EntityUid {
        match resource {
            Resource::Node => self.node.clone(),
            Resource::Key { facts, .. } | Resource::NewKey(facts) => self.key_uid(facts.id),
            Resource::Client(facts) => uid(&self.client, &facts.client),
            Resource::Role(facts) => uid(&self.role, &facts.name),
        }
    }

    /// The request and everything it may be judged by. With `whole` the context is complete,
    /// otherwise it is only what policies read whose decisions may be remembered.
    pub(super) fn request(
        &self,
        principal: &PrincipalFacts,
        action: Action,
        resource: &Resource<'_>,
        context: &ContextFacts,
        whole: bool,
    ) -> Result<(cedar_policy::Request, Entities), LanguageError> {
        let cedar_action = self.action(action)?;
        let subject = self.client_entity(
            &principal.client,
            &principal.roles,
            principal.permissions,
            &principal.tier,
            &principal.environment,
        )?;
        let subject_uid = subject.uid();
        let resource_uid = self.resource_uid(resource);
        let mut entities = vec![cedar_action.entity.clone(), subject];
        match resource {
            Resource::Node => {
                entities.push(Entity::new_no_attrs(self.node.clone(), HashSet::new()))
            }
            Resource::Key { facts, .. } | Resource::NewKey(facts) => {
                entities.push(self.key_entity(facts)?);
            }
            // The caller itself: one entity, with what its own record says.
            Resource::Client(_) if resource_uid == subject_uid => {}
            Resource::Client(facts) => entities.push(self.client_entity(
                &facts.client,
                &facts.roles,
                facts.permissions,
                &facts.tier,
                &facts.environment,
            )?),
            Resource::Role(facts) => entities.push(
                Entity::new(
                    resource_uid.clone(),
                    HashMap::from([("permissions".to_owned(), permissions(facts.permissions))]),
                    HashSet::new(),
                )
                .map_err(LanguageError::of)?,
            ),
        }
        let cedar_context = if whole {
            let claims = uid(&self.claims, "");
            entities.push(
                Entity::new_with_tags(
                    claims.clone(),
                    [],
                    [],
                    context.claimed.custom.iter().map(|(k, v)| (k.clone(), text(v))),
                )
                .map_err(LanguageError::of)?,
            );
            whole_context(action, context, claims)?
        } else {
            cedar_action.minimal.clone()
        };
        let entities = Entities::from_entities(entities, None).map_err(LanguageError::of)?;
        let request = cedar_policy::Request::new(
            subject_uid,
            cedar_action.uid.clone(),
            resource_uid,
            cedar_context,
            None,
        )
        .map_err(LanguageError::of)?;
        Ok((request, entities))
    }

    fn client_entity(
        &self,
        id: &str,
        roles: &[String],
        granted: PermissionSet,
        tier: &str,
        environment: &str,
    ) -> Result<Entity, LanguageError> {
        Entity::new(
            uid(&self.client, id),
            HashMap::from([
                ("id".to_owned(), text(id)),
                ("roles".to_owned(), texts(roles)),
                ("permissions".to_owned(), permissions(granted)),
                ("tier".to_owned(), text(tier)),
                ("environment".to_owned(), text(environment)),
            ]),
            roles.iter().map(|role| uid(&self.role, role)).collect(),
        )
        .map_err(LanguageError::of)
    }

    fn key_entity(&self, key: &KeyFacts) -> Result<Entity, LanguageError> {
        // Destructured in full: a new fact must be put to the policies or left out on purpose.
        let KeyFacts {
            id,
            revision: _,
            creator,
            authorized_contexts,
            key_type,
            purpose,
            state,
            data_classification,
            exportable,
            aliases,
            tags,
        } = key;
        let contexts = authorized_contexts
            .iter()
            .map(|client| Value::new_entity_uid(uid(&self.client, client)));
        Entity::new_with_tags(
            self.key_uid(*id),
            [
                ("id".to_owned(), text(&id.to_string())),
                ("creator".to_owned(), Value::new_entity_uid(uid(&self.client, creator))),
                ("authorized_contexts".to_owned(), Value::new_set(contexts)),
                ("type".to_owned(), text(key_type)),
                ("purpose".to_owned(), text(purpose)),
                ("state".to_owned(), text(state)),
                ("data_classification".to_owned(), text(data_classification)),
                ("exportable".to_owned(), Value::new_bool(*exportable)),
                ("aliases".to_owned(), texts(aliases)),
            ],
            [],
            tags.iter().map(|(k, v)| (k.clone(), text(v))),
        )
        .map_err(LanguageError::of)
    }
}

/// All of the context.
fn whole_context(
    action: Action,
    context: &ContextFacts,
    claims: EntityUid,
) -> Result<Context, LanguageError> {
    let ContextFacts { decision_id: _, now, source, certificate, claimed } = context;
    let civil = now.to_zoned(jiff::tz::TimeZone::UTC);
    let claimed = Value::new_record([
        ("environment".to_owned(), text(&claimed.environment)),
        ("network_zone".to_owned(), text(&claimed.network_zone)),
        ("geographic_region".to_owned(), text(&claimed.geographic_region)),
        ("time_window".to_owned(), text(&claimed.time_window)),
        ("application".to_owned(), text(&claimed.application)),
        ("roles".to_owned(), texts(&claimed.roles)),
        ("permissions".to_owned(), texts(&claimed.permissions)),
        ("custom".to_owned(), Value::new_entity_uid(claims)),
    ])
    .map_err(LanguageError::of)?;
    let mut pairs = vec![
        ("permission".to_owned(), text(action.permission().name())),
        (
            "now".to_owned(),
            Value::new_datetime(civil.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()),
        ),
        ("hour".to_owned(), Value::new_long(i64::from(civil.hour()))),
        ("weekday".to_owned(), Value::new_long(i64::from(civil.weekday().to_monday_one_offset()))),
        ("certificate".to_owned(), text(certificate)),
        ("claimed".to_owned(), claimed),
    ];
    if let Some(address) = source {
        // An IPv4 peer of a dual-stack listener is an IPv4 address to policies.
        let address = address.to_canonical().to_string();
        pairs.push(("source".to_owned(), Value::new_ip(address)));
    }
    Context::from_pairs(pairs).map_err(LanguageError::of)
}

/// Whether a line of the schema declares an action on something other than a key.
fn applies_elsewhere(line: &str) -> bool {
    [Target::Node, Target::Client, Target::Role]
        .iter()
        .any(|target| line.contains(&format!("resource: {},", target.entity())))
}

/// Strict validation at [`LEVEL`].
pub(super) fn validate(
    validator: &Validator,
    policies: &cedar_policy::PolicySet,
) -> cedar_policy::ValidationResult {
    validator.validate_with_level(policies, ValidationMode::Strict, LEVEL)
}

fn entity_type(name: &str) -> Result<EntityTypeName, LanguageError> {
    name.parse().map_err(LanguageError::of)
}

fn uid(kind: &EntityTypeName, id: &str) -> EntityUid {
    EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(id))
}

fn text(value: &str) -> Value {
    Value::new_string(value.to_owned())
}

fn texts(values: &[String]) -> Value {
    Value::new_set(values.iter().map(|value| text(value)))
}

fn permissions(set: PermissionSet) -> Value {
    Value::new_set(set.iter().map(|permission| text(permission.name())))
}
