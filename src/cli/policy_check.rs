//! `polykey policy check`: policies against the schema, without a server.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use super::App;
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::policy::CheckArgs;
use super::value::text_file;
use crate::authz::{KeyPolicies, PolicyError, Report, check_files};

/// What was found in policy files.
#[derive(Serialize)]
struct CheckView {
    ok: bool,
    files: Vec<FileView>,
    errors: Vec<ProblemView>,
    warnings: Vec<ProblemView>,
    #[serde(skip)]
    text: String,
}

/// A file and its policies.
#[derive(Serialize)]
struct FileView {
    file: String,
    policies: Vec<String>,
}

/// What is wrong or odd, and where.
#[derive(Serialize)]
struct ProblemView {
    file: String,
    /// From 1; `null`: the whole file.
    line: Option<usize>,
    column: Option<usize>,
    message: String,
    remedy: String,
}

impl From<&PolicyError> for ProblemView {
    fn from(error: &PolicyError) -> Self {
        Self {
            file: error.name.clone(),
            line: (error.line != 0).then_some(error.line),
            column: (error.column != 0).then_some(error.column),
            message: error.message.clone(),
            remedy: error.remedy.clone(),
        }
    }
}

impl View for CheckView {
    fn human(&self) -> Human {
        Human::Text(self.text.clone())
    }
}

impl From<Report> for CheckView {
    fn from(report: Report) -> Self {
        let file = |f: &crate::authz::FileReport| FileView {
            file: f.path.display().to_string(),
            policies: f.policies.clone(),
        };
        Self {
            ok: report.ok,
            files: report.files.iter().map(file).collect(),
            errors: report.errors.iter().map(ProblemView::from).collect(),
            warnings: report.warnings.iter().map(ProblemView::from).collect(),
            text: report.to_string(),
        }
    }
}

/// Each file as one access policy of a key; errors name the file.
fn check_key_policies(args: &CheckArgs) -> Result<CheckView, CliError> {
    let mut texts = BTreeMap::new();
    for path in &args.files {
        texts.insert(path.display().to_string(), text_file(path)?);
    }
    let errors = match KeyPolicies::compile(Uuid::nil(), &texts) {
        Ok(_) => Vec::new(),
        Err(errors) => errors.0,
    };
    let policies = if errors.is_empty() { texts.keys().cloned().collect() } else { Vec::new() };
    let mut text: String = errors.iter().map(|error| format!("error: {error}\n")).collect();
    for name in &policies {
        text.push_str(&format!("{name}: an access policy of a key\n"));
    }
    Ok(CheckView {
        ok: errors.is_empty(),
        files: policies
            .into_iter()
            .map(|file: String| FileView { policies: vec![file.clone()], file })
            .collect(),
        errors: errors.iter().map(ProblemView::from).collect(),
        warnings: Vec::new(),
        text,
    })
}

pub(super) fn check(app: &App, args: &CheckArgs) -> Result<(), CliError> {
    let view = if args.key_policy {
        check_key_policies(args)?
    } else {
        CheckView::from(check_files(&args.files))
    };
    app.out.print(&view)?;
    // What is wrong was printed with the rest.
    if view.ok { Ok(()) } else { Err(CliError::silent(Exit::DataLoss)) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::output::{Format, Output};
    use super::*;

    #[test]
    fn good_policies_pass_and_bad_ones_do_not() {
        let app = App { out: Output { format: Format::Json }, profile: None };
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| -> PathBuf {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let good =
            file("good.cedar", "forbid (principal, action, resource) when { context.hour < 6 };");
        let bad =
            file("bad.cedar", "permit (principal, action, resource) when { context.nothing };");
        let key = file(
            "key.cedar",
            "forbid (principal, action, resource == ?resource) when { context.hour < 6 };",
        );
        let run = |files: Vec<PathBuf>, key_policy| check(&app, &CheckArgs { files, key_policy });
        run(vec![good.clone()], false).unwrap();
        run(vec![key], true).unwrap();
        for (files, key_policy) in
            [(vec![good.clone(), bad.clone()], false), (vec![bad], true), (vec![good], true)]
        {
            assert_eq!(run(files, key_policy).unwrap_err().exit, Exit::DataLoss);
        }
        assert_eq!(run(vec![dir.path().join("none")], false).unwrap_err().exit, Exit::DataLoss);
    }
}
