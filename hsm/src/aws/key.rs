//! Names of KMS keys: what is configured, what is recorded in a wrapped key, what AWS answers with.

use std::fmt;

use crate::{WrapError, WrapperId};

/// The ARN of one key in one Region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyArn {
    partition: String,
    pub(super) region: String,
    account: String,
    id: String,
}

/// A key as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum KeyName {
    Arn(KeyArn),
    /// In the account of the credentials and the Region of the client.
    Id(String),
    Alias {
        /// With `alias/` before it.
        name: String,
        /// Where it is, when its ARN is given.
        scope: Option<Scope>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    partition: String,
    region: String,
    account: String,
}

fn is_region(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())
}

/// A UUID; or, for a multi-Region key, `mrk-` and 32 hexadecimal digits.
fn is_key_id(text: &str) -> bool {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    match text.strip_prefix("mrk-") {
        Some(rest) => rest.len() == 32 && rest.bytes().all(hex),
        None => {
            text.len() == 36
                && text.bytes().enumerate().all(|(at, b)| match at {
                    8 | 13 | 18 | 23 => b == b'-',
                    _ => hex(b),
                })
        }
    }
}

/// `alias/` and 1 to 250 of what AWS allows there.
fn is_alias(text: &str) -> bool {
    text.strip_prefix("alias/").is_some_and(|name| {
        (1..=250).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'_' | b'-'))
    })
}

/// Scope and resource of an ARN of KMS.
fn arn(text: &str) -> Option<(Scope, &str)> {
    let mut parts = text.splitn(6, ':');
    let mut next = || parts.next();
    let (prefix, partition, service) = (next()?, next()?, next()?);
    let (region, account, resource) = (next()?, next()?, next()?);
    let partition_ok = partition == "aws" || partition.strip_prefix("aws-").is_some_and(is_region);
    let ok = prefix == "arn"
        && partition_ok
        && service == "kms"
        && is_region(region)
        && is_account(account);
    let scope = Scope {
        partition: partition.to_owned(),
        region: region.to_owned(),
        account: account.to_owned(),
    };
    ok.then_some((scope, resource))
}

impl KeyArn {
    /// `None` unless it is the ARN of a key.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (Scope { partition, region, account }, resource) = arn(text)?;
        let id = resource.strip_prefix("key/").filter(|id| is_key_id(id))?.to_owned();
        Some(Self { partition, region, account, id })
    }

    fn is_multi_region(&self) -> bool {
        self.id.starts_with("mrk-")
    }

    /// The same key, or a replica of the same multi-Region key.
    fn same_key(&self, other: &Self) -> bool {
        let Self { partition, region, account, id } = self;
        *partition == other.partition
            && *account == other.account
            && *id == other.id
            && (*region == other.region || self.is_multi_region())
    }

    /// This key where a client of `region` can use it; `None` if it is not there.
    pub(super) fn within_region(&self, region: &str) -> Option<Self> {
        let here = self.region == region || self.is_multi_region();
        here.then(|| Self { region: region.to_owned(), ..self.clone() })
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partition, region, account, id } = self;
        write!(f, "arn:{partition}:kms:{region}:{account}:key/{id}")
    }
}

impl KeyName {
    pub(super) fn parse(text: &str) -> Result<Self, WrapError> {
        let alias = |(scope, resource): (Scope, &str)| {
            is_alias(resource)
                .then(|| Self::Alias { name: resource.to_owned(), scope: Some(scope) })
        };
        let parsed = if is_key_id(text) {
            Some(Self::Id(text.to_owned()))
        } else if is_alias(text) {
            Some(Self::Alias { name: text.to_owned(), scope: None })
        } else {
            KeyArn::parse(text).map(Self::Arn).or_else(|| arn(text).and_then(alias))
        };
        parsed.ok_or_else(|| {
            WrapError::Config(format!(
                "`{text}` names no AWS KMS key: write its ARN, its id, alias/NAME or the alias's ARN"
            ))
        })
    }

    /// The Region that the name itself says.
    pub(super) fn region(&self) -> Option<&str> {
        match self {
            Self::Arn(arn) => Some(&arn.region),
            Self::Alias { scope: Some(scope), .. } => Some(&scope.region),
            Self::Id(_) | Self::Alias { scope: None, .. } => None,
        }
    }

    /// The wrapper's id: the key's id alone, so that it outlives a change from id to ARN and is the
    /// same beside each replica of a multi-Region key.
    pub(super) fn wrapper_id(&self) -> Option<WrapperId> {
        let (Self::Arn(KeyArn { id: name, .. }) | Self::Id(name) | Self::Alias { name, .. }) = self;
        WrapperId::new(format!("aws:{name}"))
    }

    /// Whether a key that was wrapped under `recorded`, by the wrapper `by`, is this one's to open.
    pub(super) fn admits(&self, recorded: &KeyArn, by: &WrapperId) -> bool {
        match self {
            Self::Arn(arn) => arn.same_key(recorded),
            Self::Id(id) => *id == recorded.id,
            // The alias may have moved on since: what counts is that it was used.
            Self::Alias { scope, .. } => {
                self.wrapper_id().as_ref() == Some(by)
                    && scope.as_ref().is_none_or(|scope| {
                        scope.partition == recorded.partition && scope.account == recorded.account
                    })
            }
        }
    }

