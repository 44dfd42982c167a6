//! Metadata that stands in for fields which old stubs lack, where a call takes some of it or none.

use tonic::metadata::MetadataMap;

use super::admit::text;
use crate::error::Error;
use crate::limits::Violations;

/// Metadata twin of `exportable`.
pub(crate) const EXPORTABLE: &str = "polykey-exportable";
/// The metadata twins that concern one key, and so no batch or stream of several.
pub(crate) const OF_ONE_KEY: [&str; 3] =
    ["polykey-value-bin", "polykey-alias", "polykey-expected-revision"];
/// Those that say how material leaves.
pub(crate) const OF_EXPORTS: [&str; 2] = ["polykey-export", "polykey-recipient-bin"];

/// Refuses metadata that would have no effect: whoever sends it relies on it.
pub(crate) fn refuse_twins(metadata: &MetadataMap, names: &[&[&str]]) -> Result<(), Error> {
    let mut v = Violations::new();
    for name in names.iter().copied().flatten() {
        v.check(!metadata.contains_key(*name), name, "has no effect on this call");
    }
    v.finish()
}

/// The metadata twin by which every key of a batch becomes exportable, or none.
pub(crate) fn exportable_twin(v: &mut Violations, metadata: &MetadataMap) -> Option<bool> {
    match text(v, metadata, EXPORTABLE)? {
        "true" => Some(true),
        "false" => Some(false),
        _ => {
            v.add(EXPORTABLE, "must be true or false");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use polykey_proto::polykey::v2 as pb;

    use super::*;
    use crate::rpc::parse::create;
    use crate::time::Time;

    #[test]
    fn metadata_without_effect_is_refused_by_name() {
        let mut metadata = MetadataMap::new();
        assert!(refuse_twins(&metadata, &[&OF_ONE_KEY, &OF_EXPORTS]).is_ok());
        metadata
            .insert_bin("polykey-value-bin", tonic::metadata::MetadataValue::from_bytes(&[1, 2]));
        let refused = refuse_twins(&metadata, &[&OF_ONE_KEY, &OF_EXPORTS]).unwrap_err();
        assert!(refused.to_string().contains("polykey-value-bin"), "{refused}");
        assert!(refuse_twins(&metadata, &[&OF_EXPORTS]).is_ok());
    }

    #[test]
    fn an_alias_has_one_name_with_and_without_its_prefix() {
        for alias in ["prod/db", "alias/prod/db"] {
            let request = pb::CreateKeyRequest {
                key_type: pb::KeyType::Aes256.into(),
                alias: alias.into(),
                ..Default::default()
            };
            let command = create(request, Time::from_seconds(1)).unwrap();
            assert_eq!(command.alias.as_deref(), Some("prod/db"));
        }
    }
}
