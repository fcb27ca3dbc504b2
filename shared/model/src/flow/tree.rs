//! YAML (and so JSON) text as a tree that remembers where each part stood.
//!
//! Own, because a message that names the line and the column of a wrong key needs them, and a deserialiser has forgotten
//! them by the time the key turns out to be wrong. Anchors, aliases and tags are refused: a flow file needs none, and
//! aliases can make a small text large.

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span, StrInput};

use super::parse::FileProblem;

/// More than any flow file needs; bounds the recursion.
pub(super) const MAX_DEPTH: usize = 24;

/// A line and a column, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl From<Marker> for Mark {
    fn from(marker: Marker) -> Mark {
        Mark { line: marker.line(), column: marker.col() + 1 }
    }
}

/// A part of the text.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) mark: Mark,
    pub(super) kind: NodeKind,
}

/// What a part is.
#[derive(Debug)]
pub(super) enum NodeKind {
    /// A text or a number; `plain` when it stood without quotes.
    Scalar { text: String, plain: bool },
    /// `[…]`
    List(Vec<Node>),
    /// `{…}`, in the order written, duplicates included.
    Map(Vec<(Key, Node)>),
}

/// A key of a map.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) mark: Mark,
    pub(super) text: String,
}

impl Node {
    /// Nothing, `null` or `~` without quotes: as if the key were not there.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.kind, NodeKind::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null"))
    }

    /// What this is, for "found …".
    pub(super) fn what(&self) -> &'static str {
        match &self.kind {
            NodeKind::Scalar { .. } if self.is_null() => "nothing",
            NodeKind::Scalar { plain: true, text } if text.parse::<f64>().is_ok() => "a number",
            NodeKind::Scalar { plain: true, text } if text == "true" || text == "false" => "true or false",
            NodeKind::Scalar { .. } => "a text",
            NodeKind::List(_) => "a list",
            NodeKind::Map(_) => "a map",
        }
    }
}

/// Reads all documents of a text. The first syntax error ends it: what follows one has no reliable shape.
pub(super) fn read(text: &str) -> Result<Vec<Node>, FileProblem> {
    let mut reader = Reader { parser: Parser::new_from_str(text) };
    let mut documents = Vec::new();
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => return Ok(documents),
            Event::DocumentStart(_) => {
                let (event, span) = reader.next()?;
                documents.push(reader.node(event, span, 0)?);
            }
            Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
            _ => return Err(problem(span, "this does not belong to any document")),
        }
    }
}

fn problem(span: Span, message: impl Into<String>) -> FileProblem {
    FileProblem::at(span.start.into(), message)
}

struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), FileProblem> {
        match self.parser.next_event() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => {
                Err(FileProblem::at((*error.marker()).into(), format!("not valid YAML or JSON: {}", error.info())))
            }
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, FileProblem> {
        if depth > MAX_DEPTH {
            return Err(problem(span, format!("nested more than {MAX_DEPTH} levels deep")));
        }
        refuse_extras(&event, span)?;
        let kind = match event {
            Event::Scalar(text, style, ..) => {
                NodeKind::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain }
            }
            Event::SequenceStart(..) => NodeKind::List(self.list(depth)?),
            Event::MappingStart(..) => NodeKind::Map(self.map(depth)?),
            _ => return Err(problem(span, "a value is missing here")),
        };
        Ok(Node { mark: span.start.into(), kind })
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>, FileProblem> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Vec<(Key, Node)>, FileProblem> {
        let mut entries = Vec::new();
        loop {
            let key = match self.next()? {
                (Event::MappingEnd, _) => return Ok(entries),
                (Event::Scalar(text, ..), span) => Key { mark: span.start.into(), text: text.into_owned() },
                (_, span) => return Err(problem(span, "a key must be a plain word")),
            };
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            entries.push((key, value));
        }
    }
}

fn refuse_extras(event: &Event<'_>, span: Span) -> Result<(), FileProblem> {
    let (anchor, tagged) = match event {
        Event::Alias(_) => return Err(problem(span, "aliases (`*name`) are not supported: write the value out")),
        Event::Scalar(_, _, anchor, tag) => (*anchor, tag.is_some()),
        Event::SequenceStart(anchor, tag) | Event::MappingStart(anchor, tag) => (*anchor, tag.is_some()),
        _ => (0, false),
    };
    if anchor != 0 {
        return Err(problem(span, "anchors (`&name`) are not supported: remove it"));
    }
    if tagged {
        return Err(problem(span, "tags (`!name`) are not supported: remove it"));
    }
    Ok(())
}
