//! Reads a TOML document section by section and gathers every mistake with its place.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polykey_hsm::SecretSource;
use polykey_hsm::bootstrap::is_parameter_name;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The configuration file.
    pub file: PathBuf,
    /// Line and column, from 1, the column in characters; `None` when the file as a whole is meant.
    pub place: Option<(usize, usize)>,
    /// What is wrong. Names keys, never values.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}; {}", self.what, self.remedy)
    }
}

/// Every mistake of a configuration, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<Problem>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

impl ConfigErrors {
    fn whole(file: &Path, what: String, remedy: &str) -> Self {
        let remedy = remedy.to_owned();
        Self(vec![Problem { file: file.to_owned(), place: None, what, remedy }])
    }

    pub(super) fn not_utf8(file: &Path, before: &[u8]) -> Self {
        let text = String::from_utf8_lossy(before);
        let place = Some(place(&text, text.len()));
        let what = "this is not UTF-8".to_owned();
        let remedy = "save the file as UTF-8 text".to_owned();
        Self(vec![Problem { file: file.to_owned(), place, what, remedy }])
    }
}

pub(super) fn bytes(file: &Path, limit: u64) -> Result<Vec<u8>, ConfigErrors> {
    let unreadable = |error: std::io::Error| {
        let remedy = "check the path and that this user may read it";
        ConfigErrors::whole(file, format!("cannot be read: {error}"), remedy)
    };
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(unreadable)?;
    opened.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > limit) {
        let what = format!("is larger than {limit} bytes");
        return Err(ConfigErrors::whole(file, what, "name the configuration file"));
    }
    Ok(bytes)
}

fn place(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = text.get(..end).unwrap_or_default();
    let start = before.rfind('\n').map_or(0, |i| i + 1);
    let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
    (line, before.get(start..).unwrap_or_default().chars().count() + 1)
}

/// What is wrong with a value, and what to do.
pub(super) type Refused = (String, String);

pub(super) fn refuse<T>(what: impl Into<String>, remedy: impl Into<String>) -> Result<T, Refused> {
    Err((what.into(), remedy.into()))
}

/// The document and what was found wrong with it.
pub(super) struct Document<'t> {
    pub(super) file: &'t Path,
    text: &'t str,
    problems: RefCell<Vec<(usize, Problem)>>,
}

impl<'t> Document<'t> {
    pub(super) fn new(file: &'t Path, text: &'t str) -> Self {
        Self { file, text, problems: RefCell::default() }
    }

    /// Parses the text; mistakes of syntax are noted, and what could be read goes on.
    pub(super) fn parse(&self) -> Spanned<DeTable<'t>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            // Only the message: the error as a whole shows the line, which may hold a secret.
            let at = error.span().map_or(0, |span| span.start);
            let what = format!("not TOML: {}", error.message());
            self.note(at, what, "see https://toml.io for how values are written");
        }
        table
    }

    pub(super) fn note(&self, at: usize, what: impl Into<String>, remedy: impl Into<String>) {
        let problem = Problem {
            file: self.file.to_owned(),
            place: Some(place(self.text, at)),
            what: what.into(),
            remedy: remedy.into(),
        };
        self.problems.borrow_mut().push((at, problem));
    }

    /// Everything noted, in the order of the file.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut noted = self.problems.borrow().clone();
        noted.sort_by_key(|(at, _)| *at);
        noted.dedup_by(|a, b| a.1 == b.1);
        noted.into_iter().map(|(_, problem)| problem).collect()
    }

    /// Every setting that stands in the document, by its name with dots, and its line.
    pub(super) fn written(&self, table: &Spanned<DeTable<'t>>) -> BTreeMap<String, usize> {
        let mut written = BTreeMap::new();
        for (section, value) in table.get_ref().iter() {
            let Some(inner) = value.get_ref().as_table() else { continue };
            for (key, _) in inner.iter() {
                let name = format!("{}.{}", section.get_ref(), key.get_ref());
                written.insert(name, place(self.text, key.span().start).0);
            }
        }
        written
    }

    /// Takes a path as it is meant: relative to the file.
    pub(super) fn path(&self, written: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(written)
    }
}

