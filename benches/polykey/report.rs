//! The table: what was measured, against what was aimed at.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::floors::Floors;
use crate::large::Pages;
use crate::load::{BATCH, Figures, Kind};
use crate::setting;

const BEGIN: &str = "<!-- benchmarks: begin, written by make bench -->";
const END: &str = "<!-- benchmarks: end -->";

const BACKENDS: &str = if cfg!(all(feature = "aws", feature = "postgres")) {
    "all backends"
} else {
    "without all backends"
};

type Round = (Vec<(Kind, usize, usize, Figures)>, Floors);

/// Everything measured.
#[derive(Default)]
pub(crate) struct Report {
    window: Duration,
    rounds: Vec<Round>,
    pub(crate) records_per_commit: Vec<f64>,
    pub(crate) memory_idle_empty: f64,
    pub(crate) memory_peak: f64,
    pub(crate) memory_idle_many: f64,
    pub(crate) cold_empty: Vec<f64>,
    pub(crate) cold_many: Vec<f64>,
    pub(crate) cold_killed: Vec<f64>,
    pub(crate) create_few: Figures,
    pub(crate) create_many: Figures,
    pub(crate) many: u64,
    pub(crate) fill_rate: f64,
    pub(crate) pages_some: Pages,
    pub(crate) pages_many: Pages,
    pub(crate) walk_seconds: f64,
    pub(crate) scan_seconds: f64,
    pub(crate) file_ratio: f64,
    #[cfg(feature = "postgres")]
    pub(crate) database: Vec<crate::database::Round>,
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

enum Aim {
    AtLeast(f64),
    AtMost(f64),
}

impl Report {
    pub(crate) fn new(window: Duration, _rounds: usize) -> Self {
        Self { window, ..Self::default() }
    }

    pub(crate) fn round(&mut self, one: Vec<(Kind, usize, usize, Figures)>, floors: Floors) {
        self.rounds.push((one, floors));
    }

    fn find(round: &Round, kind: Kind, c: usize) -> Figures {
        let found = round.0.iter().find(|(k, of, _, _)| *k == kind && *of == c);
        found.map(|(_, _, _, figures)| *figures).unwrap_or_default()
    }

    /// The median over the rounds of something computed within each.
    fn ratio(&self, of: impl Fn(&Round) -> f64) -> f64 {
        middle(self.rounds.iter().map(of).collect())
    }

