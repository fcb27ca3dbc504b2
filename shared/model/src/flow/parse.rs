//! Reads flow files, and says everything that is wrong with one at once: where, what, and what to write instead.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use super::fields::{Choice, DOCUMENT, Field, Object, Shape};
use super::tree::{Mark, Node, NodeKind};
use super::{ByteSize, FlowDocument, Span, tree};
use crate::ids::FlowId;

/// Longer texts are refused: a flow file has a few kilobytes.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// Flows in one file.
pub const MAX_DOCUMENTS: usize = 1000;

/// Problems reported at once; a file with more is another kind of file.
const MAX_PROBLEMS: usize = 20;

/// One thing that is wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileProblem {
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
    /// What is wrong and what to write instead. Never a secret.
    pub message: String,
}

impl FileProblem {
    pub(super) fn at(mark: Mark, message: impl Into<String>) -> FileProblem {
        FileProblem { line: mark.line, column: mark.column, message: message.into() }
    }
}

/// Everything that is wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct FlowFileError {
    /// The file's name, or `-`.
    pub source_name: String,
    /// In the order of the lines; at least one.
    pub problems: Vec<FileProblem>,
}

impl fmt::Display for FlowFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            let FileProblem { line, column, message } = problem;
            write!(f, "{separator}{}: line {line}, column {column}: {message}", self.source_name)?;
        }
        Ok(())
    }
}

/// A flow with what the file itself said.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedFlow {
    /// The flow, defaults filled in.
    pub document: FlowDocument,
    /// Where each path that the file mentions stands, as `spec.sinks[0].paused`.
    marks: BTreeMap<String, (usize, usize)>,
}

impl ParsedFlow {
    /// Whether the file itself gives this key, as in `spec.paused` or `spec.sinks[0].paused`.
    pub fn mentions(&self, path: &str) -> bool {
        self.marks.contains_key(path)
    }
}

/// Reads a file with exactly one flow. `source_name` is for messages.
///
/// # Errors
/// When the text is not a flow: all problems, with lines and columns.
pub fn parse(text: &str, source_name: &str) -> Result<FlowDocument, FlowFileError> {
    let mut flows = parse_all(text, source_name)?;
    match flows.pop() {
        Some(flow) if flows.is_empty() => Ok(flow.document),
        _ => {
            let message = "the file holds more than one flow, where one is expected";
            Err(FlowFileError { source_name: source_name.to_owned(), problems: vec![file_problem(message)] })
        }
    }
}

/// Reads a file with one or more flows, separated by `---`.
///
/// # Errors
/// When a document is not a flow, or there is none: all problems of all documents, with lines and columns.
pub fn parse_all(text: &str, source_name: &str) -> Result<Vec<ParsedFlow>, FlowFileError> {
    read_all(text).map_err(|mut problems| {
        problems.sort_by_key(|problem| (problem.line, problem.column));
        if problems.len() > MAX_PROBLEMS {
            let more = problems.len() - MAX_PROBLEMS;
            problems.truncate(MAX_PROBLEMS);
            if let Some(last) = problems.last_mut() {
                last.message.push_str(&format!(" (and {more} more problems)"));
            }
        }
        FlowFileError { source_name: source_name.to_owned(), problems }
    })
}

fn file_problem(message: impl Into<String>) -> FileProblem {
    FileProblem { line: 1, column: 1, message: message.into() }
}

fn read_all(text: &str) -> Result<Vec<ParsedFlow>, Vec<FileProblem>> {
    if text.len() > MAX_FILE_BYTES {
        return Err(vec![file_problem(format!(
            "the file has {} bytes; a flow file has at most {MAX_FILE_BYTES}",
            text.len()
        ))]);
    }
    let nodes: Vec<Node> = tree::read(text).map_err(|problem| vec![problem])?;
    let nodes: Vec<Node> = nodes.into_iter().filter(|node| !node.is_null()).collect();
    if nodes.is_empty() {
        return Err(vec![file_problem(
            "the file is empty: write a flow that starts with `apiVersion: wallaby/v1` and `kind: Flow`",
        )]);
    }
    if nodes.len() > MAX_DOCUMENTS {
        return Err(vec![file_problem(format!(
            "the file holds {} flows; at most {MAX_DOCUMENTS} at once",
            nodes.len()
        ))]);
    }
    let mut flows = Vec::with_capacity(nodes.len());
    let mut problems = Vec::new();
    for node in &nodes {
        match read_one(node) {
            Ok(flow) => flows.push(flow),
            Err(more) => problems.extend(more),
        }
    }
    problems.extend(doubled_flows(&flows));
    if problems.is_empty() { Ok(flows) } else { Err(problems) }
}

