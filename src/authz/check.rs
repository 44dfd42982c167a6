//! Policy files from disk: the one part of this module that reads files, for start-up and `polykey policy check`.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::policies::{
    DEFAULTS, MAX_OPERATOR_BYTES, PolicyError, PolicyErrors, PolicyFile, compile,
};

/// What is to be said about a set of policy files.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// Whether a node would start with them.
    pub ok: bool,
    /// The files, in order, with the number of policies in each when all are well.
    pub files: Vec<FileReport>,
    /// Everything wrong.
    pub errors: Vec<PolicyError>,
    /// What is odd without being wrong.
    pub warnings: Vec<PolicyError>,
}

/// One file of a [`Report`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FileReport {
    /// Where it is.
    pub path: PathBuf,
    /// The ids of its policies; empty when anything is wrong.
    pub policies: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for error in &self.errors {
            writeln!(f, "error: {error}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        if self.ok {
            for file in &self.files {
                let count = file.policies.len();
                let noun = if count == 1 { "policy" } else { "policies" };
                writeln!(f, "{}: {count} {noun}", file.path.display())?;
            }
        }
        Ok(())
    }
}

/// Reads policy files; the name of each is its file name without `.cedar`. Errors name the path.
///
/// # Errors
/// Every file that cannot be read, is too long or is not UTF-8.
pub fn load_files(paths: &[PathBuf]) -> Result<Vec<PolicyFile>, PolicyErrors> {
    let mut files = Vec::new();
    let mut errors = Vec::new();
    for path in paths {
        match load(path) {
            Ok(file) => files.push(file),
            Err((message, remedy)) => {
                let name = path.display().to_string();
                errors.push(PolicyError::whole(&name, message, remedy));
            }
        }
    }
    if errors.is_empty() { Ok(files) } else { Err(PolicyErrors(errors)) }
}

fn load(path: &Path) -> Result<PolicyFile, (String, &'static str)> {
    use std::io::Read as _;
    let unreadable = |e: std::io::Error| (e.to_string(), "check the path and its permissions");
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .map(|name| name.strip_suffix(".cedar").unwrap_or(name).to_owned())
        .ok_or_else(|| ("has no usable file name".to_owned(), "rename it"))?;
    let limit = MAX_OPERATOR_BYTES as u64 + 1;
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    if bytes.len() > MAX_OPERATOR_BYTES {
        return Err((
            format!("is longer than {MAX_OPERATOR_BYTES} bytes"),
            "combine policies with sets, roles and tags",
        ));
    }
    let text =
        String::from_utf8(bytes).map_err(|e| (format!("is not UTF-8: {e}"), "save it as UTF-8"))?;
    Ok(PolicyFile { name, text })
}

/// What starting with these files, on top of the shipped policies, would say. Changes nothing.
pub fn check_files(paths: &[PathBuf]) -> Report {
    let outcome = load_files(paths).and_then(|files| {
        // Whoever typed the paths is told about paths.
        let at_path = |mut error: PolicyError| {
            if let Some(n) = files.iter().position(|file| file.name == error.name)
                && let Some(path) = paths.get(n)
            {
                error.name = path.display().to_string();
            }
            error
        };
        let (compiled, warnings) = compile(DEFAULTS, &files)
            .map_err(|e| PolicyErrors(e.0.into_iter().map(at_path).collect()))?;
        let warnings = warnings.into_iter().map(at_path).collect();
        let reports = paths
            .iter()
            .zip(&files)
            .map(|(path, file)| {
                let prefix = format!("operator/{}/", file.name);
                FileReport {
                    path: path.clone(),
                    policies: compiled
                        .known
                        .iter()
                        .map(|known| known.id.to_string())
                        .filter(|id| id.starts_with(&prefix))
                        .collect(),
                }
            })
            .collect();
        Ok((reports, warnings))
    });
    match outcome {
        Ok((files, warnings)) => Report { ok: true, files, errors: Vec::new(), warnings },
        Err(PolicyErrors(errors)) => Report {
            ok: false,
            files: paths
                .iter()
                .map(|path| FileReport { path: path.clone(), policies: Vec::new() })
                .collect(),
            errors,
            warnings: Vec::new(),
        },
    }
}