    fn targets(&self) -> Vec<(&'static str, String, Aim, f64)> {
        use Aim::{AtLeast, AtMost};
        let find = Self::find;
        let last = |times: &[f64]| times.last().copied().unwrap_or(f64::NAN);
        let create = |r: &Round| find(r, Kind::Create, 64).rate;
        let echo = |r: &Round| find(r, Kind::Echo, 64);
        let many = self.many;
        let size = std::fs::metadata(crate::common::POLYKEY).map_or(0, |m| m.len());
        let (some, most) = (self.pages_some, self.pages_many);
        let mut rows = vec![
            (
                "1",
                "Encrypt 256 B, c=64 n=4: rate ÷ E".to_owned(),
                AtLeast(0.90),
                self.ratio(|r| find(r, Kind::Encrypt, 64).rate / echo(r).rate),
            ),
            (
                "1",
                "Encrypt 256 B, c=64 n=4: CPU ÷ E's".into(),
                AtMost(1.25),
                self.ratio(|r| find(r, Kind::Encrypt, 64).cpu / echo(r).cpu),
            ),
            (
                "1",
                "Encrypt 256 B, c=64 n=4: p99 ÷ E's".into(),
                AtMost(1.3),
                self.ratio(|r| find(r, Kind::Encrypt, 64).p99 / echo(r).p99),
            ),
            (
                "1",
                "Decrypt 256 B, c=64 n=4: rate ÷ E".into(),
                AtLeast(0.90),
                self.ratio(|r| find(r, Kind::Decrypt, 64).rate / echo(r).rate),
            ),
            (
                "4",
                "Encrypt 256 B, c=1: p50 ÷ E's".into(),
                AtMost(1.2),
                self.ratio(|r| find(r, Kind::Encrypt, 1).p50 / find(r, Kind::Echo, 1).p50),
            ),
            (
                "6",
                "items in batches of 100 ÷ Encrypt alone, a second".into(),
                AtLeast(12.0),
                self.ratio(|r| {
                    let items = find(r, Kind::EncryptBatch, 16).rate * BATCH as f64;
                    items / find(r, Kind::Encrypt, 64).rate
                }),
            ),
            (
                "3",
                "tuned echo: CPU ÷ stock echo's, one binary (both link-time optimised)".to_owned(),
                AtMost(0.70),
                self.ratio(|r| echo(r).cpu / find(r, Kind::StockEcho, 64).cpu),
            ),
            (
                "8",
                "GetKey, c=64 n=4: CPU ÷ E's".into(),
                AtMost(1.3),
                self.ratio(|r| find(r, Kind::GetKey, 64).cpu / echo(r).cpu),
            ),
            (
                "8",
                "HealthCheck, c=64 n=4: CPU ÷ E's".into(),
                AtMost(1.1),
                self.ratio(|r| find(r, Kind::Health, 64).cpu / echo(r).cpu),
            ),
            (
                "9",
                "CreateKey, c=64 n=4 ÷ R1".into(),
                AtLeast(4.5),
                self.ratio(|r| create(r) / r.1.r1),
            ),
            (
                "9",
                "CreateKey, c=64 n=4 ÷ E".into(),
                AtLeast(0.42),
                self.ratio(|r| create(r) / echo(r).rate),
            ),
            (
                "9",
                "CreateKey, c=64 n=4: records a commit".into(),
                AtLeast(15.0),
                middle(self.records_per_commit.clone()),
            ),
            (
                "10",
                "CreateKey, c=1: p50 ÷ (R1 p50 + E p50)".into(),
                AtMost(1.3),
                self.ratio(|r| {
                    find(r, Kind::Create, 1).p50 / (r.1.r1_p50 + find(r, Kind::Echo, 1).p50)
                }),
            ),
        ];
        rows.extend([
            (
                "14",
                "cold start, empty, slowest of 7, ms".to_owned(),
                AtMost(80.0),
                last(&self.cold_empty),
            ),
            (
                "14",
                format!("cold start, {many} keys, slowest of 3, ms"),
                AtMost(150.0),
                last(&self.cold_many),
            ),
            (
                "14",
                format!("cold start after kill -9, {many} keys, slowest of 3, ms"),
                AtMost(250.0),
                last(&self.cold_killed),
            ),
            ("15", "memory idle, empty, MiB".into(), AtMost(24.0), self.memory_idle_empty),
            ("15", format!("memory idle, {many} keys, MiB"), AtMost(110.0), self.memory_idle_many),
            ("15", "memory, peak of the rounds, MiB".into(), AtMost(60.0), self.memory_peak),
            ("16", format!("binary, {BACKENDS}, MB"), AtMost(30.0), size as f64 / 1e6),
            (
                "17",
                format!("file size ÷ bytes of all rows, {many} keys"),
                AtMost(2.0),
                self.file_ratio,
            ),
            (
                "18",
                format!("ListKeys, page of 100: {many} keys ÷ 10,000"),
                AtMost(2.0),
                most.plain / some.plain,
            ),
            (
                "18",
                "the same, a filter that a tenth meets".into(),
                AtMost(2.0),
                most.filtered / some.filtered,
            ),
            (
                "18",
                "the same, a filter that nothing meets".into(),
                AtMost(2.0),
                most.nothing / some.nothing,
            ),
            (
                "18",
                format!("all {many} in pages of 1,000 ÷ bare scan of the list rows"),
                AtMost(4.0),
                self.walk_seconds / self.scan_seconds,
            ),
            (
                "19",
                format!("CreateKey, c=64: {many} keys ÷ 1,000"),
                AtLeast(0.8),
                self.create_many.rate / self.create_few.rate,
            ),
        ]);
        #[cfg(feature = "postgres")]
        rows.extend(self.database_targets());
        rows
    }

