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
    let mut view = CheckView::from(check_files(&[]));
    for path in &args.files {
        let file = path.display().to_string();
        let texts = BTreeMap::from([("policy".to_owned(), text_file(path)?)]);
        match KeyPolicies::compile(Uuid::nil(), &texts) {
            Ok(_) => {
                view.text.push_str(&format!("{file}: an access policy of a key\n"));
                view.files.push(FileView { file, policies: texts.into_keys().collect() });
            }
            Err(errors) => {
                view.ok = false;
                for mut error in errors.0 {
                    error.name.clone_from(&file);
                    view.text.push_str(&format!("error: {error}\n"));
                    view.errors.push(ProblemView::from(&error));
                }
            }
        }
    }
    Ok(view)
}

fn look(args: &CheckArgs) -> Result<CheckView, CliError> {
    if args.key_policy { check_key_policies(args) } else { Ok(check_files(&args.files).into()) }
}

pub(super) fn check(app: &App, args: &CheckArgs) -> Result<(), CliError> {
    let view = look(args)?;
    app.out.print(&view)?;
    // What is wrong was printed with the rest.
    if view.ok { Ok(()) } else { Err(CliError::silent(Exit::Other)) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn good_policies_pass_and_bad_ones_do_not() {
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
        let run = |files: Vec<PathBuf>, key_policy| look(&CheckArgs { files, key_policy });
        assert!(run(vec![good.clone()], false).unwrap().ok);
        let view = run(vec![key.clone()], true).unwrap();
        assert!(view.ok && view.files.len() == 1, "{}", view.text);
        for (files, key_policy) in
            [(vec![good.clone(), bad.clone()], false), (vec![key, bad], true)]
        {
            let view = run(files, key_policy).unwrap();
            assert!(!view.ok && view.text.contains(".cedar"), "{}", view.text);
        }
        assert!(!run(vec![dir.path().join("none")], false).unwrap().ok);
    }
}
