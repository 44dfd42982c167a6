//! Bounds on how deep a policy nests, checked on its tokens before the parser sees them.
//!
//! Cedar's parser and its JSON conversion recurse without a limit of their own (a few kilobytes of
//! brackets overflow a thread's stack and end the process), nested conditionals take exponential
//! time to validate, and where validation does run out of stack it passes in silence. Policies come
//! from clients, so none of that may be reached.

use super::policies::PolicyError;

/// How deep brackets may nest in one policy.
pub const MAX_NESTING: usize = 16;
/// How many `if` one policy may have.
pub const MAX_CONDITIONALS: usize = 6;
/// How many brackets and chaining operators (`. && || + - *`) one policy may have in all, outside of
/// strings and comments: each can add a level to the expression, and 100 levels are known to be safe
/// on a stack of 2 MiB without optimisation.
pub const MAX_OPERATORS: usize = 80;

#[derive(Clone, Copy, PartialEq, Eq)]
enum In {
    Code,
    Text,
    Escape,
    Comment,
}

/// Checks every policy of a text.
///
/// # Errors
/// The first bound that is exceeded, where it is.
pub(super) fn check(name: &str, text: &str) -> Result<(), PolicyError> {
    let mut state = In::Code;
    let (mut line, mut column) = (1, 0);
    let (mut depth, mut conditionals, mut operators) = (0usize, 0usize, 0usize);
    let mut word = String::new();
    let mut previous = ' ';
    for c in text.chars() {
        column += 1;
        state = match (state, c) {
            (In::Code, '"') => In::Text,
            (In::Code, '/') if previous == '/' => In::Comment,
            (In::Text, '\\') => In::Escape,
            (In::Text, '"') | (In::Comment, '\n' | '\r') => In::Code,
            (In::Escape, _) => In::Text,
            (state, _) => state,
        };
        if state == In::Code {
            match c {
                '(' | '[' | '{' => (depth, operators) = (depth + 1, operators + 1),
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                ';' if depth == 0 => (conditionals, operators) = (0, 0),
                '.' | '+' | '-' | '*' => operators += 1,
                '&' | '|' if previous == c => operators += 1,
                _ => {}
            }
        }
        if state == In::Code && (c.is_alphanumeric() || c == '_') {
            word.push(c);
        } else if word == "if" {
            conditionals += 1;
            word.clear();
        } else {
            word.clear();
        }
        let exceeded = if depth > MAX_NESTING {
            Some(format!("brackets nest more than {MAX_NESTING} deep"))
        } else if conditionals > MAX_CONDITIONALS {
            Some(format!("more than {MAX_CONDITIONALS} conditionals in one policy"))
        } else if operators > MAX_OPERATORS {
            Some(format!("more than {MAX_OPERATORS} brackets and operators in one policy"))
        } else {
            None
        };
        if let Some(message) = exceeded {
            return Err(PolicyError {
                name: name.to_owned(),
                line,
                column,
                message,
                remedy: "write it as several policies, or with sets and roles".to_owned(),
            });
        }
        if c == '\n' {
            (line, column) = (line + 1, 0);
        }
        previous = c;
    }
    Ok(())
}