type Value<'t> = Spanned<DeValue<'t>>;

/// One table, read key by key.
pub(super) struct Section<'d, 't> {
    pub(super) document: &'d Document<'t>,
    /// As in `[listen]`; empty for the document.
    name: Cow<'static, str>,
    table: Option<&'d DeTable<'t>>,
    span: Range<usize>,
    known: RefCell<Vec<&'static str>>,
}

impl<'d, 't> Section<'d, 't> {
    pub(super) fn root(document: &'d Document<'t>, table: &'d Spanned<DeTable<'t>>) -> Self {
        let table = Some(table.get_ref());
        Self { document, name: "".into(), table, span: 0..0, known: RefCell::default() }
    }

    /// The section `[name]`, empty if it is absent.
    pub(super) fn section(&self, name: &'static str) -> Section<'d, 't> {
        let mut span = 0..0;
        let mut table = None;
        if let Some((key, value)) = self.find(name) {
            span = key.span();
            match value.get_ref() {
                DeValue::Table(found) => table = Some(found),
                other => self.document.note(
                    value.span().start,
                    format!("`{name}` is a {}, not a section", other.type_str()),
                    format!("write a section [{name}]"),
                ),
            }
        }
        Section {
            document: self.document,
            name: name.into(),
            table,
            span,
            known: RefCell::default(),
        }
    }

    /// Whether the file has this section.
    pub(super) fn present(&self) -> bool {
        self.table.is_some()
    }

    fn find(&self, key: &'static str) -> Option<(&'d Spanned<Cow<'t, str>>, &'d Value<'t>)> {
        self.known.borrow_mut().push(key);
        self.table?.iter().find(|(name, _)| name.get_ref() == key)
    }

    /// Notes a mistake of the section as a whole.
    pub(super) fn note(&self, what: impl Into<String>, remedy: &str) {
        self.document.note(self.span.start, what, remedy);
    }

