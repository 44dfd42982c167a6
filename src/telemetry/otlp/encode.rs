//! Spans, figures and lines as OTLP has them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{self, ResourceSpans, ScopeSpans, Status};
use tonic::Code;
use tracing::Level;

use crate::metrics::calls;
use crate::metrics::family::{Family, Figures, Kind, Point, Value};
use crate::telemetry::lines::{Line, Worth};
use crate::telemetry::trace::Span;

/// What sends: this node, and since when.
#[derive(Clone, Debug)]
pub struct Source {
    /// The node's id, in hexadecimal.
    pub instance: String,
    /// When it was opened, since the Unix epoch.
    pub since: Duration,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn text(value: impl Into<String>) -> Any {
    Any::StringValue(value.into())
}

fn attribute(key: &str, value: Any) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

fn scope() -> Option<InstrumentationScope> {
    Some(InstrumentationScope {
        name: "polykey".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..InstrumentationScope::default()
    })
}

impl Source {
    fn resource(&self) -> Option<Resource> {
        let attributes = vec![
            attribute("service.name", text("polykey")),
            attribute("service.version", text(env!("CARGO_PKG_VERSION"))),
            attribute("service.instance.id", text(&self.instance)),
        ];
        Some(Resource { attributes, ..Resource::default() })
    }

    /// A request with these spans.
    #[must_use]
    pub fn traces(&self, spans: &[Span]) -> ExportTraceServiceRequest {
        let spans = spans.iter().map(span).collect();
        let spans = ScopeSpans { scope: scope(), spans, ..ScopeSpans::default() };
        let resource = self.resource();
        let spans =
            ResourceSpans { resource, scope_spans: vec![spans], ..ResourceSpans::default() };
        ExportTraceServiceRequest { resource_spans: vec![spans] }
    }

    /// A request with these lines.
    #[must_use]
    pub fn lines(&self, lines: &[Line]) -> ExportLogsServiceRequest {
        let log_records = lines.iter().map(line).collect();
        let logs = ScopeLogs { scope: scope(), log_records, ..ScopeLogs::default() };
        let resource = self.resource();
        let logs = ResourceLogs { resource, scope_logs: vec![logs], ..ResourceLogs::default() };
        ExportLogsServiceRequest { resource_logs: vec![logs] }
    }

