//! Values on the command line that are more than text: durations, times, labels, names of keys.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use jiff::{Span, SpanRelativeTo, Timestamp};
use uuid::Uuid;

use super::error::CliError;
use crate::time::Time;

/// A time: given, or so long from now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// This moment.
    At(Time),
    /// So long from now, or before now where the past is meant.
    Away(Duration),
}

impl When {
    /// The moment, counted forward from `now`.
    #[must_use]
    pub fn after(self, now: Time) -> Time {
        match self {
            Self::At(time) => time,
            Self::Away(duration) => now.plus(duration),
        }
    }

    /// The moment, counted back from `now`.
    #[must_use]
    pub fn before(self, now: Time) -> Time {
        match self {
            Self::At(time) => time,
            Self::Away(duration) => {
                let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
                Time::from_micros(now.micros().saturating_sub(micros))
            }
        }
    }
}

/// The time now, read once a command.
pub(super) fn now() -> Time {
    SystemTime::now().into()
}

/// The wire's form of a time.
pub(super) fn timestamp(time: Time) -> prost_types::Timestamp {
    let nanos = time.micros().rem_euclid(1_000_000) * 1_000;
    prost_types::Timestamp { seconds: time.seconds(), nanos: i32::try_from(nanos).unwrap_or(0) }
}

/// Parses a duration such as `90d`, `12h`, `1h 30m` or `PT15M`; a day has 24 hours.
///
/// # Errors
/// A text for the user: no unit, negative, or in months or years, which have no fixed length.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; write for instance 90d, 12h, 30m or 45s");
    let span: Span = text.trim().parse().map_err(|_| wrong())?;
    if span.get_years() != 0 || span.get_months() != 0 {
        return Err(format!("`{text}`: months and years have no fixed length; write days"));
    }
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    Duration::try_from(length).map_err(|_| format!("`{text}`: a duration cannot be negative"))
}

/// Parses a moment: RFC 3339, or a duration.
///
/// # Errors
/// A text for the user.
pub fn when(text: &str) -> Result<When, String> {
    if let Ok(timestamp) = text.trim().parse::<Timestamp>() {
        let micros = timestamp.as_microsecond();
        return if micros < 0 {
            Err(format!("`{text}`: times before 1970 are not supported"))
        } else {
            Ok(When::At(Time::from_micros(micros)))
        };
    }
    duration(text).map(When::Away).map_err(|_| {
        format!(
            "`{text}` is neither a time (2027-01-31T12:00:00Z) nor a duration from now (90d, 12h)"
        )
    })
}

/// Parses whole seconds from a duration.
///
/// # Errors
/// A text for the user.
pub fn seconds(text: &str) -> Result<i64, String> {
    let duration = duration(text)?;
    if duration.subsec_nanos() != 0 {
        return Err(format!("`{text}`: whole seconds only"));
    }
    i64::try_from(duration.as_secs()).map_err(|_| format!("`{text}` is too long"))
}

/// Parses `NAME=VALUE`; the value may be empty.
///
/// # Errors
/// A text for the user.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}

/// Parses `NAME=FILE`.
///
/// # Errors
/// A text for the user.
pub fn named_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(file)))
        }
        _ => Err(format!("`{text}` is not NAME=FILE")),
    }
}

/// Checks the name of a key: a UUID or `alias/NAME`.
///
/// # Errors
/// A text for the user.
pub fn key_name(text: &str) -> Result<String, String> {
    let named = match text.strip_prefix("alias/") {
        Some(alias) => !alias.is_empty(),
        None => text.len() == 36 && Uuid::try_parse(text).is_ok(),
    };
    if named {
        Ok(text.to_owned())
    } else {
        Err(format!("`{text}` is neither the id of a key nor alias/NAME"))
    }
}

/// Reads the policies of `NAME=FILE` arguments.
pub(super) fn policies(
    files: &[(String, PathBuf)],
) -> Result<std::collections::BTreeMap<String, String>, CliError> {
    files
        .iter()
        .map(|(name, path)| {
            let text = text_file(path)?;
            Ok((name.clone(), text))
        })
        .collect()
}

/// Largest policy or other text that is read from a file, in bytes.
const MAX_TEXT: u64 = 1024 * 1024;

/// Reads a text, `-` being standard input.
pub(super) fn text_file(path: &std::path::Path) -> Result<String, CliError> {
    let bytes = crate::client::file::read(path, MAX_TEXT).map_err(|e| CliError::file(path, &e))?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(CliError::usage(format!("{}: not UTF-8 text", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_have_units_and_a_fixed_length() {
        assert_eq!(duration("90d"), Ok(Duration::from_secs(90 * 86_400)));
        assert_eq!(duration("2w"), Ok(Duration::from_secs(14 * 86_400)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_secs(5_400)));
        assert_eq!(duration("PT15M"), Ok(Duration::from_secs(900)));
        for wrong in ["", "90", "d", "-1h", "1h ago", "1y", "2mo", "1 fortnight", "99999999999999d"]
        {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert!(seconds("1500ms").is_err());
    }

    #[test]
    fn moments_count_from_now() {
        let now = Time::from_seconds(1_000_000);
        assert_eq!(when("1h").unwrap().after(now), Time::from_seconds(1_003_600));
        assert_eq!(when("1h").unwrap().before(now), Time::from_seconds(996_400));
        let at = when("2027-01-31T12:00:00+01:00").unwrap();
        assert_eq!(at.after(now), at.before(now));
        assert_eq!(at.after(now).to_string(), "2027-01-31T11:00:00.000000Z");
        for wrong in ["tomorrow", "2027-01-31", "1960-01-01T00:00:00Z", "5"] {
            assert!(when(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_of_keys_are_ids_or_aliases() {
        for good in ["alias/orders", "018f4e3c-7c4a-7c0a-8f5e-0123456789AB"] {
            assert_eq!(key_name(good).as_deref(), Ok(good));
        }
        for wrong in [
            "orders",
            "alias/",
            "",
            "018f4e3c7c4a7c0a8f5e0123456789ab",
            "{018f4e3c-7c4a-7c0a-8f5e-0123456789a}",
        ] {
            assert!(key_name(wrong).is_err(), "{wrong}");
        }
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(pair("a="), Ok(("a".into(), String::new())));
        assert!(pair("=b").is_err() && pair("a").is_err() && named_file("a=").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,40}") {
            let _parsed = (duration(&text), when(&text), seconds(&text), pair(&text), key_name(&text));
        }

        #[test]
        fn printed_durations_parse_to_themselves(total in 0_u64..4_000_000_000) {
            let (days, rest) = (total / 86_400, total % 86_400);
            let text = format!("{days}d {}h {}m {}s", rest / 3_600, rest / 60 % 60, rest % 60);
            prop_assert_eq!(duration(&text), Ok(Duration::from_secs(total)));
            prop_assert_eq!(seconds(&format!("{total}s")), Ok(i64::try_from(total).unwrap()));
        }

        #[test]
        fn printed_times_parse_to_themselves(micros in 0_i64..253_402_207_200_000_000) {
            let time = Time::from_micros(micros);
            prop_assert_eq!(when(&time.to_string()), Ok(When::At(time)));
            let wire = timestamp(time);
            prop_assert_eq!(wire.seconds * 1_000_000 + i64::from(wire.nanos) / 1_000, micros);
        }
    }
}