    /// Whether the key stands there, whatever its value.
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.find(key).is_some()
    }

    fn label(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("[{}] {key}", self.name) }
    }

    /// Notes something about `key` of this section, or about the section if the key is absent.
    pub(super) fn complain(&self, key: &'static str, refused: Refused) {
        let at = self.find(key).map_or(self.span.start, |(_, value)| value.span().start);
        self.document.note(at, format!("{}: {}", self.label(key), refused.0), refused.1);
    }

    /// The value of `key` as `read` understands it; `None` if it is absent or wrong.
    pub(super) fn get<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&'d DeValue<'t>) -> Result<T, Refused>,
    ) -> Option<T> {
        let (_, value) = self.find(key)?;
        read(value.get_ref())
            .map_err(|(what, remedy)| {
                let what = format!("{}: {what}", self.label(key));
                self.document.note(value.span().start, what, remedy);
            })
            .ok()
    }

    /// As [`Self::get`], and absence is a mistake.
    pub(super) fn need<T>(
        &self,
        key: &'static str,
        example: &str,
        read: impl FnOnce(&'d DeValue<'t>) -> Result<T, Refused>,
    ) -> Option<T> {
        if self.find(key).is_none() {
            let section = &self.name;
            let what = format!("{}: missing", self.label(key));
            let remedy = format!("add `{key} = {example}` to [{section}]");
            self.document.note(self.span.start, what, remedy);
        }
        self.get(key, read)
    }

    pub(super) fn integer<N: TryFrom<i64>>(
        &self,
        key: &'static str,
        range: std::ops::RangeInclusive<i64>,
        default: N,
    ) -> N {
        self.get(key, |value| integer(value, &range)).unwrap_or(default)
    }

    pub(super) fn boolean(&self, key: &'static str, default: bool) -> bool {
        self.get(key, |value| match value.as_bool() {
            Some(flag) => Ok(flag),
            None => refuse(format!("a {}", value.type_str()), "write true or false"),
        })
        .unwrap_or(default)
    }

    pub(super) fn duration(
        &self,
        key: &'static str,
        range: (&'static str, &'static str),
        default: Duration,
    ) -> Duration {
        self.get(key, |value| duration(value, range)).unwrap_or(default)
    }

    /// One word of a few.
    pub(super) fn word<T: Copy>(
        &self,
        key: &'static str,
        words: &[(&'static str, T)],
        default: T,
    ) -> T {
        let all = || words.iter().map(|(w, _)| format!("\"{w}\"")).collect::<Vec<_>>().join(" or ");
        self.get(key, |value| {
            let text = string(value)?;
            match words.iter().find(|(word, _)| *word == text) {
                Some((_, meaning)) => Ok(*meaning),
                None => refuse("not one of its words", format!("write {}", all())),
            }
        })
        .unwrap_or(default)
    }

    pub(super) fn path(&self, key: &'static str) -> Option<PathBuf> {
        self.get(key, |value| path(self.document, value))
    }

    pub(super) fn need_path(&self, key: &'static str, example: &str) -> Option<PathBuf> {
        self.need(key, example, |value| path(self.document, value))
    }

    /// A PEM file, or a reference to a text and the name of its place.
    pub(super) fn pem(&self, key: &'static str) -> Option<(PathBuf, Option<SecretSource>)> {
        self.get(key, |value| pem(self.document, value))
    }

    pub(super) fn need_pem(
        &self,
        key: &'static str,
        example: &str,
    ) -> Option<(PathBuf, Option<SecretSource>)> {
        self.need(key, example, |value| pem(self.document, value))
    }

    /// A reference to a secret.
    pub(super) fn reference(&self, key: &'static str) -> Option<SecretSource> {
        self.get(key, |value| reference(self.document, value))
    }

    /// As [`Self::reference`], and absence is a mistake.
    pub(super) fn need_reference(&self, key: &'static str, example: &str) -> Option<SecretSource> {
        self.need(key, example, |value| reference(self.document, value))
    }

    /// References to secrets by names of the operator's choice.
    pub(super) fn references(&self, key: &'static str) -> BTreeMap<String, SecretSource> {
        let found = self.get(key, |value| {
            let Some(table) = value.as_table() else {
                let remedy = "write { NAME = { file = \"…\" } }";
                return refuse(format!("a {}, not a table", value.type_str()), remedy);
            };
            let each = table.iter().map(|(name, value)| {
                Ok((name.get_ref().to_string(), reference(self.document, value.get_ref())?))
            });
            each.collect()
        });
        found.unwrap_or_default()
    }

    /// A table within the section, read like a section.
    /// Its name, as in `[listen]`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The tables of this section whatever they are called: name, place, and the table if it is one.
    pub(super) fn each(&self) -> Vec<(String, usize, Option<Section<'d, 't>>)> {
        let each = |(key, value): (&'d Spanned<Cow<'t, str>>, &'d Value<'t>)| {
            let (name, span) = (key.get_ref().to_string(), key.span());
            let at = span.start;
            let section = match value.get_ref() {
                DeValue::Table(table) => Some(Section {
                    document: self.document,
                    name: format!("{}.{name}", self.name).into(),
                    table: Some(table),
                    span,
                    known: RefCell::default(),
                }),
                other => {
                    let what =
                        format!("[{}]: a {} where a section belongs", self.name, other.type_str());
                    let remedy = format!("write a section [{}.NAME]", self.name);
                    self.document.note(value.span().start, what, remedy);
                    None
                }
            };
            (name, at, section)
        };
        self.table.into_iter().flatten().map(each).collect()
    }

    /// The table `key` of this section.
    pub(super) fn inner(&self, key: &'static str) -> Option<Section<'d, 't>> {
        let (found, value) = self.find(key)?;
        match value.get_ref() {
            DeValue::Table(table) => Some(Section {
                document: self.document,
                name: format!("{}.{key}", self.name).into(),
                table: Some(table),
                span: found.span(),
                known: RefCell::default(),
            }),
            other => {
                let what = format!("{}: a {}", self.label(key), other.type_str());
                self.document.note(value.span().start, what, "write it as a table { … }");
                None
            }
        }
    }

    /// Refuses every key that was not asked for.
    pub(super) fn finish(self) {
        let known = self.known.into_inner();
        let keys = self.table.into_iter().flat_map(|table| table.keys());
        for key in keys.filter(|key| !known.contains(&key.get_ref().as_ref())) {
            let name = key.get_ref().as_ref();
            // A secret that lost its key, say, would otherwise be repeated here.
            let tame = name.len() <= 32
                && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b == b'-');
            let shown = if tame { format!("`{name}`") } else { "this key".to_owned() };
            let (what, where_) = match &*self.name {
                "" => (format!("{shown} is not a section"), "sections are".to_owned()),
                section => {
                    (format!("[{section}]: {shown} is not an option"), "options are".to_owned())
                }
            };
            let near = known.iter().find(|known| tame && similar(known, name));
            let mut all: Vec<_> = known.clone();
            all.sort_unstable();
            all.dedup();
            let remedy = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("remove it; {where_}: {}", all.join(", ")),
            };
            self.document.note(key.span().start, what, remedy);
        }
    }
}