    #[cfg(feature = "postgres")]
    fn database_targets(&self) -> [(&'static str, String, Aim, f64); 2] {
        use crate::database::Round;
        let of = |ratio: fn(&Round) -> f64| middle(self.database.iter().map(ratio).collect());
        [
            (
                "20",
                "PostgreSQL: CreateKey c=16 ÷ bare INSERT c=16".into(),
                Aim::AtLeast(0.6),
                of(|r| r.create.rate / r.insert),
            ),
            (
                "20",
                "PostgreSQL: Encrypt c=64 ÷ the same with a file".into(),
                Aim::AtLeast(0.95),
                of(|r| r.encrypt.rate / r.encrypt_embedded.rate),
            ),
        ]
    }

    #[cfg(feature = "postgres")]
    fn database_rows(&self, out: &mut String) {
        use crate::database::Round;
        let figure = |of: fn(&Round) -> f64| middle(self.database.iter().map(of).collect());
        let mut row = |name: &str, c: usize, of: fn(&Round) -> Figures| {
            let all: Vec<Figures> = self.database.iter().map(of).collect();
            let of = |f: fn(&Figures) -> f64| middle(all.iter().map(f).collect());
            let (rate, p50, p99) = (of(|f| f.rate), of(|f| f.p50) / 1e3, of(|f| f.p99) / 1e3);
            let cpu = of(|f| f.cpu);
            writeln!(out, "| {name} | {c}, 4 | {rate:.0} | {p50:.2} | {p99:.2} | {cpu:.1} |")
                .unwrap();
        };
        row("PostgreSQL: CreateKey AES-256", 16, |r| r.create);
        row("a file, beside it: CreateKey AES-256", 16, |r| r.create_embedded);
        row("PostgreSQL: Encrypt 256 B", 64, |r| r.encrypt);
        row("a file, beside it: Encrypt 256 B", 64, |r| r.encrypt_embedded);
        row("PostgreSQL: GetKey", 64, |r| r.get);
        let insert = figure(|r| r.insert);
        writeln!(out, "| bare INSERT, 16 connections | 16, 16 | {insert:.0} | | | |").unwrap();
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let machine = machine();
        let (rounds, window) = (self.rounds.len(), self.window.as_secs());
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load: Vec<&str> = load.split_whitespace().take(3).collect();
        writeln!(out, "Polykey {}, {machine}; load average at the end {}. {rounds} rounds, windows of {window} s; \
            medians over the rounds. Client and server share the machine.\n",
            env!("CARGO_PKG_VERSION"), load.join(" ")).unwrap();
        writeln!(out, "| # | metric | target | measured | |\n|---|---|---|---|---|").unwrap();
        for (number, metric, aim, value) in self.targets() {
            let (sign, bound, met) = match aim {
                Aim::AtLeast(bound) => ('≥', bound, value >= bound),
                Aim::AtMost(bound) => ('≤', bound, value <= bound),
            };
            let met = if met { "met" } else { "**missed**" };
            writeln!(out, "| {number} | {metric} | {sign} {bound} | {value:.2} | {met} |").unwrap();
        }
        writeln!(out, "\n| load | c, n | requests/s | p50 ms | p99 ms | server CPU µs |\n|---|---|---|---|---|---|").unwrap();
        for (kind, c, n, _) in self.rounds.first().map(|r| r.0.clone()).unwrap_or_default() {
            let of = |f: fn(&Figures) -> f64| self.ratio(|r| f(&Self::find(r, kind, c)));
            writeln!(
                out,
                "| {} | {c}, {n} | {:.0} | {:.2} | {:.2} | {:.1} |",
                name(kind),
                of(|f| f.rate),
                of(|f| f.p50) / 1e3,
                of(|f| f.p99) / 1e3,
                of(|f| f.cpu)
            )
            .unwrap();
        }
        #[cfg(feature = "postgres")]
        self.database_rows(&mut out);
        let floor = |f: fn(&Floors) -> f64| self.ratio(|r| f(&r.1));
        writeln!(out, "\nFloors: bare redb commits of 1 row {:.0}/s (p50 {:.2} ms), of 64 rows {:.0} rows/s; appends \
            of 64 records and a sync {:.0} records/s. The large store was filled at {:.0} keys/s in batches of 500; \
            a page of 100 takes {:.2} ms at 10,000 keys and {:.2} ms at {}.",
            floor(|f| f.r1), floor(|f| f.r1_p50) / 1e3, floor(|f| f.r64), floor(|f| f.d64), self.fill_rate,
            self.pages_some.plain, self.pages_many.plain, self.many).unwrap();
        out
    }

    /// Prints the report, and puts it into the document.
    pub(crate) fn finish(&self) {
        let text = self.text();
        println!("\n{text}");
        if setting("POLYKEY_BENCH_WRITE", 1) == 0 {
            return;
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
        let old = std::fs::read_to_string(&path).unwrap_or_else(|_| "# Performance\n".to_owned());
        let (before, after) = match (old.find(BEGIN), old.find(END)) {
            (Some(from), Some(to)) if from < to => (&old[..from], &old[to + END.len()..]),
            _ => (old.as_str(), "\n"),
        };
        std::fs::write(&path, format!("{before}{BEGIN}\n{text}{END}{after}")).unwrap();
        println!("written to {}", path.display());
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Echo => "echo E, 256 B",
        Kind::StockEcho => "stock echo, 256 B",
        Kind::Health => "HealthCheck",
        Kind::GetKey => "GetKey",
        Kind::Create => "CreateKey AES-256",
        Kind::Encrypt => "Encrypt 256 B",
        Kind::Decrypt => "Decrypt 256 B",
        Kind::Encrypt4KiB => "Encrypt 4 KiB",
        Kind::Encrypt64KiB => "Encrypt 64 KiB",
        Kind::EncryptBatch => "BatchCrypto, 100 × Encrypt 256 B (calls)",
        Kind::DataKey => "GenerateDataKey, recorded durably",
        Kind::SignEd25519 => "Sign Ed25519",
        Kind::SignP256 => "Sign ECDSA P-256",
        Kind::SignRsa2048 => "Sign RSA-2048 PSS",
        Kind::SignMlDsa65 => "Sign ML-DSA-65",
    }
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or_default();
    format!("{cores} cores of {}", model.trim_start_matches([' ', '\t', ':']))
}
