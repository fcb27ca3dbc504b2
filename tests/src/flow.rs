//! The file of the flow that a system runs: the shop, and the ledger beside it.

use std::fmt;

/// What differs between the tests' flows.
#[derive(Clone, Debug)]
pub struct FlowFile {
    /// The source's connection string as it stands in the file.
    pub source: String,
    /// `publication.tables`.
    pub tables: String,
    /// Further lines below `source.postgres`, each with its own indentation of six.
    pub source_lines: Vec<String>,
    /// `log.maxBytes`.
    pub max_bytes: String,
    /// `largeTransactionBytes`.
    pub large_transaction_bytes: String,
    /// `log.replicas`.
    pub replicas: u8,
}

impl Default for FlowFile {
    fn default() -> Self {
        FlowFile {
            source: "{ env: SHOP_DSN }".to_owned(),
            tables: "[public.*]".to_owned(),
            source_lines: Vec::new(),
            max_bytes: "512Mi".to_owned(),
            large_transaction_bytes: "64Mi".to_owned(),
            replicas: 3,
        }
    }
}

impl fmt::Display for FlowFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FlowFile { source, tables, source_lines, max_bytes, large_transaction_bytes, replicas } = self;
        writeln!(f, "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: shop }}\nspec:\n  source:\n    postgres:")?;
        writeln!(f, "      dsn: {source}")?;
        // What is not taken in by a pattern cannot be left out.
        let exclude = if tables.contains('*') { ", exclude: [public.audit_log]" } else { "" };
        writeln!(f, "      publication: {{ create: true, tables: {tables}{exclude} }}")?;
        writeln!(f, "      snapshot: never\n      largeTransactionBytes: {large_transaction_bytes}")?;
        for line in source_lines {
            writeln!(f, "      {line}")?;
        }
        writeln!(f, "  log: {{ replicas: {replicas}, maxBytes: {max_bytes} }}")?;
        writeln!(f, "  sinks:\n    - name: warehouse\n      postgres: {{ dsn: {{ env: WAREHOUSE_DSN }} }}")?;
        writeln!(f, "      onOverrun: backpressure")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn the_file_is_a_flow() {
        let parsed = wallaby_model::flow::parse(&FlowFile::default().to_string(), "flow.yaml").unwrap();
        assert_eq!(parsed.problems(), vec![]);
    }
}