    /// Whether AWS may say that it used `answered` when this was asked for in `region`.
    pub(super) fn stands_for(&self, answered: &KeyArn, region: &str) -> bool {
        answered.region == region
            && match self {
                Self::Arn(arn) => arn == answered,
                Self::Id(id) => *id == answered.id,
                Self::Alias { scope, .. } => scope.as_ref().is_none_or(|scope| {
                    scope.partition == answered.partition && scope.account == answered.account
                }),
            }
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arn(arn) => arn.fmt(f),
            Self::Id(id) => f.write_str(id),
            Self::Alias { name, scope: None } => f.write_str(name),
            Self::Alias { name, scope: Some(Scope { partition, region, account }) } => {
                write!(f, "arn:{partition}:kms:{region}:{account}:{name}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1234abcd-12ab-34cd-56ef-1234567890ab";
    const MRK: &str = "mrk-1234abcd12ab34cd56ef1234567890ab";

    fn arn_of(region: &str, account: &str, id: &str) -> KeyArn {
        KeyArn::parse(&format!("arn:aws:kms:{region}:{account}:key/{id}")).unwrap()
    }

    fn by(id: &str) -> WrapperId {
        WrapperId::new(id).unwrap()
    }

    #[test]
    fn every_name_of_a_key_reads_and_shows_as_it_was_written() {
        for (text, id) in [
            (ID.to_owned(), format!("aws:{ID}")),
            (MRK.to_owned(), format!("aws:{MRK}")),
            ("alias/polykey/a_b-c".to_owned(), "aws:alias/polykey/a_b-c".to_owned()),
            (format!("arn:aws:kms:eu-west-1:111122223333:key/{ID}"), format!("aws:{ID}")),
            (
                format!("arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/{MRK}"),
                format!("aws:{MRK}"),
            ),
            ("arn:aws-cn:kms:cn-north-1:111122223333:alias/x".to_owned(), "aws:alias/x".to_owned()),
        ] {
            let name = KeyName::parse(&text).unwrap();
            assert_eq!(name.to_string(), text);
            assert_eq!(name.wrapper_id().unwrap().as_str(), id);
        }
        for bad in [
            "",
            "polykey",
            "alias/",
            "alias/a b",
            "alias/a:b",
            "1234ABCD-12AB-34CD-56EF-1234567890AB",
            "mrk-1234",
            "arn:aws:s3:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
            "arn:aws:kms::111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
            "arn:aws:kms:eu-west-1:1111:key/1234abcd-12ab-34cd-56ef-1234567890ab",
            "arn:aws:kms:eu-west-1:111122223333:key/",
            "arn:aws:kms:eu-west-1:111122223333:1234abcd-12ab-34cd-56ef-1234567890ab",
            "arn:evil:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        ] {
            assert!(matches!(KeyName::parse(bad), Err(WrapError::Config(_))), "{bad}");
        }
    }

    #[test]
    fn a_replica_opens_what_another_region_wrapped_and_a_plain_key_does_not() {
        let [west, north] = ["eu-west-1", "eu-north-1"];
        let account = "111122223333";
        for (id, opens) in [(ID, false), (MRK, true)] {
            let name = KeyName::Arn(arn_of(north, account, id));
            let recorded = arn_of(west, account, id);
            assert_eq!(name.admits(&recorded, &by("aws:anything")), opens, "{id}");
            assert_eq!(recorded.within_region(north).is_some(), opens, "{id}");
            assert_eq!(recorded.within_region(west), Some(recorded.clone()));
        }
        assert_eq!(
            arn_of(west, account, MRK).within_region(north),
            Some(arn_of(north, account, MRK))
        );
    }

    #[test]
    fn another_key_or_account_is_neither_admitted_nor_believed() {
        let (region, account) = ("eu-west-1", "111122223333");
        let mine = arn_of(region, account, ID);
        let other_key = arn_of(region, account, "9999abcd-12ab-34cd-56ef-1234567890ab");
        let other_account = arn_of(region, "999999999999", ID);
        let name = KeyName::Arn(mine.clone());
        let me = name.wrapper_id().unwrap();
        assert!(name.admits(&mine, &me) && name.stands_for(&mine, region));
        for other in [&other_key, &other_account] {
            assert!(!name.admits(other, &me) && !name.stands_for(other, region), "{other}");
        }
        let alias = KeyName::parse(&format!("arn:aws:kms:{region}:{account}:alias/x")).unwrap();
        let me = alias.wrapper_id().unwrap();
        // It may stand for any key of its account, and opens only what was wrapped through it.
        assert!(alias.admits(&other_key, &me) && alias.stands_for(&other_key, region));
        assert!(!alias.admits(&other_key, &by("aws:alias/y")));
        assert!(!alias.admits(&other_account, &me) && !alias.stands_for(&other_account, region));
        assert!(!alias.stands_for(&mine, "eu-north-1"));
    }
}
