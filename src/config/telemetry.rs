//! `[telemetry]`: the OpenTelemetry collector that traces, figures and log lines go to.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use http::header::HeaderName;
use polykey_hsm::SecretSource;
use toml::de::DeValue;

use super::read::{Refused, Section, refuse, string};

/// What a share of 1 is counted as.
pub const WHOLE: u32 = 1_000_000;

/// An OpenTelemetry collector, and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    /// `http://HOST:PORT` or `https://HOST:PORT`; with [`Protocol::Http`] the path before `/v1/…` as well.
    pub endpoint: Uri,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// The authorities of its certificate; `None`: those of the system.
    pub ca: Option<(PathBuf, Option<SecretSource>)>,
    /// Headers of every request, by their names.
    pub headers: BTreeMap<String, SecretSource>,
    /// By when each export ends.
    pub timeout: Duration,
}

/// `[telemetry]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// Where it goes.
    pub collector: Collector,
    /// How often figures are sent.
    pub interval: Duration,
    /// How many of [`WHOLE`] requests are traced whose callers do not say.
    pub sample: u32,
    /// What is sent.
    pub signals: Signals,
}

/// How a collector is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP with protobuf bodies.
    Http,
}

/// What is sent to a collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals {
    /// A span for each stage of a sampled request.
    pub traces: bool,
    /// What `GET /metrics` gives.
    pub metrics: bool,
    /// The lines of the log.
    pub logs: bool,
}

impl Signals {
    /// All of them.
    pub const ALL: Self = Self { traces: true, metrics: true, logs: true };

    fn words(self) -> Vec<&'static str> {
        let all = [("traces", self.traces), ("metrics", self.metrics), ("logs", self.logs)];
        all.into_iter().filter(|(_, on)| *on).map(|(word, _)| word).collect()
    }
}

impl Collector {
    /// Whether the way there is encrypted.
    #[must_use]
    pub fn tls(&self) -> bool {
        self.endpoint.scheme_str() == Some("https")
    }

    /// What is referred to.
    pub fn references(&self) -> impl Iterator<Item = &SecretSource> {
        let ca = self.ca.iter().filter_map(|(_, reference)| reference.as_ref());
        self.headers.values().chain(ca)
    }
}

impl Telemetry {
    /// The settings in effect, by name.
    pub(super) fn entries(&self, time: impl Fn(Duration) -> String) -> Vec<(&'static str, String)> {
        let Self { collector, interval, sample, signals } = self;
        let Collector { endpoint, protocol, ca, headers, timeout } = collector;
        let protocol = match protocol {
            Protocol::Grpc => "grpc",
            Protocol::Http => "http",
        };
        let headers: Vec<String> =
            headers.iter().map(|(name, source)| format!("{name} ({source})")).collect();
        let ca = ca.as_ref().map(|(path, _)| path.display().to_string());
        vec![
            ("telemetry.endpoint", endpoint.to_string()),
            ("telemetry.protocol", protocol.to_owned()),
            ("telemetry.ca", ca.unwrap_or_default()),
            ("telemetry.headers", headers.join(", ")),
            ("telemetry.interval", time(*interval)),
            ("telemetry.timeout", time(*timeout)),
            ("telemetry.sample", (f64::from(*sample) / f64::from(WHOLE)).to_string()),
            ("telemetry.signals", signals.words().join(", ")),
        ]
    }
}

const ENDPOINT: &str =
    "write http://HOST:PORT or https://HOST:PORT, and what is secret in [telemetry.headers]";

fn endpoint(value: &DeValue<'_>) -> Result<Uri, Refused> {
    let Ok(uri) = string(value)?.parse::<Uri>() else {
        return refuse("not an address of a collector", ENDPOINT);
    };
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    if !matches!(uri.scheme_str(), Some("http" | "https"))
        || uri.port_u16().is_none()
        || authority.contains('@')
        || uri.query().is_some()
    {
        return refuse("not an address of a collector", ENDPOINT);
    }
    Ok(uri)
}

