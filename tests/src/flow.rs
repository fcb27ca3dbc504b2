//! The file of the flow that a system runs: the shop, and the ledger beside it.

use std::fmt;

/// What differs between the tests' flows.
#[derive(Clone, Debug)]
pub struct FlowFile {
    /// The source's connection string as it stands in the file.
    pub source: String,
    /// `publication.create`: when somebody else made the publication, its tables are what that says.
    pub create: bool,
    /// `publication.tables`.
    pub tables: String,
    /// Further lines below `source.postgres`, each with its own indentation of six.
    pub source_lines: Vec<String>,
    /// `log.maxBytes`.
    pub max_bytes: String,
    /// `log.replayWindow`.
    pub replay_window: &'static str,
    /// `log.sideStore`.
    pub side_store: String,
    /// `largeTransactionBytes`.
    pub large_transaction_bytes: String,
    /// `snapshot`.
    pub snapshot: &'static str,
    /// `onOverrun` of every sink.
    pub on_overrun: &'static str,
    /// `log.replicas`.
    pub replicas: u8,
    /// The connection string of `warehouse` as it stands in the file.
    pub sink: String,
    /// Sinks beside `warehouse`: each a database of that name, its connection string in [`FlowFile::variable`].
    pub more_sinks: Vec<String>,
}

impl FlowFile {
    /// The environment variable that has a sink's connection string.
    pub fn variable(sink: &str) -> String {
        format!("{}_DSN", sink.to_uppercase())
    }
}

impl Default for FlowFile {
    fn default() -> Self {
        FlowFile {
            source: "{ env: SHOP_DSN }".to_owned(),
            create: true,
            tables: "[public.*]".to_owned(),
            source_lines: Vec::new(),
            max_bytes: "512Mi".to_owned(),
            replay_window: "1h",
            side_store: "{ jetstream: {} }".to_owned(),
            large_transaction_bytes: "64Mi".to_owned(),
            snapshot: "never",
            on_overrun: "backpressure",
            replicas: 3,
            sink: format!("{{ env: {} }}", FlowFile::variable("warehouse")),
            more_sinks: Vec::new(),
        }
    }
}

impl fmt::Display for FlowFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FlowFile { source, tables, source_lines, max_bytes, large_transaction_bytes, .. } = self;
        let FlowFile { snapshot, on_overrun, replicas, side_store, more_sinks, replay_window, create, sink, .. } = self;
        writeln!(f, "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: shop }}\nspec:\n  source:\n    postgres:")?;
        writeln!(f, "      dsn: {source}")?;
        // What is not taken in by a pattern cannot be left out.
        let exclude = if tables.contains('*') { ", exclude: [public.audit_log]" } else { "" };
        match create {
            true => writeln!(f, "      publication: {{ create: true, tables: {tables}{exclude} }}")?,
            false => writeln!(f, "      publication: {{ create: false }}")?,
        }
        writeln!(f, "      snapshot: {snapshot}\n      largeTransactionBytes: {large_transaction_bytes}")?;
        for line in source_lines {
            writeln!(f, "      {line}")?;
        }
        writeln!(
            f,
            "  log: {{ replicas: {replicas}, maxBytes: {max_bytes}, replayWindow: {replay_window}, sideStore: {side_store} }}"
        )?;
        writeln!(f, "  sinks:")?;
        let more = more_sinks.iter().map(|sink| (sink.as_str(), format!("{{ env: {} }}", FlowFile::variable(sink))));
        for (sink, dsn) in std::iter::once(("warehouse", sink.clone())).chain(more) {
            writeln!(f, "    - name: {sink}\n      postgres: {{ dsn: {dsn} }}")?;
            writeln!(f, "      onOverrun: {on_overrun}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn the_file_is_a_flow() {
        let file = FlowFile { more_sinks: vec!["second".to_owned()], ..FlowFile::default() };
        for file in [file, FlowFile { create: false, ..FlowFile::default() }] {
            let parsed = wallaby_model::flow::parse(&file.to_string(), "flow.yaml").unwrap();
            assert_eq!(parsed.problems(), vec![]);
        }
    }
}