    /// A request with records of the audit log: the time of each, its text, and what it is by number.
    #[must_use]
    pub fn audit<'r>(
        &self,
        records: impl Iterator<Item = (Duration, &'r str, Vec<(&'static str, u64)>)>,
    ) -> ExportLogsServiceRequest {
        let record = |(at, line, numbers): (Duration, &str, Vec<(&'static str, u64)>)| {
            let number = |n| Any::IntValue(i64::try_from(n).unwrap_or(i64::MAX));
            let number = |(name, n): (&'static str, u64)| attribute(name, number(n));
            LogRecord {
                time_unix_nano: nanos(at),
                observed_time_unix_nano: nanos(at),
                severity_number: SeverityNumber::Info.into(),
                severity_text: "INFO".to_owned(),
                body: Some(AnyValue { value: Some(text(line)) }),
                attributes: numbers.into_iter().map(number).collect(),
                ..LogRecord::default()
            }
        };
        let log_records = records.map(record).collect();
        let scope =
            scope().map(|scope| InstrumentationScope { name: "polykey.audit".into(), ..scope });
        let logs = ScopeLogs { scope, log_records, ..ScopeLogs::default() };
        let resource = self.resource();
        let logs = ResourceLogs { resource, scope_logs: vec![logs], ..ResourceLogs::default() };
        ExportLogsServiceRequest { resource_logs: vec![logs] }
    }

    /// A request with these figures, as of now.
    #[must_use]
    pub fn figures(&self, figures: &Figures) -> ExportMetricsServiceRequest {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let times = (nanos(self.since), nanos(now));
        let some = figures.0.iter().filter(|family| !family.points.is_empty());
        let metrics = some.map(|family| metric(family, times)).collect();
        let metrics = ScopeMetrics { scope: scope(), metrics, ..ScopeMetrics::default() };
        let resource = self.resource();
        let metrics = ResourceMetrics {
            resource,
            scope_metrics: vec![metrics],
            ..ResourceMetrics::default()
        };
        ExportMetricsServiceRequest { resource_metrics: vec![metrics] }
    }
}

/// Whether a code is an error of the server's, as the conventions for gRPC have it.
fn failed(code: Code) -> bool {
    use Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    matches!(code, Unknown | DeadlineExceeded | Unimplemented | Internal | Unavailable | DataLoss)
}

fn span(span: &Span) -> v1::Span {
    let mut kind = SpanKind::Internal;
    let mut attributes = Vec::new();
    let mut status = None;
    if let Some(about) = &span.request {
        kind = SpanKind::Server;
        let (service, method) = about.method.split_once('/').unwrap_or((about.method, ""));
        attributes.push(attribute("rpc.system", text("grpc")));
        attributes.push(attribute("rpc.service", text(service)));
        attributes.push(attribute("rpc.method", text(method)));
        let code = about.code.unwrap_or(Code::Cancelled);
        let number = i64::from(code as i32);
        attributes.push(attribute("rpc.grpc.status_code", Any::IntValue(number)));
        if let Some(id) = &about.id {
            attributes.push(attribute("polykey.request_id", text(&**id)));
        }
        if failed(code) {
            let message = calls::word(code).to_owned();
            status = Some(Status { message, code: StatusCode::Error.into() });
        }
    }
    v1::Span {
        trace_id: span.ids.trace.to_vec(),
        span_id: span.ids.span.to_vec(),
        parent_span_id: span.parent.map(|id| id.to_vec()).unwrap_or_default(),
        name: span.name.to_owned(),
        kind: kind.into(),
        start_time_unix_nano: nanos(span.began),
        end_time_unix_nano: nanos(span.began.saturating_add(span.took)),
        attributes,
        status,
        // It is recorded: the caller's trace flags say so, or ours do.
        flags: 1,
        ..v1::Span::default()
    }
}

fn line(line: &Line) -> LogRecord {
    let (severity, name) = match line.level {
        Level::TRACE => (SeverityNumber::Trace, "TRACE"),
        Level::DEBUG => (SeverityNumber::Debug, "DEBUG"),
        Level::INFO => (SeverityNumber::Info, "INFO"),
        Level::WARN => (SeverityNumber::Warn, "WARN"),
        Level::ERROR => (SeverityNumber::Error, "ERROR"),
    };
    let field = |(name, worth): &(&'static str, Worth)| {
        let value = match worth {
            Worth::Text(words) => text(words),
            Worth::Whole(number) => Any::IntValue(*number),
            Worth::Number(number) => Any::DoubleValue(*number),
            Worth::Flag(flag) => Any::BoolValue(*flag),
        };
        attribute(name, value)
    };
    let target = attribute("code.namespace", text(line.target));
    LogRecord {
        time_unix_nano: nanos(line.at),
        observed_time_unix_nano: nanos(line.at),
        severity_number: severity.into(),
        severity_text: name.to_owned(),
        body: Some(AnyValue { value: Some(text(&line.message)) }),
        attributes: line.fields.iter().map(field).chain([target]).collect(),
        flags: u32::from(line.ids.is_some()),
        trace_id: line.ids.map(|ids| ids.trace.to_vec()).unwrap_or_default(),
        span_id: line.ids.map(|ids| ids.span.to_vec()).unwrap_or_default(),
        ..LogRecord::default()
    }
}

/// The unit of a name, as UCUM writes it.
fn unit(name: &str) -> &'static str {
    let name = name.trim_end_matches("_total");
    match name.rsplit('_').next() {
        Some("seconds") => "s",
        Some("bytes") => "By",
        _ => "1",
    }
}

fn metric(family: &Family, (since, now): (u64, u64)) -> Metric {
    let labels = |point: &Point| -> Vec<KeyValue> {
        point.labels.iter().map(|(name, value)| attribute(name, text(&**value))).collect()
    };
    // A gauge has no beginning.
    let start_time_unix_nano = if family.kind == Kind::Gauge { 0 } else { since };
    let number = |point: &Point| match &point.value {
        Value::Number(number) => Some(NumberDataPoint {
            attributes: labels(point),
            start_time_unix_nano,
            time_unix_nano: now,
            value: Some(Number::AsDouble(*number)),
            ..NumberDataPoint::default()
        }),
        Value::Buckets(_) => None,
    };
    let buckets = |point: &Point| match &point.value {
        Value::Buckets(seen) => Some(HistogramDataPoint {
            attributes: labels(point),
            start_time_unix_nano,
            time_unix_nano: now,
            count: seen.count(),
            sum: Some(seen.sum),
            bucket_counts: seen.counts.clone(),
            explicit_bounds: seen.bounds.clone(),
            ..HistogramDataPoint::default()
        }),
        Value::Number(_) => None,
    };
    let cumulative = AggregationTemporality::Cumulative.into();
    let data = match family.kind {
        Kind::Gauge => {
            Data::Gauge(Gauge { data_points: family.points.iter().filter_map(number).collect() })
        }
        Kind::Counter => Data::Sum(Sum {
            data_points: family.points.iter().filter_map(number).collect(),
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: family.points.iter().filter_map(buckets).collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: family.name.to_owned(),
        description: family.help.to_owned(),
        unit: unit(family.name).to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}