fn doubled_flows(flows: &[ParsedFlow]) -> Vec<FileProblem> {
    let mut seen: BTreeMap<&FlowId, usize> = BTreeMap::new();
    let mut problems = Vec::new();
    for flow in flows {
        let (line, column) = flow.marks.get("metadata.name").copied().unwrap_or((1, 1));
        let name = &flow.document.metadata.name;
        match seen.get(name) {
            Some(first) => {
                let message = format!("flow `{name}` is in this file twice, first at line {first}");
                problems.push(FileProblem { line, column, message });
            }
            None => {
                seen.insert(name, line);
            }
        }
    }
    problems
}

fn read_one(root: &Node) -> Result<ParsedFlow, Vec<FileProblem>> {
    let mut reading = Reading { problems: Vec::new(), marks: BTreeMap::new() };
    let value = reading.object(root, &DOCUMENT, "");
    if !reading.problems.is_empty() {
        return Err(reading.problems);
    }
    let document: FlowDocument = serde_json::from_value(value)
        .map_err(|error| vec![FileProblem::at(root.mark, format!("not a flow: {error}"))])?;
    let problems: Vec<FileProblem> = document
        .problems()
        .into_iter()
        .map(|problem| {
            let message = format!("{}: {}", problem.path, problem.message);
            FileProblem::at(reading.nearest_mark(&problem.path).unwrap_or(root.mark), message)
        })
        .collect();
    if !problems.is_empty() {
        return Err(problems);
    }
    let marks = reading.marks.into_iter().map(|(path, mark)| (path, (mark.line, mark.column))).collect();
    Ok(ParsedFlow { document, marks })
}

/// The state of reading one document: what was wrong so far, and where each path stood.
struct Reading {
    problems: Vec<FileProblem>,
    marks: BTreeMap<String, Mark>,
}

impl Reading {
    fn wrong(&mut self, mark: Mark, message: String) -> Value {
        self.problems.push(FileProblem::at(mark, message));
        Value::Null
    }

    /// The mark of a path, or of the nearest part of the file around it.
    fn nearest_mark(&self, path: &str) -> Option<Mark> {
        let mut path = path;
        loop {
            if let Some(mark) = self.marks.get(path) {
                return Some(*mark);
            }
            path = &path[..path.rfind(['.', '['])?];
        }
    }

    fn value(&mut self, node: &Node, shape: &Shape, path: &str) -> Value {
        match (shape, &node.kind) {
            (Shape::Object(object), _) => self.object(node, object, path),
            (Shape::List(item), NodeKind::List(nodes)) => Value::Array(
                nodes
                    .iter()
                    .enumerate()
                    .map(|(index, node)| self.item(node, item, format!("{path}[{index}]")))
                    .collect(),
            ),
            (Shape::Labels, NodeKind::Map(entries)) => {
                let texts = entries.iter().map(|(key, node)| {
                    let path = format!("{path}.{}", key.text);
                    (key.text.clone(), self.value(node, &Shape::Text, &path))
                });
                Value::Object(texts.collect())
            }
            (_, NodeKind::Scalar { text, plain }) => self.scalar(node, text, *plain, shape, path),
            _ => self.wrong(node.mark, format!("{path}: expected {}, found {}", expected(shape), node.what())),
        }
    }

    fn item(&mut self, node: &Node, shape: &Shape, path: String) -> Value {
        self.marks.insert(path.clone(), node.mark);
        self.value(node, shape, &path)
    }

    fn scalar(&mut self, node: &Node, text: &str, plain: bool, shape: &Shape, path: &str) -> Value {
        let refused = match shape {
            Shape::Text if node.is_null() => {
                Some(format!("expected a text, found nothing: write \"{text}\" in quotes"))
            }
            Shape::Text if plain && node.what() != "a text" => {
                Some(format!("expected a text, found {}: write \"{text}\" in quotes", node.what()))
            }
            Shape::Text => return Value::String(text.to_owned()),
            Shape::Name => match FlowId::new(text) {
                Ok(_) => return Value::String(text.to_owned()),
                Err(_) => Some(format!(
                    "`{text}` is not a name: use 1 to 40 lower-case letters, digits and dashes, starting with a letter and not ending with a dash"
                )),
            },
            Shape::Bool => match (text, plain) {
                ("true", true) => return Value::Bool(true),
                ("false", true) => return Value::Bool(false),
                _ => Some(format!("expected true or false, found `{text}`")),
            },
            Shape::Size => match text.parse::<ByteSize>() {
                Ok(size) => return Value::String(size.to_string()),
                Err(message) => Some(message),
            },
            Shape::Span => match text.parse::<Span>() {
                Ok(span) => return Value::String(span.to_string()),
                Err(message) => Some(message),
            },
            Shape::Choice(choices) => match chosen(text, choices) {
                Ok(value) => return value,
                Err(message) => Some(message),
            },
            Shape::Object(_) | Shape::List(_) | Shape::Labels => {
                Some(format!("expected {}, found {}", expected(shape), node.what()))
            }
        };
        self.wrong(node.mark, format!("{path}: {}", refused.unwrap_or_default()))
    }