/// Whether two names differ by one or two letters, or by `-` for `_`.
fn similar(a: &str, b: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) =
        (a.chars().collect(), b.replace('-', "_").chars().collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let at = |row: &[usize], k: usize| row.get(k).copied().unwrap_or(usize::MAX - 1);
            let swap = at(&row, j) + usize::from(x != y);
            next.push(swap.min(at(&row, j + 1) + 1).min(at(&next, j) + 1));
        }
        row = next;
    }
    row.last().is_some_and(|distance| *distance <= 2)
}

pub(super) fn string<'v>(value: &'v DeValue<'_>) -> Result<&'v str, Refused> {
    match value.as_str() {
        Some("") => refuse("empty", "write a value between the quotes, or remove the line"),
        Some(text) if text.contains('\0') => refuse("has a NUL character", "remove it"),
        Some(text) => Ok(text),
        None => refuse(format!("a {}, not text", value.type_str()), "write it in quotes"),
    }
}

pub(super) fn path(document: &Document<'_>, value: &DeValue<'_>) -> Result<PathBuf, Refused> {
    Ok(document.path(string(value)?))
}

pub(super) fn integer<N: TryFrom<i64>>(
    value: &DeValue<'_>,
    range: &std::ops::RangeInclusive<i64>,
) -> Result<N, Refused> {
    let remedy = || format!("write a whole number from {} to {}", range.start(), range.end());
    let Some(written) = value.as_integer() else {
        return refuse(format!("a {}, not a whole number", value.type_str()), remedy());
    };
    let digits = written.as_str().replace('_', "");
    match i64::from_str_radix(&digits, written.radix()) {
        Ok(number) if range.contains(&number) => {
            N::try_from(number).or_else(|_| refuse("out of range", remedy()))
        }
        _ => refuse("out of range", remedy()),
    }
}

