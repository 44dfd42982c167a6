//! Figures as they leave the node: names, what they mean, and values with labels.
//!
//! One gathering serves every way out: the Prometheus endpoint renders it, OTLP encodes it. Labels are
//! words of the code or names that an operator gave; nothing of a request's contents is ever one.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::histogram::Distribution;

/// How a figure behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, until the node starts again.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Counts in buckets.
    Histogram,
}

/// A label and its value.
pub type Label = (&'static str, Cow<'static, str>);

/// What a figure is worth.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number.
    Number(f64),
    /// Counts in buckets.
    Buckets(Distribution),
}

/// One figure of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// By what it is told from the others.
    pub labels: Vec<Label>,
    /// What it is worth.
    pub value: Value,
}

/// Figures of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// `polykey_…`, with its unit and, for a counter, `_total` at the end.
    pub name: &'static str,
    /// One line of what it means.
    pub help: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// The figures, each with labels of its own.
    pub points: Vec<Point>,
}

/// All figures of a node at one moment. Each is exact, together they are not one instant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures(pub Vec<Family>);

/// The last family, which is being filled.
pub struct Filling<'a>(&'a mut Figures);

impl Figures {
    fn family(&mut self, name: &'static str, kind: Kind, help: &'static str) -> Filling<'_> {
        self.0.push(Family { name, help, kind, points: Vec::new() });
        Filling(self)
    }

    /// A family of counters.
    pub fn counter(&mut self, name: &'static str, help: &'static str) -> Filling<'_> {
        self.family(name, Kind::Counter, help)
    }

    /// A family of gauges.
    pub fn gauge(&mut self, name: &'static str, help: &'static str) -> Filling<'_> {
        self.family(name, Kind::Gauge, help)
    }

    /// A family of histograms.
    pub fn histogram(&mut self, name: &'static str, help: &'static str) -> Filling<'_> {
        self.family(name, Kind::Histogram, help)
    }

    /// In the Prometheus text format, version 0.0.4. A family without a figure is named all the same, so
    /// that the text tells all there can be.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(64 * 1024);
        for Family { name, help, kind, points } in &self.0 {
            let kind = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            // Writing to a String cannot fail.
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            points.iter().for_each(|point| line(&mut text, name, point));
        }
        text
    }
}

fn line(text: &mut String, name: &str, Point { labels, value }: &Point) {
    match value {
        Value::Number(number) => {
            text.push_str(name);
            braces(text, labels, None);
            let _ = writeln!(text, " {number}");
        }
        Value::Buckets(Distribution { bounds, counts, sum }) => {
            let mut below = 0u64;
            let last = std::iter::once("+Inf".to_owned());
            for (bound, count) in bounds.iter().map(shown).chain(last).zip(counts) {
                below = below.saturating_add(*count);
                let _ = write!(text, "{name}_bucket");
                braces(text, labels, Some(&bound));
                let _ = writeln!(text, " {below}");
            }
            let _ = write!(text, "{name}_sum");
            braces(text, labels, None);
            let _ = write!(text, " {sum}\n{name}_count");
            braces(text, labels, None);
            let _ = writeln!(text, " {below}");
        }
    }
}

/// A bound without the noise of binary fractions.
fn shown(bound: &f64) -> String {
    format!("{:.6}", bound).trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn braces(text: &mut String, labels: &[Label], bound: Option<&str>) {
    let bound = bound.map(|bound| ("le", bound));
    let mut all = labels.iter().map(|(name, value)| (*name, &**value)).chain(bound).peekable();
    if all.peek().is_none() {
        return;
    }
    let mut between = '{';
    for (name, value) in all {
        text.push(between);
        between = ',';
        let _ = write!(text, "{name}=\"");
        for character in value.chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text.push('}');
}

impl Filling<'_> {
    /// One figure with these labels.
    #[expect(clippy::needless_pass_by_value, reason = "numbers are small")]
    pub fn at<const N: usize>(&mut self, labels: [(&'static str, &str); N], value: impl Figure) {
        let labels = labels.map(|(name, value)| (name, Cow::Owned(value.to_owned())));
        let point = Point { labels: labels.into(), value: value.value() };
        if let Some(family) = self.0.0.last_mut() {
            family.points.push(point);
        }
    }

    /// The only figure.
    pub fn is(&mut self, value: impl Figure) {
        self.at([], value);
    }

    /// The only figure, where there is one.
    pub fn may_be(&mut self, value: Option<impl Figure>) {
        if let Some(value) = value {
            self.is(value);
        }
    }
}

/// What a figure can be made of.
pub trait Figure {
    /// As it is shown.
    fn value(&self) -> Value;
}

impl Figure for f64 {
    fn value(&self) -> Value {
        Value::Number(*self)
    }
}

impl Figure for u64 {
    #[expect(clippy::cast_precision_loss, reason = "figures for people, exact up to 2^53")]
    fn value(&self) -> Value {
        Value::Number(*self as f64)
    }
}

impl Figure for usize {
    fn value(&self) -> Value {
        (*self as u64).value()
    }
}

impl Figure for bool {
    fn value(&self) -> Value {
        Value::Number(f64::from(u8::from(*self)))
    }
}

impl Figure for std::time::Duration {
    fn value(&self) -> Value {
        Value::Number(self.as_secs_f64())
    }
}

impl Figure for Distribution {
    fn value(&self) -> Value {
        Value::Buckets(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::histogram::Histogram;
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let mut figures = Figures::default();
        let mut up = figures.counter("a_total", "What a is.");
        up.at([("word", "x\"y\\z\n")], 3u64);
        up.at([("word", "b")], 1.5);
        figures.gauge("empty", "Nothing.");
        let groups = Histogram::of_groups();
        groups.record(2);
        groups.record(1000);
        figures.histogram("h", "Sizes.").is(groups.read());
        let text = figures.text();
        assert!(text.starts_with(
            "# HELP a_total What a is.\n# TYPE a_total counter\na_total{word=\"x\\\"y\\\\z\\n\"} 3\n\
             a_total{word=\"b\"} 1.5\n# HELP empty Nothing.\n# TYPE empty gauge\n# HELP h Sizes.\n# TYPE h histogram\nh_bucket{le=\"1\"} 0\n\
             h_bucket{le=\"2\"} 1\n"
        ));
        assert!(text.ends_with("h_bucket{le=\"+Inf\"} 2\nh_sum 1002\nh_count 2\n"), "{text}");
        assert_eq!(shown(&0.000_25), "0.00025");
        assert_eq!(shown(&60.0), "60");
    }
}