pub(super) fn on_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A share from 0 to 1, in parts of [`WHOLE`].
fn share(value: &DeValue<'_>) -> Result<u32, Refused> {
    const REMEDY: &str = "write a number from 0 to 1, such as 0.05";
    let text = match value {
        DeValue::Float(number) => number.as_str(),
        DeValue::Integer(number) => number.as_str(),
        other => return refuse(format!("a {}, not a number", other.type_str()), REMEDY),
    };
    match text.replace('_', "").parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "0 to WHOLE"
            )]
            let parts = (share * f64::from(WHOLE)).round() as u32;
            Ok(parts)
        }
        _ => refuse("out of range", REMEDY),
    }
}

fn signals(value: &DeValue<'_>) -> Result<Signals, Refused> {
    const REMEDY: &str = "write a list of \"traces\", \"metrics\" and \"logs\"";
    let Some(list) = value.as_array() else {
        return refuse(format!("a {}, not a list", value.type_str()), REMEDY);
    };
    let mut signals = Signals { traces: false, metrics: false, logs: false };
    for item in list.iter() {
        let place = match item.get_ref().as_str() {
            Some("traces") => &mut signals.traces,
            Some("metrics") => &mut signals.metrics,
            Some("logs") => &mut signals.logs,
            _ => return refuse("not one of its words", REMEDY),
        };
        if std::mem::replace(place, true) {
            return refuse("a word stands in it twice", REMEDY);
        }
    }
    if signals.words().is_empty() {
        return refuse("empty", "name what is to be sent, or remove the section");
    }
    Ok(signals)
}

/// Whether a header is the collector's to read and not the transport's.
pub(super) fn may_be_set(name: &str) -> bool {
    const TRANSPORT: [&str; 9] = [
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let lower = !name.bytes().any(|byte| byte.is_ascii_uppercase());
    lower
        && HeaderName::from_bytes(name.as_bytes()).is_ok()
        && !name.starts_with("grpc-")
        && !name.ends_with("-bin")
        && !TRANSPORT.contains(&name)
}

/// The settings of a collector, in a section of whichever name.
pub(super) fn collector(section: &Section<'_, '_>) -> Option<Collector> {
    let endpoint = section.need("endpoint", "\"https://HOST:4317\"", endpoint);
    let protocol = section.word(
        "protocol",
        &[("grpc", Protocol::Grpc), ("http", Protocol::Http)],
        Protocol::Grpc,
    );
    let ca = section.pem("ca");
    let headers = section.references("headers");
    let timeout = section.duration("timeout", ("100ms", "1m"), Duration::from_secs(10));
    let collector = Collector { endpoint: endpoint?, protocol, ca, headers, timeout };
    let complain = |key, what: &str, remedy: &str| {
        section.complain(key, (what.to_owned(), remedy.to_owned()));
    };
    if collector.protocol == Protocol::Grpc && collector.endpoint.path() != "/" {
        complain("endpoint", "OTLP/gRPC has no path", "remove it, or write protocol = \"http\"");
    }
    if collector.ca.is_some() && !collector.tls() {
        complain("ca", "the endpoint has no TLS", "remove it, or write https:// in `endpoint`");
    }
    if !collector.headers.keys().all(|name| may_be_set(name)) {
        complain(
            "headers",
            "not the name of a header that may be set",
            "write names in lower case, and none of the transport's own",
        );
    }
    if !collector.headers.is_empty() && !collector.tls() && !on_loopback(&collector.endpoint) {
        complain(
            "headers",
            "they would go over the network in the clear",
            "write https:// in `endpoint`",
        );
    }
    Some(collector)
}

pub(super) fn section(section: Section<'_, '_>) -> Option<Telemetry> {
    if !section.present() {
        return None;
    }
    let collector = collector(&section);
    let interval = section.duration("interval", ("1s", "1h"), Duration::from_secs(15));
    let sample = section.get("sample", share).unwrap_or(WHOLE / 20);
    let signals = section.get("signals", signals).unwrap_or(Signals::ALL);
    section.finish();
    Some(Telemetry { collector: collector?, interval, sample, signals })
}