/// A duration in jiff's friendly format, between two others.
/// As [`duration`], with days as well: a whole number and `d`.
pub(super) fn days(
    value: &DeValue<'_>,
    (least, most): (&'static str, &'static str),
) -> Result<Duration, Refused> {
    const DAY: u64 = 86_400;
    let parse = |text: &str| match text.strip_suffix('d').map(str::parse::<u64>) {
        Some(Ok(days)) => days.checked_mul(DAY).map(Duration::from_secs),
        _ => Duration::try_from(text.parse::<jiff::SignedDuration>().ok()?).ok(),
    };
    let remedy = || format!("write a time from {least} to {most}, such as \"400d\"");
    let Some(text) = value.as_str() else {
        return refuse(format!("a {}, not a time with its unit", value.type_str()), remedy());
    };
    let Some(found) = parse(text) else { return refuse("not a time with its unit", remedy()) };
    if parse(least).is_some_and(|least| found < least) || parse(most).is_some_and(|m| found > m) {
        return refuse("out of range", remedy());
    }
    Ok(found)
}

pub(super) fn duration(
    value: &DeValue<'_>,
    (least, most): (&'static str, &'static str),
) -> Result<Duration, Refused> {
    let remedy = || format!("write a time from {least} to {most}, such as \"{least}\"");
    let parse = |text: &str| {
        let span: jiff::SignedDuration = text.parse().ok()?;
        Duration::try_from(span).ok()
    };
    let Some(text) = value.as_str() else {
        return refuse(format!("a {}, not a time with its unit", value.type_str()), remedy());
    };
    let Some(found) = parse(text) else { return refuse("not a time with its unit", remedy()) };
    if parse(least).is_some_and(|least| found < least) || parse(most).is_some_and(|m| found > m) {
        return refuse("out of range", remedy());
    }
    Ok(found)
}

fn pem(
    document: &Document<'_>,
    value: &DeValue<'_>,
) -> Result<(PathBuf, Option<SecretSource>), Refused> {
    if !value.is_table() {
        return Ok((path(document, value)?, None));
    }
    Ok(match reference(document, value)? {
        SecretSource::File(path) => (path, None),
        elsewhere => (PathBuf::from(elsewhere.to_string()), Some(elsewhere)),
    })
}

pub(super) fn reference(
    document: &Document<'_>,
    value: &DeValue<'_>,
) -> Result<SecretSource, Refused> {
    const REMEDY: &str = "refer to the secret with { file = \"…\" }, { env = \"…\" }, \
                          { credential = \"…\" } or { ssm = \"…\" }";
    let DeValue::Table(table) = value else {
        return refuse(
            format!("a {} where a reference to a secret belongs", value.type_str()),
            REMEDY,
        );
    };
    let mut entries = table.iter();
    let (Some((kind, text)), None) = (entries.next(), entries.next()) else {
        return refuse("a reference names exactly one place", REMEDY);
    };
    let text = || {
        text.get_ref()
            .as_str()
            .filter(|text| !text.is_empty() && !text.contains('\0'))
            .ok_or_else(|| ("the reference names no place".to_owned(), REMEDY.to_owned()))
    };
    match kind.get_ref().as_ref() {
        "file" => Ok(SecretSource::File(document.path(text()?))),
        "env" => match text()? {
            name if is_variable(name) => Ok(SecretSource::Env(name.to_owned())),
            _ => refuse("not the name of an environment variable", "write letters, digits and _"),
        },
        "credential" => match text()? {
            name if is_credential(name) => Ok(SecretSource::Credential(name.to_owned())),
            _ => refuse(
                "not the name of a credential",
                "write the name given to LoadCredential=, without / and not starting with a dot",
            ),
        },
        "ssm" if cfg!(feature = "aws") => match text()? {
            name if is_parameter_name(name) => Ok(SecretSource::Ssm(name.to_owned())),
            _ => refuse(
                "not the name of an SSM parameter",
                "write /PATH/NAME of letters, digits and . - _, with :VERSION or :LABEL if need be",
            ),
        },
        "ssm" => refuse(
            "this build reads nothing from AWS",
            "refer to another place, or run a build with the cargo feature `aws`",
        ),
        _ => refuse("not a kind of reference", REMEDY),
    }
}

fn is_variable(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn is_credential(name: &str) -> bool {
    name.len() <= 255 && !name.starts_with('.') && !name.contains('/')
}