    fn object(&mut self, node: &Node, object: &'static Object, path: &str) -> Value {
        let NodeKind::Map(entries) = &node.kind else {
            let place = if path.is_empty() { String::new() } else { format!("{path}: ") };
            let keys = key_list(object);
            return self.wrong(node.mark, format!("{place}expected a map with {keys}, found {}", node.what()));
        };
        let mut values = serde_json::Map::new();
        let mut first_lines: BTreeMap<&str, usize> = BTreeMap::new();
        for (key, child) in entries {
            if let Some(first) = first_lines.insert(&key.text, key.mark.line) {
                self.wrong(key.mark, format!("key `{}` is given twice, first at line {first}", key.text));
                continue;
            }
            let child_path = if path.is_empty() { key.text.clone() } else { format!("{path}.{}", key.text) };
            match object.field(&key.text) {
                None => {
                    let message = unknown_key(object, &key.text, path, key.mark.line);
                    self.wrong(key.mark, message);
                }
                Some(Field { not_yet: Some(why), .. }) => {
                    self.wrong(key.mark, format!("{child_path}: not available yet: {why}"));
                }
                Some(field) if field.ignored || child.is_null() => {}
                Some(field) => {
                    self.marks.insert(child_path.clone(), key.mark);
                    let value = self.value(child, &field.shape, &child_path);
                    values.insert(key.text.clone(), value);
                }
            }
        }
        self.missing(node, object, path, &first_lines, &values);
        Value::Object(values)
    }

    /// Names required keys that are not there; silent about those that are there and wrong.
    fn missing(
        &mut self,
        node: &Node,
        object: &'static Object,
        path: &str,
        given: &BTreeMap<&str, usize>,
        values: &serde_json::Map<String, Value>,
    ) {
        let place = if path.is_empty() { "the document" } else { path };
        if object.one_of {
            if values.len() > 1 || (given.is_empty() && values.is_empty()) {
                self.wrong(node.mark, format!("{place}: give exactly one of {}", key_list(object)));
            }
            return;
        }
        for field in object.fields {
            let null = given.contains_key(field.key) && !values.contains_key(field.key);
            if field.required && !given.contains_key(field.key) {
                // A misspelt key already has its message, and its remedy brings the missing one.
                let misspelt =
                    given.keys().any(|key| object.field(key).is_none() && object.nearest(key) == Some(field.key));
                if !misspelt {
                    self.wrong(node.mark, format!("{place}: `{}` is missing. {}", field.key, field.doc));
                }
            } else if field.required && null && field.not_yet.is_none() {
                self.wrong(node.mark, format!("{place}: `{}` is empty. {}", field.key, field.doc));
            }
        }
    }
}

fn unknown_key(object: &'static Object, key: &str, path: &str, line: usize) -> String {
    let place = if path.is_empty() { String::new() } else { format!(" in {path}") };
    let hint = match object.nearest(key) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known keys are {}", key_list(object)),
    };
    format!("unknown key `{key}`{place} at line {line}: {hint}")
}

fn key_list(object: &Object) -> String {
    let usable = object.fields.iter().filter(|field| field.not_yet.is_none() && !field.ignored);
    usable.map(|field| format!("`{}`", field.key)).collect::<Vec<_>>().join(", ")
}

fn expected(shape: &Shape) -> String {
    match shape {
        Shape::List(_) => "a list".to_owned(),
        Shape::Labels => "a map of texts".to_owned(),
        other => other.title(),
    }
}

/// The JSON value of a chosen word; numbers stay numbers.
fn chosen(text: &str, choices: &'static [Choice]) -> Result<Value, String> {
    match choices.iter().find(|choice| choice.text == text) {
        Some(Choice { not_yet: None, .. }) => {
            Ok(text.parse::<u64>().map_or_else(|_| Value::String(text.to_owned()), Value::from))
        }
        Some(Choice { not_yet: Some(why), .. }) => {
            Err(format!("`{text}` is not available yet ({why}): only {} for now", usable(choices)))
        }
        None => Err(format!("`{text}` is not one of {}", usable(choices))),
    }
}

fn usable(choices: &'static [Choice]) -> String {
    let usable = choices.iter().filter(|choice| choice.not_yet.is_none());
    usable.map(|choice| format!("`{}`", choice.text)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
